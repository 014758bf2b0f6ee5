"""When a run with `max_seconds` should end, and what it leaves out to end then.

What a step takes is estimated from the steps before it. Sensitivities (from fewer passes), the uniform allocations and the
expected pick are always measured, however late it is.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path

from mpsearch.progress import say_once
from mpsearch.runs.left_out import write_left_out

SEARCH_SHARE = 0.5  # of the time left after the sensitivities, for trials and their references; the rest is for confirming


class Deadline:
    """The end of a run that began now.

    Parameters
    ----------
    seconds
        From now; `None`: there is no end.
    clock
        Says how many seconds it is.
    """

    def __init__(self, seconds: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.clock = seconds, clock
        self.end = math.inf if seconds is None else clock() + seconds
        self._left_out: list[str] = []

    @property
    def left(self) -> float:
        """Seconds until the end; negative after it, infinite without one."""
        return self.end - self.clock()

    def part(self, share: float) -> Deadline:
        """An earlier end, after this share of the time that is left now; what it leaves out is left out of both."""
        part = copy.copy(self)
        part.end = self.end if self.seconds is None else self.end - (1 - share) * max(self.left, 0.0)
        return part

    def affordable(self, n: int, seconds: float) -> int:
        """How many of `n` steps of so many seconds end in time."""
        return n if self.seconds is None else min(n, max(0, int(self.left / max(seconds, 1e-9))))

    def leave_out(self, what: str) -> None:
        """Record what is not done because time is short, as in "63 of 100 trials"."""
        self._left_out.append(what)

    def sentence(self) -> str:
        """What was left out; empty where nothing was."""
        if not self._left_out:
            return ""
        return f"To end within max_seconds={self.seconds:g}, the run left out {', '.join(self._left_out)}."

    def record(self, folder: Path) -> None:
        """Say what was left out, and keep it in the run's folder for the report."""
        if self.sentence():
            say_once(self.sentence())
        write_left_out(folder, self.sentence())
