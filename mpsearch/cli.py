"""The front door: `mpsearch <command> [key=value ...]`, and the only file that imports Hydra and OmegaConf.

The first word is the command; the rest is Hydra's, composed from `conf/<command>.yaml`. What the user got wrong leaves as one
sentence with exit code 2. Everything heavy is imported late, so that `--help` and a typo answer at once.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import os
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mpsearch.errors import InputError, did_you_mean

if TYPE_CHECKING:
    from omegaconf import DictConfig

COMMANDS = {
    "search": "find how many bits each layer should get; go on with an interrupted run",
    "sensitivity": "measure how much each layer minds each scheme: the table and its chart",
    "report": "draw the tables, figures and page of a run again",
    "export": "write a point of a run's front to a file for another runtime",
}
USAGE = f"""\
usage: mpsearch <command> [key=value ...]

commands
{os.linesep.join(f"  {name:<12} {line}" for name, line in COMMANDS.items())}

examples
  mpsearch search
  mpsearch search model=resnet20 task=cifar10 task.data_dir=data/cifar10 n_trials=200 budget.bytes=120kB
  mpsearch search --multirun budget.bits=2.5,3,4 sampler=tpe,nsga2
  mpsearch search run=reports/<interrupted run>
  mpsearch export run=reports/<run> pick.max_bytes=120kB

mpsearch <command> --help lists all there is to choose from; --cfg job shows what would run.
eval "$(mpsearch -sc install=bash)" completes with the tab key (fish: install=fish)."""
CONF = "pkg://mpsearch.conf"
# What may differ from the saved config when a run goes on; anything else would change what its trials mean.
RESUMABLE = ("n_trials", "max_seconds", "device")
COUNTS = ("n_trials", "n_seeds", "seed")
SWITCHES = ("fold_batch_norms", "bias_correction")


@dataclass
class Job:
    """What `main` has to know of the run when it ends."""

    command: str
    wants_traceback: bool
    is_completion: bool = False
    resumed: bool = False
    started: bool = False
    failed: bool = False
    folder: Path | None = None


def main() -> None:
    """The console script."""
    words = sys.argv[1:] or ["--help"]
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing
    job = Job(words[0], wants_traceback=before == "1")
    try:
        _dispatch(job, words)
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        again = f" Go on with: mpsearch search {shlex.quote(f'run={os.path.relpath(job.folder)}')}" if job.folder else ""
        _say("interrupted." + again)
        sys.exit(130)
    except Exception as error:
        sentence = str(error) if isinstance(error, InputError) else _sentence(error, job)
        if sentence is None or job.wants_traceback:
            raise
        if not job.is_completion:
            _say(sentence)
        job.failed = True
    finally:
        os.environ.pop("HYDRA_FULL_ERROR") if before is None else os.environ.update(HYDRA_FULL_ERROR=before)
    if job.failed:
        sys.exit(2)


def _dispatch(job: Job, words: list[str]) -> None:
    if words[0] in ("-h", "--help", "--version"):
        print(_version() if words[0] == "--version" else USAGE, flush=True)
        return
    if words[0] in ("-sc", "--shell-completion"):
        words = _complete(words)
        if not words:
            return
        job.command, job.is_completion = words[0], True
    if job.command not in COMMANDS:
        raise InputError(f"There is no command '{job.command}'.{did_you_mean(job.command, COMMANDS)}")
    import hydra

    sys.path.insert(0, os.getcwd())  # where the user's own models and tasks are
    sys.argv = ["mpsearch", *_prepare(job, words[1:])]

    def task(config: DictConfig) -> None:
        _run(job, config)

    hydra.main(version_base="1.3", config_path=CONF, config_name=job.command)(task)()


def _complete(words: list[str]) -> list[str]:
    """Hydra's shell script knows no commands: complete them here, cut a complete one out of the line, and pass on."""
    if not any(word.startswith("query=") for word in words):
        return ["search", *words]  # install= and uninstall= print the same script for every command
    line = os.environ.get("COMP_LINE", "")
    typed = line.split()[1:]
    if not typed or (len(typed) == 1 and not line.endswith(" ")):
        print(" ".join(name for name in COMMANDS if name.startswith(typed[0] if typed else "")))
        return []
    if typed[0] not in COMMANDS:
        return []
    os.environ["COMP_LINE"] = re.sub(r"^(\s*\S+)\s+\S+", r"\1", line)
    return [typed[0], *words]


