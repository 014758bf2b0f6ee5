"""Strict JSON: a file that is damaged, or not of the expected structure, is one sentence with the path of the value."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpsearch.errors import InputError
from mpsearch.files import read_regular


@dataclass(frozen=True)
class Node:
    """A value in a JSON file, and where it stands ("$.space.groups[0].name"); a wrong type raises an `InputError`."""

    value: Any
    file: Path | str
    path: str = "$"
    remedy: str = "Restore it, or start a new run"

    def damage(self, expected: str) -> InputError:
        """The sentence for a value that is not as `expected`."""
        got = text if len(text := ascii(self.value)) <= 60 else f"{text[:40]}…"
        return InputError(f"{self.file} is damaged: {self.path}: got {got}, expected {expected}. {self.remedy}.")

    def __getitem__(self, key: str) -> Node:
        """The value of a key that must be there."""
        if key not in self.mapping():
            raise InputError(f"{self.file} is damaged: {self.path}.{key} is missing. {self.remedy}.")
        return self._at(self.value[key], f".{key}")

    def get(self, key: str) -> Node | None:
        """The value of a key, `None` where it is not there."""
        return self[key] if key in self.mapping() else None

    def items(self) -> Iterator[tuple[str, Node]]:
        """The keys and values of an object."""
        return ((key, self[key]) for key in self.mapping())

    def elements(self) -> list[Node]:
        """The elements of an array."""
        if not isinstance(self.value, list | tuple):
            raise self.damage("an array")
        return [self._at(value, f"[{i}]") for i, value in enumerate(self.value)]

    def mapping(self) -> Mapping[str, Any]:
        """An object."""
        if not isinstance(self.value, dict):
            raise self.damage("an object")
        return self.value

    def text(self) -> str:
        """A string."""
        if not isinstance(self.value, str) or any("\ud800" <= c <= "\udfff" for c in self.value):
            raise self.damage("a string of Unicode characters")
        return self.value

    def boolean(self) -> bool:
        """`true` or `false`."""
        if not isinstance(self.value, bool):
            raise self.damage("true or false")
        return self.value

    def integer(self, least: int = 0) -> int:
        """An integer from `least` that an int64 holds."""
        if type(self.value) is not int or not least <= self.value < 2**63:
            raise self.damage(f"an integer from {least}")
        return self.value

    def number(self) -> float:
        """A finite number."""
        if type(self.value) not in (int, float) or not abs(self.value) <= sys.float_info.max:
            raise self.damage("a finite number")
        return float(self.value)

    def texts(self) -> tuple[str, ...]:
        """An array of strings."""
        return tuple(element.text() for element in self.elements())

    def integers(self, least: int = 0) -> tuple[int, ...]:
        """An array of integers from `least`."""
        return tuple(element.integer(least) for element in self.elements())

    def _at(self, value: Any, step: str) -> Node:
        return Node(value, self.file, self.path + step, self.remedy)


def parse_json(text: str | bytes, file: Path | str, remedy: str = Node.remedy) -> Node:
    """The JSON object in `text`, which came from `file`; no key may stand twice in an object."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
            raise ValueError(f"the key {twice!a} stands twice in an object")
        return found

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise InputError(f"{file} is damaged (it is nested too deeply). {remedy}.") from None
    except ValueError as error:
        raise InputError(f"{file} is damaged ({error}). {remedy}.") from None
    root = Node(value, file, remedy=remedy)
    root.mapping()
    return root


def read_json(file: Path | str, remedy: str = Node.remedy) -> Node:
    """The JSON object in a regular file."""
    return parse_json(read_regular(file), file, remedy)
