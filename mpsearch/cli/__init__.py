"""The command line: `mpsearch <command> [key=value ...]`. This package is the only one that imports Hydra and OmegaConf.

The first word is the command; the rest is composed by Hydra from `conf/<command>.yaml`. A user's mistake ends in one sentence
with exit code 2. `arguments` handles the words before Hydra composes, `build` the settings after it, `error_messages` what Hydra
refuses, `commands` the calls of the public API. Everything heavy is imported late, so that `--help` and a typo answer at once.
"""

from __future__ import annotations

import functools
import itertools
import os
import shlex
import signal
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mpsearch.cli.arguments import Arguments, complete, prepare
from mpsearch.cli.build import build_object, check, plain_settings
from mpsearch.cli.error_messages import CONF, sentence
from mpsearch.cli.saved_config import FILE, save
from mpsearch.errors import InputError, did_you_mean, memory_errors, one_line, run_option
from mpsearch.files import LOCK, locked

if TYPE_CHECKING:
    from omegaconf import DictConfig

COMMANDS = {
    "search": "find how many bits each layer should get; go on with an interrupted run",
    "sensitivity": "measure the sensitivity of each layer to each scheme: the table and its chart",
    "hardware": "say what this machine's kernels run, test them, and measure each layer in each scheme",
    "solve": "solve a finished run for another budget, or for an accuracy drop, and confirm it",
    "finetune": "train a point of a finished run as it is stored (quantization-aware), and score it again",
    "report": "draw the tables, figures and page of a run again; compare runs: run=[a,b,c]",
    "watch": "show the phase, the time left and the front of a run in progress",
    "export": "write a point of a run's front to a file for another runtime",
    "verify": "open an exported point in its runtime, and measure it there",
}
SAVING = ("search", "sensitivity", "hardware")  # make a run, whose config is saved
USAGE = f"""\
usage: mpsearch <command> [key=value ...]

commands
{os.linesep.join(f"  {name:<12} {line}" for name, line in COMMANDS.items())}

examples
  mpsearch search
  mpsearch search model=resnet20 task=cifar10 task.data_dir=data/cifar10 budget.bytes=120kB
  mpsearch search --multirun budget.bits=2.5,3,4 sampler=tpe,nsga2
  mpsearch search run=reports/<interrupted run>
  mpsearch export run=reports/<run> pick.max_bytes=120kB

mpsearch <command> --help lists all there is to choose from; --cfg job shows what would run.
eval "$(mpsearch -sc install=bash)" completes with the tab key (fish: install=fish)."""


class Terminated(KeyboardInterrupt):
    """SIGTERM was received: everything that an interrupt closes is closed."""


@dataclass
class Job:
    """The state of a call that `main` needs when it ends."""

    command: str
    wants_traceback: bool
    is_completion: bool = False
    words: Arguments = field(default_factory=lambda: Arguments([]))
    started: bool = False
    failed: bool = False
    swept: list[Path] = field(default_factory=list)  # folders of the finished runs of a --multirun in this process
    again: str = ""  # the command that resumes the run
    process: int = field(default_factory=os.getpid)


def main() -> None:
    """The console script."""
    # PyTorch's OpenMP threads would spin for milliseconds after each operation, on cores that the kernels need. Read when torch
    # is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    # OpenBLAS's would do the same between the small matrices of the surrogate; on a busy machine it takes 30 times as long.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("PYTHONSAFEPATH", "1")  # worker processes do not import from the working directory first either
    words = sys.argv[1:] or ["--help"]
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing
    job = Job(words[0], wants_traceback=before == "1")
    try:
        with _terminable():
            _dispatch(job, words)
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt as end:
        is_terminated = isinstance(end, Terminated)
        _say(f"{'terminated' if is_terminated else 'interrupted'}.{job.again and f' Resume with: {job.again}'}")
        sys.exit(143 if is_terminated else 130)
    except Exception as error:
        said = str(error) if isinstance(error, InputError) else None if job.started else sentence(error, job.command)
        if said is None or job.wants_traceback:
            raise
        if not job.is_completion:
            _say(said)
        job.failed = True
    finally:
        os.environ.pop("HYDRA_FULL_ERROR") if before is None else os.environ.update(HYDRA_FULL_ERROR=before)
    if job.failed:
        sys.exit(2)