def _prepare(job: Job, words: list[str]) -> list[str]:
    """The user's words as Hydra needs them: `run=` leads to its folder, `quantizer_of.w2=x` is a choice from a config group."""
    overrides: list[str] = []
    flags: list[str] = []
    keys: list[str] = []
    run = None
    for word in words:
        key, equals, value = word.partition("=")
        key = key.lstrip("+")
        if not equals or word.startswith(("-", "~")):
            (overrides if word.startswith("~") else flags).append(word)
            continue
        if key in keys:
            raise InputError(f"'{key}' is given twice; give it once.")
        keys.append(key)
        if key == "run":
            if not _unquoted(value):
                raise InputError(_must_be_given("run"))
            run = None if value == "null" else Path(_unquoted(value)).expanduser().absolute()
        elif key == "quantizer_of":
            pairs = [pair.split(":") for pair in value.strip("{} ").split(",") if pair.strip()]
            if any(len(pair) != 2 for pair in pairs):
                raise InputError(f"'{word}' cannot be read: a quantizer for one scheme is written quantizer_of.w2=percentile.")
            overrides += [f"+quantizer@quantizer_of.{scheme.strip()}={name.strip()}" for scheme, name in pairs]
        elif match := re.fullmatch(r"quantizer_of\.([^.]+)", key):
            overrides.append(f"+quantizer@quantizer_of.{match[1]}={value}")
        else:
            overrides.append(word)
    is_sweep = any(word == "-m" or (len(word) > 3 and "--multirun".startswith(word)) for word in words)
    if is_sweep and (run or job.command in ("report", "export")):
        raise InputError("run= names one run, and --multirun starts many. Leave one of them out.")
    if run is None:
        return [*overrides, *flags]  # Hydra's parser knows no flag among the overrides
    saved = _saved(run)
    if job.command != "search":
        return [_run_option(run), *overrides, *flags]
    if "n_trials" not in saved:
        raise InputError(f"'{run}' is no run of mpsearch search, so there is nothing to go on with.")
    for key in keys:
        if key not in ("run", *RESUMABLE) and not key.startswith("hydra"):
            raise InputError(
                f"'{key}' cannot change when a run goes on; {', '.join(RESUMABLE)} can. Start a new run without run=."
            )
    job.resumed = True
    # The saved config takes the place of search.yaml, which is why --cfg job shows it too.
    hydra = ["hydra.job.name=search", "hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none"]
    folder = [_run_option(run), _run_option(run, "hydra.run.dir")]
    return [*folder, *hydra, *overrides, *flags, "--config-dir", str(run), "--config-name", "config"]


def _saved(run: Path) -> dict[str, Any]:
    """The config that a run was made with."""
    from omegaconf import OmegaConf

    path = run / "config.yaml"
    if not run.is_dir():
        raise InputError(f"There is no run folder '{run}'.")
    if not path.is_file():
        raise InputError(f"'{run}' has no config.yaml, so it is no run of mpsearch.")
    try:
        saved = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:
        raise InputError(f"'{path}' cannot be read, so the run cannot be used: {_one_line(error)}") from error
    if not isinstance(saved, dict) or not {"model", "task", "scheme"} <= saved.keys():
        raise InputError(f"'{path}' is not the config of a run: model, task or scheme is missing.")
    return cast(dict[str, Any], saved)


