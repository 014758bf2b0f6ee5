"""`space.json`: what was searched, on which model and data, under a SHA-256 of its contents."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mpsearch.allocation import SearchSpace
from mpsearch.errors import InputError
from mpsearch.files import write_atomically
from mpsearch.json_files import Node, read_json
from mpsearch.layer import Activations, LayerGroup, LayerSpec
from mpsearch.schemes.base import QuantScheme, scheme_from_fields

DIGEST = "sha256"
MOST_WEIGHTS = 2**40  # of one layer: sizes in bits then fit an int64


def write_identity(file: Path, identity: Mapping[str, Any]) -> None:
    """Write it with its digest."""
    write_atomically(file, json.dumps({**identity, DIGEST: _digest(identity)}, indent=1) + "\n")


def read_identity(file: Path) -> dict[str, Any]:
    """What `write_identity` wrote, without the digest; `InputError` where it is damaged."""
    root = read_json(file)
    _check(root)
    identity = {key: value for key, value in root.mapping().items() if key != DIGEST}
    if root[DIGEST].text() != _digest(identity):
        raise InputError(f"{file} is damaged: its contents do not match their {DIGEST}. {root.remedy}.")
    return identity


def read_space(
    data: Mapping[str, Any], schemes: Mapping[str, QuantScheme] | None = None, file: Path | str = "space.json"
) -> SearchSpace:
    """The space that `SearchSpace.to_dict` wrote; `schemes` are needed only where some are not our own classes."""
    node = Node(data, file, "$.space")
    if schemes is None:
        schemes = {name: _scheme(fields) for name, fields in node["schemes"].items()}
    missing = [name for name in node["schemes"].mapping() if name not in schemes]
    if missing:
        raise node["schemes"].damage(f"schemes of the run's config: {', '.join(schemes)}")
    schemes = {name: schemes[name] for name in node["schemes"].mapping()}  # a runtime may have left some out
    groups, choices = [], []
    for group in node["groups"].elements():
        groups.append(LayerGroup(group["name"].text(), tuple(_layer(layer) for layer in group["layers"].elements())))
        choices.append(group["choices"].texts())
        if not choices[-1] or not set(choices[-1]) <= set(schemes):
            raise group["choices"].damage(f"some of {', '.join(schemes)}")
    if not groups or len({group.name for group in groups}) < len(groups):
        raise node["groups"].damage("groups of different names")
    return SearchSpace(tuple(groups), schemes, tuple(choices), node["other_bits"].integer())


def _scheme(node: Node) -> QuantScheme:
    fields = {key: value for key, value in node.mapping().items() if key != "code"}
    node["class"].text()
    try:
        return scheme_from_fields(fields)
    except (TypeError, AttributeError, KeyError) as error:
        raise node.damage(f"the fields of a scheme ({type(error).__name__}: {error})") from None


def _layer(node: Node) -> LayerSpec:
    shape = node["shape"].integers(least=1)
    if math.prod(shape) >= MOST_WEIGHTS:
        raise node["shape"].damage(f"fewer than {MOST_WEIGHTS:,} weights")
    return LayerSpec(
        name=node["name"].text(),
        kind=node["kind"].text(),
        shape=shape,
        macs=node["macs"].integer(),
        group=node["group"].text(),
        modules=node["modules"].texts(),
        activations=_activations(node["activations"]) if "activations" in node.mapping() else None,
    )


def _activations(node: Node) -> Activations:
    return Activations(**{field.name: node[field.name].integer() for field in dataclasses.fields(Activations)})


def _check(root: Node) -> None:
    """The types of what is read from it; only `space`, `quality_name` and `metric` are always there."""
    root["space"].mapping()
    root["quality_name"].text()
    metric = root["metric"]
    metric["name"].text()
    metric["unit"].text()
    checks: dict[str, Callable[[Node], object]] = {
        "quality_kind": Node.text,
        "divergence": lambda node: [node[key].text() for key in ("name", "label", "unit")],
        "model_name": Node.text,
        "task_name": Node.text,
        "objectives": Node.texts,
        "costs": Node.texts,
        "budgets": lambda node: [limit.number() for _, limit in node.items()],
        "data": lambda node: [description.text() for _, description in node.items()],
        "equalizer": lambda node: node.value is None or node["_target_"].text(),
        "trials": lambda node: node["in_flight"].integer(least=1),
    }
    for key in checks.keys() & root.mapping().keys():
        checks[key](root[key])
    if "exact" in metric.mapping():
        metric["exact"].boolean()


def _digest(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
