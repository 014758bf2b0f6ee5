"""What a composed config becomes: plain settings, checked, and the objects that its nodes describe.

The commands see neither Hydra nor OmegaConf: objects are built by `mpsearch.registry`, as they are for Python.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from mpsearch.errors import InputError, check_integer, did_you_mean
from mpsearch.registry import build, must_be_given

if TYPE_CHECKING:
    from omegaconf import DictConfig

COUNTS = ("n_trials", "n_seeds", "seed")
LINES = ("pin", "share")
SWITCHES = ("fold_batch_norms", "bias_correction")
ATTRIBUTES = {"task": ("divergence",)}  # keys that are set on the object, whatever its class takes


def plain_settings(config: DictConfig) -> dict[str, Any]:
    """The config as plain values, all of them given."""
    from omegaconf import OmegaConf
    from omegaconf.errors import InterpolationResolutionError

    try:
        for key in sorted(OmegaConf.missing_keys(config)):
            raise InputError(must_be_given(key))
        return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    except InterpolationResolutionError as error:
        message = str(error.msg).splitlines()[0]
        if match := re.search(r"Missing mandatory value: (\S+)", message):  # another value refers to the missing one
            raise InputError(must_be_given(match[1])) from error
        raise InputError(f"{must_be_given(str(error.full_key))} ({message})") from error


def check(settings: Mapping[str, Any]) -> None:
    """The plain values, before anything is loaded; objects check their own."""
    for name in COUNTS:
        check_integer(name, settings.get(name, 0), 0)
    for name in SWITCHES:
        if not isinstance(settings.get(name, True), bool):
            raise InputError(f"{name} must be true or false; got '{settings[name]}'.")
    for name in LINES:
        value = settings.get(name) or []
        if not isinstance(value, list) or not all(isinstance(line, str) for line in value):
            raise InputError(f"{name} must be a list of texts, '{name}=[\"…\",\"…\"]'; got '{value}'.")
    seconds = settings.get("max_seconds")
    if seconds is not None and (type(seconds) not in (int, float) or not seconds > 0):
        raise InputError(f"max_seconds must be a number above 0, or null for no limit; got '{seconds}'.")
    for name in ("scheme", "cost") if "n_trials" in settings else ("scheme",):
        if not settings.get(name):
            raise InputError(f"{name} must be given: {name}=[NAME,...]")
    if not isinstance(settings.get("budget", {}), Mapping):
        raise InputError(f"A budget needs its unit: budget.bytes=120kB, budget.bits=3, …; got budget={settings['budget']}.")
    for name, quantizer in settings.get("quantizer_of", {}).items():
        if name not in settings["scheme"]:
            raise InputError(f"quantizer_of.{name}: this run has no scheme '{name}'.{did_you_mean(name, settings['scheme'])}")
        if not isinstance(quantizer, dict):
            raise InputError(
                f"quantizer_of.{name}: a config file names it in its defaults: quantizer@quantizer_of.{name}: {quantizer}"
            )


def build_object(settings: Mapping[str, Any], key: str, /, **extra: Any) -> Any:
    """The object that `settings[key]` describes ("model", "scheme.w4"), with `extra` arguments; see `mpsearch.registry.build`."""
    node: Any = settings
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    attributes = {name: node[name] for name in ATTRIBUTES.get(key, ()) if isinstance(node, Mapping) and name in node}
    if attributes:
        node = {name: value for name, value in node.items() if name not in attributes}
    built = build(node, key, **extra)
    for name, value in attributes.items():
        if value is not None:
            setattr(built, name, value)
    return built