def _run(job: Job, config: DictConfig) -> None:
    """Hydra's task function: hands plain settings, a way to build their objects, and the run's folder to the command."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    if hydra.mode == RunMode.MULTIRUN:
        print(f"#{hydra.job.num}: {' '.join(hydra.overrides.task)}", flush=True)
    is_new = not any(folder.iterdir())
    job.started, job.folder = True, None
    try:
        settings = _settings(config)
        if job.command in ("report", "export"):
            settings = _saved(folder) | {key: value for key, value in settings.items() if value is not None}
        else:
            _check(settings)
            if not job.resumed and (folder / "config.yaml").exists():
                raise InputError(f"'{folder}' already holds a run. Go on with it by run=, or choose another folder.")
            _save(settings | ({"run": None} if "run" in settings else {}), folder / "config.yaml")
        job.folder = folder if job.command == "search" else None
        from mpsearch import commands

        getattr(commands, job.command)(settings, functools.partial(_build, OmegaConf.create(settings)), folder)
    except InputError as error:
        if job.wants_traceback:
            raise
        _say(str(error))
        job.failed = True  # not raised: the other runs of a --multirun go on
        if is_new and {path.name for path in folder.iterdir()} <= {"config.yaml"}:
            (folder / "config.yaml").unlink(missing_ok=True)
            folder.rmdir()


def _settings(config: DictConfig) -> dict[str, Any]:
    """The config as plain values, all of them given."""
    from omegaconf import OmegaConf
    from omegaconf.errors import InterpolationResolutionError

    try:
        for key in sorted(OmegaConf.missing_keys(config)):
            raise InputError(_must_be_given(key))
        return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    except InterpolationResolutionError as error:
        said = str(error.msg).splitlines()[0]
        if match := re.search(r"Missing mandatory value: (\S+)", said):  # another value is taken from the one that is missing
            raise InputError(_must_be_given(match[1])) from error
        raise InputError(f"{_must_be_given(str(error.full_key))} ({said})") from error


def _check(settings: dict[str, Any]) -> None:
    """The plain values, before anything is loaded; objects check their own."""
    for name in COUNTS:
        value = settings.get(name, 0)
        if type(value) is not int or value < 0:
            raise InputError(f"{name} must be a whole number, 0 or more; '{value}' came.")
    for name in SWITCHES:
        if not isinstance(settings.get(name, True), bool):
            raise InputError(f"{name} must be true or false; '{settings[name]}' came.")
    seconds = settings.get("max_seconds")
    if seconds is not None and (type(seconds) not in (int, float) or not seconds > 0):
        raise InputError(f"max_seconds must be a number above 0, or null for no limit; '{seconds}' came.")
    for name in ("scheme", "cost") if "n_trials" in settings else ("scheme",):
        if not settings.get(name):
            raise InputError(f"{name} must be given: {name}=[NAME,...]")
    for name, quantizer in settings["quantizer_of"].items():
        if name not in settings["scheme"]:
            raise InputError(f"quantizer_of.{name}: this run has no scheme '{name}'.{did_you_mean(name, settings['scheme'])}")
        if not isinstance(quantizer, dict):
            raise InputError(
                f"quantizer_of.{name}: a config file names it in its defaults: quantizer@quantizer_of.{name}: {quantizer}"
            )


def _save(settings: dict[str, Any], path: Path) -> None:
    from omegaconf import OmegaConf

    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(OmegaConf.to_yaml(OmegaConf.create(settings)), encoding="utf-8")
    os.replace(unfinished, path)


def _build(config: DictConfig, key: str, /, **extra: Any) -> Any:
    """The object that `config[key]` describes ("model", "scheme.w4"), with `extra` arguments as they are.

    A node with `_partial_: true` comes back as a function that waits for the rest of its arguments.
    """
    import inspect

    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    node = OmegaConf.select(config, key)
    if not OmegaConf.is_dict(node) or "_target_" not in node:
        raise InputError(f"{key} must be given: {key}=NAME, or {key}._target_=PACKAGE.NAME.")
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
            raise InputError(_must_be_given(f"{key}.{name}", add="+"))
    finish = _sentences(f"{key} ({node._target_})")(call)
    return finish if node.get("_partial_") else finish()


@contextlib.contextmanager
def _sentences(what: str) -> Iterator[None]:
    """What fails to import or refuses its arguments is the user's to mend; anything else is a bug and keeps its traceback."""
    from hydra.errors import InstantiationException

    users = (InstantiationException, ImportError, ValueError, OSError)
    try:
        yield
    except users as error:
        root = _root(error)
        if isinstance(root, InputError) or not isinstance(root, users):
            raise root from None
        failed = "cannot be imported" if isinstance(root, ImportError) else "cannot be built"
        raise InputError(f"{what} {failed}: {_one_line(root)} (HYDRA_FULL_ERROR=1 shows where)") from error


