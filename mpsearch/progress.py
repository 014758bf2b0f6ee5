"""The progress of each phase that takes time, on stderr: a live bar on a terminal, else one line at its end.

Long phases write a line now and then in addition, so that a log file shows that they are alive. Results go to stdout.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mpsearch.errors import InputError
from mpsearch.files import is_locked, read_regular, write_atomically
from mpsearch.memory import watched

FILE = "progress.json"  # of a run's folder
RECORD_EVERY_SECONDS = 2.0
LOG_EVERY_SECONDS = 60.0  # where stderr is no terminal

console = Console(stderr=True)
_quiet = False
_bar: Progress | None = None


@dataclass
class Phase:
    """A phase of a run as `progress.json` records it: `done` of `total` steps after `seconds`, `left` more to be expected.

    `peak_bytes` is the most memory that the process held meanwhile (`mpsearch.memory.anonymous_bytes`), if it is known.
    """

    what: str
    total: int
    done: int = 0
    seconds: float = 0.0
    left: float | None = None
    note: str = ""
    finished: bool = False
    peak_bytes: int | None = None


class _Record:
    """Writes the phases of a run to a file, at most every `RECORD_EVERY_SECONDS` and at the end of each."""

    def __init__(self, file: Path) -> None:
        self.file, self.phases, self.written = file, read_phases(file.parent), 0.0
        for each in self.phases:  # of a process that was killed
            each.finished, each.left = True, None

    def hold(self, n_bytes: int) -> None:
        """Count memory for the phases that are not finished."""
        for each in self.phases:
            if not each.finished:
                each.peak_bytes = max(each.peak_bytes or 0, n_bytes)

    def write(self) -> None:
        """Replace the file; a run does not end because its progress cannot be written."""
        self.written = time.monotonic()
        with suppress(InputError):
            write_atomically(self.file, json.dumps([asdict(each) for each in self.phases]))


_record: _Record | None = None


@contextmanager
def recorded(folder: Path) -> Iterator[None]:
    """Write the phases inside the block to `progress.json` in the folder, after those of an interrupted run."""
    global _record
    before, _record = _record, _Record(folder / FILE)
    try:
        with watched(_record.hold):
            yield
    finally:
        _record = before


def read_phases(folder: Path) -> list[Phase]:
    """The phases in the folder's `progress.json`; none where there is no such file, or one that was not written by `recorded`.

    Where no process is at work in the folder, all are finished: the last one may have been interrupted.
    """
    file = folder / FILE
    if not file.exists():
        return []
    try:
        phases = [_phase(entry) for entry in json.loads(read_regular(file))]
    except (ValueError, TypeError, KeyError, InputError):
        return []
    if not is_locked(folder):
        for each in phases:
            each.finished, each.left = True, None
    return phases


def _phase(entry: Any) -> Phase:
    entry = {"peak_bytes": None, **entry}  # which older files lack
    numbers = [entry[name] for name in ("total", "done", "seconds")]
    if set(entry) != {f.name for f in fields(Phase)} or not all(type(x) in (int, float) for x in numbers):
        raise ValueError
    if not all(isinstance(entry[name], str) for name in ("what", "note")) or type(entry["left"]) not in (int, float, type(None)):
        raise ValueError
    if type(entry["peak_bytes"]) not in (int, type(None)):
        raise ValueError
    return Phase(**entry)


@contextmanager
def quiet() -> Iterator[None]:
    """Show no progress while the block runs: that of a worker is not of interest to its user."""
    global _quiet
    before, _quiet = _quiet, True
    try:
        yield
    finally:
        _quiet = before


_said: set[str] = set()


def say_once(sentence: str) -> None:
    """Write a sentence that a user should read, once in a process, next to the progress."""
    if not _quiet and sentence not in _said:
        _said.add(sentence)
        console.print(sentence, highlight=False, soft_wrap=True)


@contextmanager
def phase(what: str, total: int, done: int = 0, work: Sequence[float] | None = None) -> Iterator[Callable[[str], None]]:
    """Yield `advance(note)`, to be called after each of `total` steps; `done` of them were known before.

    `work`: how long each step will take compared with the others, by which the time left is estimated; `None`: all alike.
    """
    if _quiet:
        yield _silent
        return
    with _shown(what, total, done, work) as show, _noted(what, total, done, work) as note_step:

        def advance(note: str = "") -> None:
            show(note)
            note_step(note)

        yield advance


@contextmanager
def _shown(what: str, total: int, done: int, work: Sequence[float] | None) -> Iterator[Callable[[str], None]]:
    """The phase on stderr."""
    sizes = _sizes(total - done, work)
    if console.is_terminal:
        with _display() as bar:
            task = bar.add_task(what, total=total, completed=done, note="")

            def advance(note: str = "") -> None:
                bar.update(task, advance=next(sizes), note=note)

            yield advance
    else:
        log = _Log(what, total, done, sizes)
        yield log.advance
        log.write()


@contextmanager
def _noted(what: str, total: int, done: int, work: Sequence[float] | None) -> Iterator[Callable[[str], None]]:
    """The phase in `progress.json`, where a run is recorded."""
    if _record is None:
        yield _silent
        return
    record, start, sizes, size_done = _record, time.monotonic(), _sizes(total - done, work), 0.0
    entry = Phase(what, total, done)
    record.phases.append(entry)
    record.write()

    def advance(note: str = "") -> None:
        nonlocal size_done
        entry.done, entry.note, size_done = entry.done + 1, note, size_done + next(sizes, 1.0)
        entry.seconds = time.monotonic() - start
        entry.left = entry.seconds / size_done * max(total - done - size_done, 0.0)
        if time.monotonic() - record.written >= RECORD_EVERY_SECONDS:
            record.write()

    yield advance
    entry.seconds, entry.left, entry.finished = time.monotonic() - start, None, True
    record.write()


@contextmanager
def _display() -> Iterator[Progress]:
    """The live display; a phase inside another one adds a row to it."""
    global _bar
    if _bar is not None:
        yield _bar
        return
    left = TimeRemainingColumn(elapsed_when_finished=True)
    columns = [TextColumn("{task.description:<14}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), left]
    try:
        with Progress(*columns, TextColumn("{task.fields[note]}"), console=console, speed_estimate_period=600) as _bar:
            yield _bar
    finally:
        _bar = None


def _sizes(n: int, work: Sequence[float] | None) -> Iterator[float]:
    """The size of each of `n` steps, 1 on average."""
    if work is None or not sum(work):
        return itertools.repeat(1.0)
    return iter([n * each / sum(work) for each in work])


def _silent(note: str = "") -> None:
    pass


class _Log:
    """Lines of a phase: how far it is, how fast, and how long it will still take."""

    def __init__(self, what: str, total: int, done: int, sizes: Iterator[float]) -> None:
        self.what, self.total, self.done, self.n = what, total, done, done
        self.sizes, self.size_done = sizes, 0.0
        self.start = self.last = time.monotonic()
        self.note = ""

    def advance(self, note: str = "") -> None:
        """Count a step."""
        self.n, self.note, self.size_done = self.n + 1, note, self.size_done + next(self.sizes)
        if time.monotonic() - self.last >= LOG_EVERY_SECONDS and self.n < self.total:
            per_size = (time.monotonic() - self.start) / self.size_done
            self.write(f", {per_size * (self.total - self.done - self.size_done):.0f} s left")

    def write(self, left: str = "") -> None:
        """Write a line, with the time left while the phase runs."""
        self.last = time.monotonic()
        line = f"{self.what}: {self.n}/{self.total} in {self.last - self.start:.1f} s{left} {self.note}"
        console.print(line.rstrip(), highlight=False, soft_wrap=True)
