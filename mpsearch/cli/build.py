"""What a composed config becomes: plain settings, checked, and the objects that its nodes describe.

The commands see neither Hydra nor OmegaConf. Hydra's own `instantiate` would turn dataclasses among the arguments into configs,
wrap every error in its own, and tell a forgotten argument as a TypeError; here such mistakes are sentences that name the key.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from mpsearch.cli.error_messages import must_be_given, one_line, root_of
from mpsearch.errors import InputError, did_you_mean

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
        said = str(error.msg).splitlines()[0]
        if match := re.search(r"Missing mandatory value: (\S+)", said):  # another value is taken from the one that is missing
            raise InputError(must_be_given(match[1])) from error
        raise InputError(f"{must_be_given(str(error.full_key))} ({said})") from error


def check(settings: dict[str, Any]) -> None:
    """The plain values, before anything is loaded; objects check their own."""
    for name in COUNTS:
        value = settings.get(name, 0)
        if type(value) is not int or value < 0:
            raise InputError(f"{name} must be a whole number, 0 or more; '{value}' came.")
    for name in SWITCHES:
        if not isinstance(settings.get(name, True), bool):
            raise InputError(f"{name} must be true or false; '{settings[name]}' came.")
    for name in LINES:
        value = settings.get(name) or []
        if not isinstance(value, list) or not all(isinstance(line, str) for line in value):
            raise InputError(f"{name} is a list of lines, '{name}=[\"…\",\"…\"]'; '{value}' came.")
    seconds = settings.get("max_seconds")
    if seconds is not None and (type(seconds) not in (int, float) or not seconds > 0):
        raise InputError(f"max_seconds must be a number above 0, or null for no limit; '{seconds}' came.")
    for name in ("scheme", "cost") if "n_trials" in settings else ("scheme",):
        if not settings.get(name):
            raise InputError(f"{name} must be given: {name}=[NAME,...]")
    for name, quantizer in settings.get("quantizer_of", {}).items():
        if name not in settings["scheme"]:
            raise InputError(f"quantizer_of.{name}: this run has no scheme '{name}'.{did_you_mean(name, settings['scheme'])}")
        if not isinstance(quantizer, dict):
            raise InputError(
                f"quantizer_of.{name}: a config file names it in its defaults: quantizer@quantizer_of.{name}: {quantizer}"
            )


def build_object(config: DictConfig, key: str, /, **extra: Any) -> Any:
    """The object that `config[key]` describes ("model", "scheme.w4"), with `extra` arguments as they are.

    A node with `_partial_: true` comes back as a function that waits for the rest of its arguments.
    """
    import inspect

    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    node = OmegaConf.select(config, key)
    if not OmegaConf.is_dict(node) or "_target_" not in node:
        raise InputError(f"{key} must be given: {key}=NAME, or {key}._target_=PACKAGE.NAME.")
    attributes = {name: node[name] for name in ATTRIBUTES.get(key, ()) if node.get(name) is not None}
    node = OmegaConf.masked_copy(node, [name for name in node if name not in ATTRIBUTES.get(key, ())])
    with _sentences(f"{key} ({node._target_})"):
        # Collected here and called below: Hydra would turn dataclasses among the extra arguments into configs.
        deferred = instantiate(node, _partial_=True, _convert_="object")
    call = functools.partial(deferred.func, *deferred.args, **(deferred.keywords | extra))
    try:
        parameters = dict(inspect.signature(deferred.func).parameters)
        is_open = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    except ValueError:  # some built-in functions have no signature
        parameters, is_open = {}, True
    for name in [] if is_open else deferred.keywords:
        if name not in parameters:
            known = [name for name in parameters if name not in extra]
            raise InputError(f"{key} has no argument '{name}'.{did_you_mean(name, known) if known else ''}")
    for name, p in () if node.get("_partial_") or call.args else parameters.items():
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and name not in call.keywords:
            raise InputError(must_be_given(f"{key}.{name}", add="+"))
    finish = _sentences(f"{key} ({node._target_})")(call)
    if node.get("_partial_"):
        return finish
    built = finish()
    for name, value in attributes.items():
        setattr(built, name, value)
    return built


@contextlib.contextmanager
def _sentences(what: str) -> Iterator[None]:
    """What fails to import or refuses its arguments is the user's to mend; anything else is a bug and keeps its traceback."""
    from hydra.errors import InstantiationException

    users = (InstantiationException, ImportError, ValueError, OSError)
    try:
        yield
    except users as error:
        root = root_of(error)
        if isinstance(root, InputError) or not isinstance(root, users):
            raise root from None
        failed = "cannot be imported" if isinstance(root, ImportError) else "cannot be built"
        raise InputError(f"{what} {failed}: {one_line(root)} (HYDRA_FULL_ERROR=1 shows where)") from error