def _sentence(error: Exception, job: Job) -> str | None:
    """What Hydra refused, in one sentence with near matches; None for what is no mistake of the user's."""
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    is_yaml = type(error).__module__.startswith("yaml.")
    if job.started or not (is_yaml or isinstance(error, (HydraException, OmegaConfBaseException, ValueError, OSError))):
        return None
    text, root = str(error), _root(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        return f"There is no {group or 'config'} '{name}'.{did_you_mean(name, _known(job.command, group=group))}"
    if isinstance(error, OverrideParseException):
        if "=" not in error.override:
            return f"'{error.override}' cannot be read: what is changed is written key=value."
        return f"{shlex.quote(error.override)} cannot be read. Quote special characters, as in 'pin=[\"conv1:w4|w8\"]'."
    if match := re.search(r"Missing mandatory value: (\S+)", str(root)):
        return _must_be_given(match[1])
    if match := re.match(r"Could not override '(\S+?)'.*No match in the defaults list", text):
        return f"mpsearch {job.command} has no use for '{match[1]}'."
    if match := re.match(r"Could not override '(\S+)'", text):
        key, keys = match[1], _known(job.command, wrong_key=match[1])
        scheme = re.match(r"scheme\.([^.]+)\.", key)
        if scheme and f"scheme.{scheme[1]}" not in keys and scheme[1] in _known(job.command, group="scheme"):
            return f"'{scheme[1]}' is not among this run's schemes, so '{key}' cannot be set. Add it: scheme=[...,{scheme[1]}]"
        near = did_you_mean(key, difflib.get_close_matches(key, keys, cutoff=0.5) or {key for key in keys if "." not in key})
        adding = f" An argument of your own is added by +{key}=VALUE." if key.startswith(("model.", "task.")) else ""
        return f"There is no key '{key}'.{near}{adding}"
    if match := re.match(r"Ambiguous value for argument '(\S+?)=(.*)'", text):
        key, values = match.groups()
        return f"{key} has several values: write '{key}=[{values}]' for a list, or add --multirun for a run with each."
    if match := re.match(r"Multiple values for (\S+)\. To override", text):
        return f"{match[1]} is chosen in the config file already; write {match[1]}=NAME to change it."
    return _one_line(f"{text} {root}" if root is not error else text)


def _known(command: str, *, group: str | None = None, wrong_key: str = "") -> set[str]:
    """What the command line could have chosen from: a group's options, or all keys of the config without the wrong one."""
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


def _must_be_given(key: str, add: str = "") -> str:
    last = key.rpartition(".")[2]
    is_path = last in ("run", "path", "file", "weights") or last.endswith(("_dir", "_path", "_file"))
    return f"{key} must be given: {add}{key}={'PACKAGE.NAME' if last == '_target_' else 'PATH' if is_path else 'VALUE'}"


def _root(error: BaseException) -> BaseException:
    """Where a chain of errors began, or its first sentence for the user."""
    return error if isinstance(error, InputError) or error.__cause__ is None else _root(error.__cause__)


def _one_line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _run_option(run: Path, key: str = "run") -> str:
    """`run='...'` in Hydra's grammar."""
    return f"{key}='" + str(run).replace("\\", "\\\\").replace("'", "\\'") + "'"


def _unquoted(value: str) -> str:
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"mpsearch {version('mpsearch')}"
    except PackageNotFoundError:
        return "mpsearch, not installed"


def _say(text: str) -> None:
    print(f"mpsearch: {_one_line(text)}", file=sys.stderr)
