"""One line for each phase that takes time: what, how far, how fast, how long still. Goes to stderr; results go to stdout."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

console = Console(stderr=True)

_quiet = False


@contextmanager
def quiet() -> Iterator[None]:
    """No phase shows while the block runs: a worker's are not its user's."""
    global _quiet
    before, _quiet = _quiet, True
    try:
        yield
    finally:
        _quiet = before


# Where stderr is a file, a line now and then instead of one that redraws.
LOG_EVERY_SECONDS = 10.0


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.finished_speed or task.speed or 0:.1f}/s")


@contextmanager
def phase(what: str, total: int, done: int = 0) -> Iterator[Callable[[str], None]]:
    """Yields `advance(note)`, to be called after each of `total` steps; `done` of them were found on disk."""
    if _quiet:

        def silent(note: str = "") -> None:
            pass

        yield silent
        return
    if not console.is_terminal:
        yield from _logged(what, total, done)
        return
    columns = [
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    ]
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=total, completed=done, note="")

        def advance(note: str = "") -> None:
            bar.update(task, advance=1, note=note)

        yield advance


def _logged(what: str, total: int, done: int) -> Iterator[Callable[[str], None]]:
    start = last = time.monotonic()
    n = done

    def advance(note: str = "") -> None:
        nonlocal n, last
        n += 1
        now = time.monotonic()
        if now - last >= LOG_EVERY_SECONDS or n == total:
            last = now
            rate = (n - done) / max(now - start, 1e-9)
            console.print(f"{what}: {n}/{total}, {rate:.1f}/s, {max(total - n, 0) / rate:.0f} s left {note}", highlight=False)

    yield advance
