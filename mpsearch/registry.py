"""The registries: a choice's name -> its class and default arguments, from the packaged YAML files.

Each folder of `mpsearch/conf` is a registry: `conf/quantizer/gptq.yaml` makes "gptq" a quantizer. A file holds a *node*: the
class (`_target_`), its arguments, and `_partial_: true` where the object needs more than the file says. Adding a choice is one
class and one file. Python (`mpsearch.search(quantizer="gptq")`) and the command line build objects from the same nodes.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from importlib import resources
from typing import Any

import yaml

from mpsearch.errors import InputError, did_you_mean

Node = Mapping[str, Any]


def names(group: str) -> list[str]:
    """The choices of a registry, sorted; "custom" is not one."""
    files = resources.files("mpsearch.conf").joinpath(group).iterdir()
    return sorted({file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml")} - {"custom"})


@functools.cache
def node(group: str, name: str) -> Node:
    """The node of a choice; `InputError` with near matches where there is none of that name."""
    if name not in names(group):
        raise InputError(f"There is no {group} '{name}'.{did_you_mean(name, names(group))}")
    text = resources.files("mpsearch.conf").joinpath(group, f"{name}.yaml").read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    choice: Node = content[group][name] if "# @package _global_" in text else content
    return {key: value for key, value in choice.items() if key != "defaults"}  # which only the command line knows


def resolve(group: str, choice: Any, key: str = "", **extra: Any) -> Any:
    """The object of a choice: a name of the registry `group`, a node, or an object, which is returned as it is.

    Parameters
    ----------
    group : str
        The registry: "scheme", "quantizer", "metric", …
    choice : str, mapping or object
        What to build.
    key : str
        What error messages call it; the registry's name where it is not given.
    **extra
        Further arguments of the class.

    Raises
    ------
    InputError
        An unknown name or argument, a missing argument, or a class that cannot be imported or refuses its arguments.
    """
    if isinstance(choice, str):
        choice = node(group, choice)
    return build(choice, key or group, **extra) if isinstance(choice, Mapping) else choice


def fields_of(choice: Any) -> dict[str, Any]:
    """A choice as JSON: its class and, of a dataclass, its fields."""
    return {"class": type(choice).__name__, **(asdict(choice) if is_dataclass(choice) else {})}  # type: ignore[arg-type]


def recorded(group: str, about: Mapping[str, Any]) -> Any:
    """The object that a run recorded by `fields_of`; `InputError` where its class is not a packaged one.

    The record may come from anyone: only the registry says what is imported.
    """
    targets = {str(node(group, name)["_target_"]) for name in names(group)}
    target = next((target for target in targets if target.rpartition(".")[2] == about.get("class")), None)
    if target is None:
        raise InputError(f"The run used a {group} that mpsearch does not have ('{about.get('class')}'). Pass the object.")
    fields = {name: value for name, value in about.items() if name != "class" and not name.startswith("_")}
    return build({"_target_": target, **fields}, group)


def build(node: Any, key: str, /, **extra: Any) -> Any:
    """The object that a node describes; a function that takes the rest of the arguments where it says `_partial_: true`.

    See `resolve` for the errors; `key` is what they call the node.
    """
    target = node.get("_target_") if isinstance(node, Mapping) else None
    if not isinstance(target, str):
        raise InputError(f"{key} must be given: {key}=NAME, or {key}._target_=PACKAGE.NAME.")
    special = [name for name in node if name.startswith("_") and name not in ("_target_", "_partial_")]
    if special:
        raise InputError(f"{key} has the key '{special[0]}'; only _target_ and _partial_ have a meaning.")
    with _sentences(f"{key} ({target})"):
        function = locate(target)
    arguments = {name: _built(value, f"{key}.{name}") for name, value in node.items() if not name.startswith("_")}
    _check_arguments(function, key, arguments, extra, is_partial=bool(node.get("_partial_")))
    call = _sentences(f"{key} ({target})")(functools.partial(function, **arguments, **extra))
    return call if node.get("_partial_") else call()


def locate(path: str) -> Callable[..., Any]:
    """The class or function at a dotted path; `ImportError` where there is none."""
    parts = path.split(".")
    for n in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:n])
        try:
            imported: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # the module is there and imports one that is not
            continue
        try:
            return functools.reduce(getattr, parts[n:], imported)
        except AttributeError as error:
            raise ImportError(str(error)) from error
    raise ModuleNotFoundError(f"No module named '{parts[0]}'" if len(parts) > 1 else f"'{path}' is not PACKAGE.NAME")


def _built(value: Any, key: str) -> Any:
    """An argument: nodes within it become objects."""
    if isinstance(value, Mapping):
        return build(value, key) if "_target_" in value else {name: _built(item, f"{key}.{name}") for name, item in value.items()}
    return [_built(item, key) for item in value] if isinstance(value, list) else value


def _check_arguments(function: Any, key: str, given: Node, extra: Node, *, is_partial: bool) -> None:
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # some built-in functions have no signature
        return
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for name in given:
            if name not in parameters:
                known = [name for name in parameters if name not in extra]
                raise InputError(f"{key} has no argument '{name}'.{did_you_mean(name, known) if known else ''}")
    for name, p in () if is_partial else parameters.items():
        named = p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        if named and p.default is p.empty and name not in given and name not in extra:
            raise InputError(must_be_given(f"{key}.{name}", add="+"))


@contextmanager
def _sentences(what: str) -> Iterator[None]:
    """Errors of imports and arguments become an `InputError`; any other error is a bug and keeps its traceback."""
    try:
        yield
    except InputError:
        raise
    except (ImportError, ValueError, OSError, TypeError) as error:
        if isinstance(error, TypeError) and not re.search(r"abstract class|required positional|unexpected keyword", str(error)):
            raise
        failed = "cannot be imported" if isinstance(error, ImportError) else "cannot be built"
        message = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{what} {failed}: {message} (HYDRA_FULL_ERROR=1 shows where)") from error


def must_be_given(key: str, add: str = "") -> str:
    """The sentence for a missing value: how it is written."""
    last = key.rpartition(".")[2]
    is_path = last in ("run", "path", "file", "weights") or last.endswith(("_dir", "_path", "_file"))
    return f"{key} must be given: {add}{key}={'PACKAGE.NAME' if last == '_target_' else 'PATH' if is_path else 'VALUE'}"
