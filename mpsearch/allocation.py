"""An allocation (group -> scheme name) and the space of all allocations.

An allocation holds names only, so that an old results table opens without our classes. In tables it is one character per
group, keyed by `space.json`: short, and of fixed width.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import math
import re
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from mpsearch.errors import InputError, did_you_mean
from mpsearch.layer import LayerGroup, LayerSpec
from mpsearch.runtimes.base import Runtime
from mpsearch.schemes.base import QuantScheme

ALPHABET = string.digits + string.ascii_letters + "_.:!?$%()*/[]^{|}~"  # no characters that CSV or HTML escapes


class Allocation(Mapping[str, str]):
    """Immutable, hashable mapping group -> scheme name; a group that is left out stays as it is in the model (float32)."""

    def __init__(self, schemes: Mapping[str, str] | Iterable[tuple[str, str]] = ()) -> None:
        self._schemes = dict(schemes)
        self._hash = hash(frozenset(self._schemes.items()))

    def __getitem__(self, group: str) -> str:
        return self._schemes[group]

    def __iter__(self) -> Iterator[str]:
        return iter(self._schemes)

    def __len__(self) -> int:
        return len(self._schemes)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Allocation) and self._schemes == other._schemes

    def __repr__(self) -> str:
        return f"Allocation({self._schemes})"

    def to_json(self) -> str:
        """One line of JSON, groups in their order."""
        return json.dumps(self._schemes, separators=(",", ":"))

    @property
    def id(self) -> str:
        """12 hex digits that tell this allocation from all others of a run: the first of its JSON's SHA-256."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]


@dataclass(frozen=True)
class SearchSpace:
    """All allocations: groups in forward order, schemes by name, and the schemes that each group may take.

    `other_bits` are the bits of all that is not searched: biases, norms, buffers, and weights kept float.
    """

    groups: tuple[LayerGroup, ...]
    schemes: Mapping[str, QuantScheme]
    choices: tuple[tuple[str, ...], ...]
    other_bits: int = 0

    @classmethod
    def build(
        cls,
        layers: Sequence[LayerSpec],
        schemes: Mapping[str, QuantScheme],
        pin: Sequence[str] = (),
        other_bits: int = 0,
        runtime: Runtime | None = None,
    ) -> SearchSpace:
        """Group `layers` by their `group`; a group may take what all of its layers may.

        `pin` restricts the choices: "stem|layer3.*:w4|w8", or "layer3.*:>=4" for all schemes of at least so many bits; later pins
        win, no match is an error. Left out: layers that a scheme does not take, what `runtime` cannot run (`None`: all runs), and
        schemes that no layer may take.
        """
        if not schemes:
            raise InputError("Got no scheme to choose from. Name at least one: 'scheme=[w4,w8]'.")
        if len(schemes) > len(ALPHABET):
            raise InputError(f"Got {len(schemes)} schemes; at most {len(ALPHABET)} can be searched at once.")
        members: dict[str, list[LayerSpec]] = {}
        for layer in layers:
            members.setdefault(layer.group, []).append(layer)
        groups = tuple(LayerGroup(name, tuple(group)) for name, group in members.items())
        pinned = {layer.name: (tuple(schemes), "") for layer in layers}
        for text in pin:
            pattern, names = _parse_pin(text, schemes)
            pinned.update(dict.fromkeys(_matched(text, pattern, groups), (names, text)))
        choices = tuple(_choices(group, schemes, pinned, runtime) for group in groups)
        used = {name for names in choices for name in names}
        return cls(groups, {name: s for name, s in schemes.items() if name in used}, choices, other_bits)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The groups' names."""
        return tuple(group.name for group in self.groups)

    @cached_property
    def layers(self) -> tuple[LayerSpec, ...]:
        """All searched layers."""
        return tuple(layer for group in self.groups for layer in group.layers)

    def layer_schemes(self, allocation: Mapping[str, str]) -> list[tuple[LayerSpec, str]]:
        """Each searched layer with the name of its scheme; layers of groups that the allocation leaves out are left out."""
        pairs = ((group, allocation.get(group.name)) for group in self.groups)
        return [(layer, scheme) for group, scheme in pairs if scheme is not None for layer in group.layers]

    @cached_property
    def scheme_names(self) -> tuple[str, ...]:
        """The schemes' names, in the order in which they were given."""
        return tuple(self.schemes)

    @cached_property
    def numel(self) -> int:
        """Number of searched weights."""
        return sum(group.numel for group in self.groups)

    @cached_property
    def storage_bits(self) -> np.ndarray:
        """int64 `[n_groups, n_schemes]`: the bits of each group in each scheme, allowed or not."""
        return np.array(
            [[sum(s.storage_bits(layer.shape) for layer in g.layers) for s in self.schemes.values()] for g in self.groups],
            dtype=np.int64,
        ).reshape(len(self.groups), len(self.schemes))

    @cached_property
    def allowed(self) -> np.ndarray:
        """bool `[n_groups, n_schemes]`: which scheme each group may take."""
        return np.array([[name in names for name in self.schemes] for names in self.choices], dtype=bool)

    @property
    def log10_combinations(self) -> float:
        """The number of allocations, as a power of ten."""
        return sum(math.log10(len(names)) for names in self.choices)

    def allocation(self, choice: Sequence[int] | np.ndarray) -> Allocation:
        """From scheme indices, one per group."""
        return Allocation(zip(self.names, (self.scheme_names[i] for i in choice), strict=True))

    def choice(self, allocation: Mapping[str, str]) -> np.ndarray:
        """intp `[n_groups]`: the inverse of `allocation`."""
        index = {name: i for i, name in enumerate(self.scheme_names)}
        return np.array([index[allocation[name]] for name in self.names], dtype=np.intp)

    def uniform(self, scheme: str) -> Allocation:
        """Every group in `scheme`, pinned groups in their own choice that comes nearest to it in size."""
        j = self.scheme_names.index(scheme)
        distance = np.where(self.allowed, np.abs(self.storage_bits - self.storage_bits[:, [j]]), np.iinfo(np.int64).max)
        distance[self.allowed[:, j], j] = -1  # the scheme itself, before others of its size
        return self.allocation(distance.argmin(axis=1))

    def size_bits(self, choice: np.ndarray | None = None) -> int:
        """Bits of all parameters and buffers under an allocation (scheme indices); `None`: the float model."""
        searched = 32 * self.numel if choice is None else int(self.storage_bits[np.arange(len(choice)), choice].sum())
        return searched + self.other_bits

    def encode(self, allocation: Allocation) -> str:
        """One character per group."""
        return "".join(ALPHABET[i] for i in self.choice(allocation))

    def decode(self, text: str) -> Allocation:
        """The inverse of `encode`; `ValueError` where the text does not fit this space."""
        index = [ALPHABET.find(c) for c in text]
        if len(text) != len(self.groups) or not all(0 <= i < len(self.schemes) for i in index):
            raise ValueError(f"'{text}' is no allocation of {len(self.groups)} groups and {len(self.schemes)} schemes")
        return self.allocation(index)

    def to_dict(self) -> dict[str, Any]:
        """The space as JSON-able data, schemes by their fields."""
        return {
            "schemes": {name: {"code": ALPHABET[i], **s.fields()} for i, (name, s) in enumerate(self.schemes.items())},
            "groups": [
                {"name": g.name, "choices": list(names), "layers": [_known(layer) for layer in g.layers]}
                for g, names in zip(self.groups, self.choices, strict=True)
            ],
            "other_bits": self.other_bits,
        }


