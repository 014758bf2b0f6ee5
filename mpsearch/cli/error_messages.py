"""What Hydra refuses, as one sentence for the user: what is wrong, near matches, how it is written.

Hydra's own messages take several lines and do not list the choices. To know these, a config is composed again without the wrong
word, for which Hydra has no public function: everything that depends on Hydra's internals is in this file.
"""

from __future__ import annotations

import difflib
import functools
import os
import re
import shlex
import sys
from collections.abc import Iterator
from typing import Any

from mpsearch.errors import InputError, did_you_mean, one_line
from mpsearch.files import file_sentence
from mpsearch.registry import must_be_given

CONF = "pkg://mpsearch.conf"


def sentence(error: Exception, command: str) -> str | None:
    """One sentence for an error of Hydra, with near matches; `None` for an error that is not the user's mistake."""
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    is_yaml = type(error).__module__.startswith("yaml.")
    if not (is_yaml or isinstance(error, (HydraException, OmegaConfBaseException, ValueError, OSError))):
        return None
    text, root = str(error), root_of(error)
    if isinstance(root, OSError) and root.filename is not None:  # Hydra makes the run's folder
        return file_sentence(root.filename, root, "used")
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return f"There is no {group or 'config'} '{name}'.{did_you_mean(name, _known(command, group=group))}"
    if isinstance(error, OverrideParseException):
        if "=" not in error.override:
            return f"'{error.override}' cannot be read: what is changed is written key=value."
        return f"{shlex.quote(error.override)} cannot be read. Quote special characters, as in 'pin=[\"conv1:w4|w8\"]'."
    if match := re.search(r"Missing mandatory value: (\S+)", str(root)):
        return must_be_given(match[1])
    if match := re.match(r"Could not override '(\S+?)'.*No match in the defaults list", text):
        return f"mpsearch {command} has no use for '{match[1]}'."
    if match := re.match(r"Could not override '(\S+)'", text):
        key, keys = match[1], _known(command, wrong_key=match[1])
        if (cost := key.removeprefix("budget.")) != key and cost in _known(command, group="cost"):
            return f"A budget on {cost} needs the cost: cost=[bytes,{cost}] {key}=VALUE."
        scheme = re.match(r"scheme\.([^.]+)\.", key)
        if scheme and f"scheme.{scheme[1]}" not in keys and scheme[1] in _known(command, group="scheme"):
            return f"'{scheme[1]}' is not among this run's schemes, so '{key}' cannot be set. Add it: scheme=[...,{scheme[1]}]"
        near = did_you_mean(key, difflib.get_close_matches(key, keys, cutoff=0.5) or {key for key in keys if "." not in key})
        adding = f" An argument of your own is added by +{key}=VALUE." if key.startswith(("model.", "task.")) else ""
        return f"There is no key '{key}'.{near}{adding}"
    if "Config group override must be a string or a list" in text:
        return "A choice must be a name or a list of names, as in scheme=[w4,w8]; got null."
    if match := re.match(r"Ambiguous value for argument '(\S+?)=(.*)'", text):
        key, values = match.groups()
        return f"{key} has several values: write '{key}=[{values}]' for a list, or add --multirun for a run with each."
    if match := re.match(r"Multiple values for (\S+)\. To override", text):
        return f"{match[1]} is chosen in the config file already; write {match[1]}=NAME to change it."
    return one_line(f"{text} {root}" if root is not error else text)


def _known(command: str, *, group: str | None = None, wrong_key: str = "") -> set[str]:
    """The possible choices: the options of a group, or all keys of the config without the wrong one."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.utils import create_config_search_path, get_args
    from hydra.core.config_search_path import SearchPathQuery
    from hydra.core.object_type import ObjectType
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    arguments = get_args(sys.argv[1:])
    name = arguments.config_name or command
    overrides = [word for word in arguments.overrides if word.partition("=")[0] != wrong_key]
    search_path = create_config_search_path(CONF)
    if arguments.config_dir:
        search_path.prepend("command-line", f"file://{os.path.abspath(arguments.config_dir)}", SearchPathQuery(provider="schema"))
    loader = ConfigLoaderImpl(search_path)
    if group is not None:
        options = loader.get_group_options(group, ObjectType.CONFIG, config_name=name, overrides=overrides)
        return {option for option in options if not option.startswith("_")}
    compose = functools.partial(loader.load_configuration, name, run_mode=RunMode.MULTIRUN, validate_sweep_overrides=False)
    try:
        config = compose(overrides)
    except HydraException:  # another word is wrong too
        config = compose([])
    return set(_dotted(OmegaConf.to_container(config))) - {"hydra"}


def _dotted(node: Any, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict) and key != "hydra":
            yield from _dotted(value, f"{prefix}{key}.")


def root_of(error: BaseException) -> BaseException:
    """The first error of a chain, or its first `InputError`."""
    return error if isinstance(error, InputError) or error.__cause__ is None else root_of(error.__cause__)
