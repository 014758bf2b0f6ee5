"""The config in a run's folder: written whole, and read as data that may come from anyone.

Nothing that a saved config names is imported before it was compared with the packaged YAML files: a `_target_`, and any other key
that Hydra gives a meaning to, must be exactly what such a file has in that place. Anything else needs the user's `trust=true`.
"""

from __future__ import annotations

import functools
import io
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, cast

from mpsearch.errors import InputError, one_line
from mpsearch.files import read_regular, write_atomically

FILE = "config.yaml"
MAX_BYTES = 1_000_000
MAX_DEPTH = 20
NEVER = ("hydra", "defaults")  # would configure Hydra itself
PLAIN = (str, int, float, bool, type(None))

# (group, keys below a choice of it, joined by dots) -> special key -> its values in the packaged YAML files.
Table = Mapping[tuple[str, str], Mapping[str, Collection[Any]]]


def save(settings: dict[str, Any], folder: Path) -> None:
    """Write the config of a run, without what is never read back: the folder itself and the mirror."""
    from omegaconf import OmegaConf

    kept = dict(settings)
    if "run" in kept:
        kept["run"] = None
    if "study" in kept:
        kept["study"] = {**kept["study"], "mirror": None}
    for key, value in _leaves(kept):
        if isinstance(value, str) and "${" in value:
            raise InputError(f"{key} must not contain '${{', which a saved config cannot hold; got {value!r}.")
    write_atomically(folder / FILE, OmegaConf.to_yaml(OmegaConf.create(kept)))


def saved(run: Path) -> dict[str, Any]:
    """The config that a run was made with: plain values, none of them an interpolation."""
    path = run / FILE
    if not run.is_dir():
        raise InputError(f"There is no run folder '{run}'.")
    if not path.is_file():
        raise InputError(f"'{run}' has no {FILE}, so it is no run of mpsearch.")
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"'{path}' is larger than {MAX_BYTES:,} bytes, so it is not the config of a run.")
    try:
        config = _parse(read_regular(path).decode())
    except InputError as error:
        raise InputError(f"'{path}' is not a config that mpsearch saved: {error}") from error
    except Exception as error:  # a damaged YAML file can raise anything
        raise InputError(f"'{path}' cannot be read, so the run cannot be used: {one_line(error)}") from error
    if not isinstance(config, dict) or not {"model", "task", "scheme"} <= config.keys():
        raise InputError(f"'{path}' is not the config of a run: model, task or scheme is missing.")
    for key in (
        "model",
        "task",
        "scheme",
        "cost",
        "budget",
        "quantizer",
        "quantizer_of",
        "metric",
        "sampler",
        "study",
        "confirm",
    ):
        if not isinstance(config.get(key, {}), dict):
            raise InputError(f"'{path}' is not a config that mpsearch saved: {key} is no mapping.")
    return config


def require_trust(config: Mapping[str, Any], run: Path, command: str, words: Sequence[str]) -> None:
    """`InputError` where a saved config would run anything but mpsearch's own choices; it shows the command that allows that."""
    for key, value in sorted(_foreign(config, packaged())):
        raise InputError(
            f"'{run / FILE}' has {key}={_short(value)}, which no choice of mpsearch has: it would be run, or connected to. "
            f"If you trust whoever made this folder, type: {shlex.join(['mpsearch', command, *words, 'trust=true'])}"
        )


@functools.cache
def packaged() -> Table:
    """All special keys of the packaged YAML files."""
    import yaml

    table: dict[tuple[str, str], dict[str, list[Any]]] = {}
    for group in resources.files("mpsearch.conf").iterdir():
        for file in group.iterdir() if group.is_dir() else ():
            if not file.name.endswith(".yaml"):
                continue
            text = file.read_text(encoding="utf-8")
            config = yaml.safe_load(text) or {}
            choices = config.get(group.name, {}).values() if "# @package _global_" in text else [config]
            for choice in choices:
                for key, value in _leaves(choice):
                    place, _, last = key.rpartition(".")
                    if last.startswith("_") and value != "???":
                        table.setdefault((group.name, place), {}).setdefault(last, []).append(value)
    return table


def primary(command: str) -> set[str]:
    """The keys of a command's config, with those that it chooses from a group of its defaults."""
    import yaml

    config = yaml.safe_load(resources.files("mpsearch.conf").joinpath(f"{command}.yaml").read_text(encoding="utf-8"))
    chosen = {
        key for choice in config["defaults"] if isinstance(choice, dict) for key, value in choice.items() if value is not None
    }
    return {*config, *(key for key in chosen if not key.startswith("override "))} - {"defaults", "hydra"}


def _foreign(config: Mapping[str, Any], table: Table) -> Iterator[tuple[str, Any]]:
    """(key, value) of all that the packaged YAML files do not have in this place and that Hydra, or an executor, would act on."""
    for key, value in _leaves(config):
        words = key.split(".")
        special = next((i for i, word in enumerate(words) if word.startswith("_")), None)
        if special is not None:
            group, below = words[0], words[1:special]
            if group in ("scheme", "cost", "quantizer_of"):
                below = below[1:]
            known = table.get(("quantizer" if group == "quantizer_of" else group, ".".join(below)), {})
            if special < len(words) - 1 or value not in known.get(words[special], ()):
                yield key, value
        elif key == "executor.address" and value is not None:  # workers and their coordinator exchange pickles
            yield key, value


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of all that is no mapping and no list, and of empty ones."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        name = f"{prefix}{key}"
        if isinstance(value, dict | list) and value:
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value


def _parse(text: str) -> Any:
    """YAML as plain values. OmegaConf copies what an alias repeats, so that a few of them would take all memory."""
    import yaml
    from omegaconf import OmegaConf

    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise InputError(f"it is nested more than {MAX_DEPTH} deep.")
        if isinstance(event, yaml.AliasEvent):
            raise InputError("it has an alias.")
        if getattr(event, "tag", None) is not None:
            raise InputError("it has a tag.")
    config = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))
    for key, value in _leaves({"": config}):
        key = key.lstrip(".")
        if not isinstance(value, (*PLAIN, dict, list)) or not key.isprintable():
            raise InputError(f"{_short(key)} is no plain value.")
        if isinstance(value, str) and ("${" in value or value == "???"):
            raise InputError(f"{key} is {_short(value)}, no plain value.")
    if isinstance(config, dict) and (names := [name for name in NEVER if name in config]):
        raise InputError(f"it has the key '{names[0]}', which is never taken from there.")
    return cast(Any, config)


def _short(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 100 else f"{text[:100]}…"
