"""Watch a run from another terminal: its phase, the time left, and the front as far as it is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mpsearch.errors import InputError
from mpsearch.evaluation import Evaluation
from mpsearch.progress import Phase, read_phases
from mpsearch.runs.run import Run


@dataclass(frozen=True)
class Progress:
    """A run as it is now; `run` is `None` before the sensitivities are measured."""

    phases: tuple[Phase, ...]
    run: Run | None = None

    @property
    def n_evaluations(self) -> int:
        """How many there are so far."""
        return 0 if self.run is None else len(self.run.evaluations)

    @property
    def front(self) -> tuple[Evaluation, ...]:
        """Empty before the first evaluations."""
        return () if self.run is None else self.run.front

    @property
    def finished(self) -> bool:
        """Whether no phase is at work: the run is done, or was interrupted."""
        return bool(self.phases) and self.phases[-1].finished


def look(folder: Path) -> Progress:
    """The progress of the run in `folder`; nothing is locked or written. `InputError` where there is no run."""
    phases = tuple(read_phases(folder))
    if not phases and not (folder / "space.json").exists():
        raise InputError(f"{folder} is not a run folder: it has no space.json and no progress.json. Give that of a search.")
    try:
        run = Run.load(folder)
    except InputError:  # the sensitivities are not complete yet, or a row was being written
        return Progress(phases)
    return Progress(phases, run)


def watched(folder: Path, every_seconds: float) -> Iterator[Progress]:
    """The progress now and every so many seconds, until no phase is at work for as long as two looks."""
    idle = 0
    while True:
        now = look(folder)
        yield now
        idle = idle + 1 if now.finished else 0
        if idle > 1:
            return
        time.sleep(every_seconds)
