"""The progress of each phase that takes time, on stderr: a live bar on a terminal, else one line at its end.

Long phases write a line now and then in addition, so that a log file shows that they are alive. Results go to stdout.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LOG_EVERY_SECONDS = 60.0  # where stderr is no terminal

console = Console(stderr=True)
_quiet = False
_bar: Progress | None = None


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
    sizes = _sizes(total - done, work)
    if _quiet:
        yield _silent
    elif console.is_terminal:
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