def _known(layer: LayerSpec) -> dict[str, Any]:
    return {key: value for key, value in asdict(layer).items() if value is not None}


def _matches(pattern: str, name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, part) for part in pattern.split("|"))


def _matched(pin: str, pattern: str, groups: Sequence[LayerGroup]) -> list[str]:
    """The names of the layers whose own name, or their group's, matches the pin's pattern; `InputError` where none does."""
    names = [
        layer.name
        for group in groups
        for layer in group.layers
        if _matches(pattern, group.name) or any(_matches(pattern, name) for name in layer.modules)
    ]
    if not names:
        known = [name for group in groups for layer in group.layers for name in layer.modules]
        raise InputError(f"The pin '{pin}' matches no layer.{did_you_mean(pattern, known)}")
    return names


def _choices(
    group: LayerGroup,
    schemes: Mapping[str, QuantScheme],
    pinned: Mapping[str, tuple[tuple[str, ...], str]],
    runtime: Runtime | None,
) -> tuple[str, ...]:
    """The schemes that the pins allow for all layers of the group, and that the runtime runs."""
    pins = {pinned[layer.name] for layer in group.layers}
    left = tuple(name for name in schemes if all(name in names for names, _ in pins))
    if not left:
        said = " and ".join(f"'{text}'" for text in sorted(text for _, text in pins if text))
        raise InputError(
            f"The layers of '{group.name}' share a scheme, but the pins {said} allow them none in common. Pin them alike."
        )
    for layer in group.layers:
        takes = tuple(name for name in left if schemes[name].takes(layer.kind, layer.shape))
        if not takes:
            raise InputError(
                f"Layer '{layer.name}' ({layer.kind}) cannot be stored in any of {', '.join(left)}: only Linear layers can be "
                "rotated, and llama.cpp's formats take Linear layers and embeddings in rows of whole blocks (of 256 or 32). "
                "Add another scheme, such as fp16, or pin the layer to one."
            )
        left = takes
    if runtime is None:
        return left
    run = tuple(name for name in left if all(runtime.runs(layer, schemes[name]) for layer in group.layers))
    if not run:
        layer = next(la for la in group.layers if not all(runtime.runs(la, schemes[name]) for name in left))
        raise InputError(
            f"{runtime.name} is not known to run layer '{layer.name}' ({layer.kind}, {'x'.join(map(str, layer.shape))}) in "
            f"any of {', '.join(left)}; it runs {runtime.what}. Add such a scheme, or fp32, which leaves a layer float."
        )
    return run


def _parse_pin(text: str, schemes: Mapping[str, QuantScheme]) -> tuple[str, tuple[str, ...]]:
    pattern, colon, names = text.rpartition(":")
    if least := re.fullmatch(r">=\s*([0-9]+)", names.strip()):
        wide = tuple(name for name, scheme in schemes.items() if scheme.weight_bits >= int(least[1]))
        if not wide:
            raise InputError(f"The pin '{text}' asks for {least[1]} bits or more, which none of {', '.join(schemes)} has.")
        return pattern, wide
    chosen = tuple(name for name in names.split("|") if name)
    if not colon or not pattern or not chosen:
        raise InputError(f"A pin reads 'pattern:scheme', 'pattern:scheme|scheme' or 'pattern:>=bits'; got '{text}'.")
    for name in chosen:
        if name not in schemes:
            raise InputError(f"The pin '{text}' names a scheme '{name}' that is not searched.{did_you_mean(name, schemes)}")
    return pattern, tuple(name for name in schemes if name in chosen)
