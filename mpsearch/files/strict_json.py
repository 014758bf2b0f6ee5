"""JSON from files that may be damaged or crafted: every fault is one `InputError` that names the file and the place."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpsearch.errors import InputError

LARGEST = 2**63 - 1


class DamagedFileError(InputError):
    """The content of a file is not what was written."""


def damaged(path: Path | str, what: object, remedy: str) -> DamagedFileError:
    """The sentence for a file at `path`."""
    return DamagedFileError(f"{path} is damaged or was edited: {what}. {remedy}")


def canonical(data: Any) -> str:
    """The one text of JSON-able data: sorted keys, no spaces; `ValueError` for NaN and infinities."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def parse(text: str | bytes, path: Path | str, remedy: str) -> Any:
    """Read JSON; refused are repeated keys, numbers that are not finite, integers beyond 64 bits, and nesting without end."""
    try:
        return json.loads(
            text if isinstance(text, str) else text.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except ValueError as error:  # also UnicodeDecodeError and JSONDecodeError, which tells line and column
        raise damaged(path, error, remedy) from None
    except RecursionError:
        raise damaged(path, "its JSON is nested too deeply", remedy) from None


class JsonObject:
    """A JSON object inside the file at `path`, at the `place` "layers.conv1"; typed access."""

    def __init__(self, data: Any, path: Path | str, remedy: str, place: str = "") -> None:
        self.path, self.remedy, self.place = path, remedy, place
        if not isinstance(data, dict):
            raise self.damaged(f"{place or 'the file'} must be a JSON object, got {_short(data)}")
        self.data: dict[str, Any] = data

    def damaged(self, what: object) -> DamagedFileError:
        """The sentence for a fault in this file."""
        return damaged(self.path, what, self.remedy)

    def only(self, required: Sequence[str], optional: Sequence[str] = ()) -> None:
        """Refuse missing and unknown keys."""
        if missing := [key for key in required if key not in self.data]:
            raise self.damaged(f"'{self._at(missing[0])}' is missing")
        if unknown := set(self.data) - {*required, *optional}:
            raise self.damaged(f"'{self._at(min(unknown))}' is unknown")

    def object(self, key: str) -> JsonObject:
        """The object at `key`."""
        return JsonObject(self._get(key), self.path, self.remedy, self._at(key))

    def objects(self, key: str) -> list[JsonObject]:
        """The list of objects at `key`."""
        values = self._checked(key, lambda value: type(value) is list, "a list of objects")
        return [JsonObject(value, self.path, self.remedy, f"{self._at(key)}[{i}]") for i, value in enumerate(values)]

    def text(self, key: str) -> str:
        """The string at `key`."""
        self._checked(key, lambda value: type(value) is str, "a string")
        # Half of a surrogate pair, by which no file can be named.
        return self._checked(key, lambda text: not any("\ud800" <= c <= "\udfff" for c in text), "a string of Unicode characters")

    def boolean(self, key: str) -> bool:
        """`true` or `false` at `key`."""
        return self._checked(key, lambda value: type(value) is bool, "true or false")

    def number(self, key: str) -> float:
        """The finite number at `key`."""
        return float(self._checked(key, lambda x: type(x) in (int, float) and math.isfinite(x), "a finite number"))

    def integer(self, key: str) -> int:
        """The integer at `key`, 0 or more."""
        return self._checked(key, _is_size, "an integer, 0 or more")

    def texts(self, key: str) -> tuple[str, ...]:
        """The list of strings at `key`, none of them twice."""
        values = self._checked(key, _is_list_of(lambda value: type(value) is str), "a list of strings")
        return tuple(self._checked(key, lambda _: len(set(values)) == len(values), "a list of different strings"))

    def integers(self, key: str) -> tuple[int, ...]:
        """The list of integers, 0 or more, at `key`."""
        return tuple(self._checked(key, _is_list_of(_is_size), "a list of integers, 0 or more"))

    def pairs(self, key: str) -> list[tuple[str, str]]:
        """The list of pairs of strings at `key`."""
        is_text = _is_list_of(lambda value: type(value) is str)
        values = self._checked(key, _is_list_of(lambda pair: is_text(pair) and len(pair) == 2), "a list of pairs of strings")
        return [(one, other) for one, other in values]

    def mapping(self, key: str) -> Mapping[str, str]:
        """The object of strings at `key`."""
        self.object(key)
        return self._checked(key, lambda data: all(type(value) is str for value in data.values()), "an object of strings")

    def _get(self, key: str) -> Any:
        if key not in self.data:
            raise self.damaged(f"'{self._at(key)}' is missing")
        return self.data[key]

    def _checked(self, key: str, is_right: Callable[[Any], bool], expected: str) -> Any:
        value = self._get(key)
        if not is_right(value):
            raise self.damaged(f"'{self._at(key)}' must be {expected}, got {_short(value)}")
        return value

    def _at(self, key: str) -> str:
        return f"{self.place}.{key}" if self.place else key


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_list_of(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: type(value) is list and all(map(is_right, value))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key '{next(key for key in keys if keys.count(key) > 1)}' appears twice")
    return data


def _integer(text: str) -> int:
    if len(text) > 20 or abs(int(text)) > LARGEST:
        raise ValueError(f"the integer {text[:20]}… does not fit in 64 bits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is not finite")
    return value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