def _dispatch(job: Job, words: list[str]) -> None:
    if words[0] in ("-h", "--help", "--version"):
        print(_version() if words[0] == "--version" else USAGE, flush=True)
        return
    leave_working_directory()
    if words[0] in ("-sc", "--shell-completion"):
        words = complete(words, COMMANDS)
        if not words:
            return
        job.command, job.is_completion = words[0], True
    if job.command not in COMMANDS:
        raise InputError(f"There is no command '{job.command}'.{did_you_mean(job.command, COMMANDS)}")
    import hydra

    if {"-h", "--help"} & set(words[1:]):
        print(settings_text(job.command), flush=True)  # Hydra prints the settings without what they mean
    job.words = prepare(job.command, words[1:])
    if job.words.runs:
        _compare(job.words.runs, Path("reports") / f"comparison-{time.strftime('%Y%m%d_%H%M%S')}")
        return
    sys.argv = ["mpsearch", *job.words.overrides]

    def task(config: DictConfig) -> None:
        _run(job, config)

    hydra.main(version_base="1.3", config_path=CONF, config_name=job.command)(task)()
    if job.command == "search" and len(job.swept) > 1:
        try:
            _compare(job.swept, job.swept[0].parent)
        except InputError as error:  # a sweep over tasks, say
            print(f"not compared: {one_line(error)}", flush=True)


def _compare(folders: list[Path], target: Path) -> None:
    """Compare runs, and print where the comparison lies."""
    from mpsearch.cli import commands

    commands.compare(folders, target)


def _run(job: Job, config: DictConfig) -> None:
    """Hydra's task function: passes plain settings, a function that builds their objects, and the run's folder to the command."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    hydra = HydraConfig.get()
    # Not resolved: a folder may be named ${...}.
    folder = job.words.run or Path(cast(Any, OmegaConf.to_container(hydra.runtime, resolve=False))["output_dir"])
    if hydra.mode == RunMode.MULTIRUN:
        print(f"#{hydra.job.num}: {' '.join(hydra.overrides.task)}", flush=True)
    if job.words.own_code:  # after Hydra looked for its plugins, and last, so that nothing there stands for an installed package
        sys.path.append(os.getcwd())
    job.started, job.again = True, ""
    try:
        with _saved(job, config, folder) if job.command in SAVING else nullcontext(_merged(job, config)) as settings:
            from mpsearch.cli import commands

            with memory_errors(), _messages():
                getattr(commands, job.command)(settings, functools.partial(build_object, settings), folder)
                if hydra.mode == RunMode.MULTIRUN:
                    job.swept.append(folder)
    except InputError as error:
        if job.wants_traceback:
            raise
        _say(str(error))
        job.failed = True  # not raised: the other runs of a --multirun go on
        if os.getpid() != job.process:  # of a launcher, which hands it to where `main` is
            raise


def _merged(job: Job, config: DictConfig) -> dict[str, Any]:
    """The settings of the run, replaced by those that are given now."""
    run, own = job.words.config or {}, plain_settings(config)
    given = {key: value for key, value in own.items() if value is not None}
    if "cost" in given:  # the run's own costs are as they were
        given["cost"] |= run.get("cost", {})
    settings = own | run | given
    check(settings)
    return settings


@contextmanager
def _saved(job: Job, config: DictConfig, folder: Path) -> Iterator[dict[str, Any]]:
    """The settings, saved in the folder, which is locked meanwhile. A mistake leaves no new folder behind."""
    with locked(folder):
        is_new = {path.name for path in folder.iterdir()} <= {LOCK}
        try:
            settings = plain_settings(config)
            check(settings)
            if not job.words.resumed and (folder / FILE).exists():
                raise InputError(f"'{folder}' already holds a run. Resume it by run=, or choose another folder.")
            save(settings, folder)
            if job.command == "search":
                mirror = settings["study"]["mirror"]
                if mirror:
                    print("study.mirror is not saved: give it again when the run is resumed.", flush=True)
                job.again = " ".join(
                    ["mpsearch search", run_option(folder), *([shlex.quote(f"study.mirror={mirror}")] if mirror else [])]
                )
            yield settings
        except InputError:
            if is_new and {path.name for path in folder.iterdir()} <= {FILE, LOCK}:
                for name in (FILE, LOCK):
                    (folder / name).unlink(missing_ok=True)
                folder.rmdir()
            raise


@contextmanager
def _messages() -> Iterator[None]:
    """While the block runs, what mpsearch logs is printed."""
    import logging

    logger, handler = logging.getLogger("mpsearch"), logging.StreamHandler(sys.stdout)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the block as an interrupt does."""

    def end(*_: Any) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def settings_text(command: str) -> str:
    """The settings of a command with their meanings and defaults, as its file in `conf/` has them."""
    lines = resources.files("mpsearch.conf").joinpath(f"{command}.yaml").read_text(encoding="utf-8").splitlines()
    own = itertools.takewhile(lambda line: not line.startswith("hydra:"), lines)
    return "\n".join(line for line in own if "_self_" not in line and " override hydra/" not in line)


def leave_working_directory() -> None:
    """Remove the working directory from `sys.path`, where Python or PYTHONPATH put it: its files may come from anyone."""
    directory = os.path.realpath(os.getcwd())
    if directory not in map(os.path.realpath, (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))):
        sys.path[:] = [path for path in sys.path if os.path.realpath(path) != directory]


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"mpsearch {version('mpsearch')}"
    except PackageNotFoundError:
        return "mpsearch, not installed"


def _say(text: str) -> None:
    print(f"mpsearch: {one_line(text)}", file=sys.stderr)
