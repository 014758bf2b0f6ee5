"""Which layers must share a scheme: those that a runtime runs as one, and those that the user ties together.

A pattern lists names with `|` between them. `*` stands for any text, the same in all of its layers: "*.q_proj|*.k_proj|*.v_proj"
ties q, k and v of each block, and no two blocks. `**` stands for any text that may differ: "*.experts.**" ties all layers of
all experts of each block, "layer1.**" all of layer1. Tied weights need no pattern: they are one layer.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from mpsearch.errors import InputError, did_you_mean
from mpsearch.layer import LayerSpec, kind_of

EXPERTS = "*.experts.**"  # one group for each block: a router sends too few calibration tokens to each of many experts
LISTED = 3  # of a group's other layers, in its name


def share(layers: Sequence[LayerSpec], patterns: Sequence[str], required: bool = True) -> tuple[LayerSpec, ...]:
    """`layers` with their `group` set by the patterns; layers that several patterns tie are all in one group.

    Raises `InputError` for a `required` pattern that ties no two layers.
    """
    root = {layer.name: layer.name for layer in layers}

    def find(name: str) -> str:
        while root[name] != name:
            name = root[name]
        return name

    tied: dict[str, str] = {}
    for layer in layers:  # what is tied already stays so
        root[layer.name] = tied.setdefault(layer.group, layer.name)
    for pattern in patterns:
        first: dict[tuple[str, ...], str] = {}
        ties = False
        for layer in layers:
            key = next((key for name in layer.modules if (key := _key(pattern, name)) is not None), None)
            if key is None:
                continue
            ties |= key in first
            root[find(layer.name)] = find(first.setdefault(key, layer.name))
        if required and not ties:
            known = [name for layer in layers for name in layer.modules]
            raise InputError(f"share '{pattern}' ties no two layers: * is the same text in all of them, ** any."
                             f"{did_you_mean(pattern.split('|')[0], known)}")  # fmt: skip
    members: dict[str, list[str]] = {}
    for layer in layers:
        members.setdefault(find(layer.name), []).append(layer.name)
    return tuple(replace(layer, group=_name(members[find(layer.name)])) for layer in layers)


def check_reached(model: nn.Module, layers: Sequence[LayerSpec], patterns: Sequence[str], runtime: str) -> None:
    """Raise `InputError` where a module that the patterns tie to `layers` is no layer, as an expert that no token was sent to."""
    reached = {name for layer in layers for name in layer.modules}
    unreached = [name for name, module in model.named_modules() if kind_of(module) is not None and name not in reached]
    for pattern in patterns:
        with_layers = {_key(pattern, name): name for name in reached}
        for name in unreached:
            if (key := _key(pattern, name)) is not None and key in with_layers:
                raise InputError(
                    f"{runtime} runs '{name}' and '{with_layers[key]}' as one, in one scheme, but the first calibration batch "
                    "does not reach the former, which stays float. Give larger batches, so that every expert gets a token."
                )


def _key(pattern: str, name: str) -> tuple[str, ...] | None:
    """The text that each `*` of the pattern stands for in the name; `None` where no part matches."""
    matches = (_compiled(part).fullmatch(name) for part in pattern.split("|") if part)
    return next((match.groups() for match in matches if match), None)


@functools.cache
def _compiled(part: str) -> re.Pattern[str]:
    pieces = {"**": ".*", "*": "(.*)"}
    return re.compile("".join(pieces.get(piece, re.escape(piece)) for piece in re.split(r"(\*\*|\*)", part)))


def _name(names: Sequence[str]) -> str:
    """ "blocks.0.q+k+v": the first layer's name and the last words of the others'."""
    others = [name.rpartition(".")[2] for name in names[1:]]
    return "+".join([names[0], *others] if len(others) <= LISTED else [names[0], f"{len(others)} more"])
