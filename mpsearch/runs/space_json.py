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
from mpsearch.files import read_regular, write_atomically
from mpsearch.files.strict_json import JsonObject, parse
from mpsearch.layer import Activations, LayerGroup, LayerSpec
from mpsearch.schemes.base import QuantScheme, scheme_from_fields

DIGEST = "sha256"
REMEDY = "Restore it, or start a new run."
MOST_WEIGHTS = 2**40  # of one layer: sizes in bits then fit an int64


def write_identity(file: Path, identity: Mapping[str, Any]) -> None:
    """Write it with its digest; `InputError` for a number that is not finite, which JSON does not have."""
    try:
        digest = _digest(identity)
    except ValueError as error:
        raise InputError(f"A setting of this run cannot be written to {file}: {error}. Give finite numbers.") from None
    write_atomically(file, json.dumps({**identity, DIGEST: digest}, indent=1) + "\n")


def read_identity(file: Path) -> dict[str, Any]:
    """What `write_identity` wrote, without the digest; `InputError` where it is damaged."""
    root = JsonObject(parse(read_regular(file), file, REMEDY), file, REMEDY)
    _check(root)
    identity = {key: value for key, value in root.data.items() if key != DIGEST}
    if root.text(DIGEST) != _digest(identity):
        raise root.damaged(f"its contents do not match their {DIGEST}")
    return identity


def read_space(
    data: Mapping[str, Any], schemes: Mapping[str, QuantScheme] | None = None, file: Path | str = "space.json"
) -> SearchSpace:
    """The space that `SearchSpace.to_dict` wrote; `schemes` are needed only where some are not our own classes."""
    about = JsonObject(data, file, REMEDY, "space")
    known = about.object("schemes")
    if schemes is None:
        schemes = {name: _scheme(known.object(name)) for name in known.data}
    if missing := [name for name in known.data if name not in schemes]:
        raise known.damaged(f"the run's config has no scheme '{missing[0]}', only {', '.join(schemes)}")
    schemes = {name: schemes[name] for name in known.data}  # a runtime may have left some out
    groups, choices = [], []
    for group in about.objects("groups"):
        groups.append(LayerGroup(group.text("name"), tuple(_layer(layer) for layer in group.objects("layers"))))
        choices.append(group.texts("choices"))
        if not choices[-1] or not set(choices[-1]) <= set(schemes):
            raise group.damaged(f"'{group.place}.choices' must be some of {', '.join(schemes)}, got {', '.join(choices[-1])}")
    if not groups or len({group.name for group in groups}) < len(groups):
        raise about.damaged("'space.groups' must have different names")
    return SearchSpace(tuple(groups), schemes, tuple(choices), about.integer("other_bits"))


def _scheme(about: JsonObject) -> QuantScheme:
    about.text("class")
    try:
        return scheme_from_fields({key: value for key, value in about.data.items() if key != "code"})
    except (TypeError, AttributeError, KeyError) as error:
        raise about.damaged(f"'{about.place}' must have the fields of a scheme ({type(error).__name__}: {error})") from None


def _layer(about: JsonObject) -> LayerSpec:
    shape = about.integers("shape")
    if not 0 < math.prod(shape) < MOST_WEIGHTS:
        raise about.damaged(f"'{about.place}.shape' must be of 1 to {MOST_WEIGHTS:,} weights, got {list(shape)}")
    return LayerSpec(
        name=about.text("name"),
        kind=about.text("kind"),
        shape=shape,
        macs=about.integer("macs"),
        group=about.text("group"),
        modules=about.texts("modules"),
        activations=_activations(about.object("activations")) if "activations" in about.data else None,
    )


def _activations(about: JsonObject) -> Activations:
    return Activations(**{field.name: about.integer(field.name) for field in dataclasses.fields(Activations)})


def _check(root: JsonObject) -> None:
    """The types of what is read from it; only `space`, `quality_name` and `metric` are always there."""
    root.object("space")
    root.text("quality_name")
    metric = root.object("metric")
    metric.text("name")
    metric.text("unit")
    if "exact" in metric.data:
        metric.boolean("exact")
    checks: dict[str, Callable[[str], object]] = {
        "quality_kind": root.text,
        "divergence": lambda key: [root.object(key).text(name) for name in ("name", "label", "unit")],
        "model_name": root.text,
        "task_name": root.text,
        "exporter": root.text,
        "objectives": root.texts,
        "costs": root.texts,
        "cost_settings": lambda key: [root.object(key).object(name).text("class") for name in root.object(key).data],
        "budgets": lambda key: [root.object(key).number(name) for name in root.object(key).data],
        "data": root.mapping,
        "equalizer": lambda key: root.data[key] is None or root.object(key).text("class"),
        "trials": lambda key: root.object(key).integer("in_flight"),
    }
    for key in checks.keys() & root.data.keys():
        checks[key](key)


def _digest(identity: Mapping[str, Any]) -> str:
    text = json.dumps(identity, allow_nan=False)  # keys in their order, which numbers the schemes
    return hashlib.sha256(text.encode()).hexdigest()
