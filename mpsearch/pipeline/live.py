"""The report of a run in progress: written now and then, so that the search hardly waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from mpsearch.evaluation import Confirmed, Evaluation
from mpsearch.pipeline.pick import pick
from mpsearch.reporting.report import write_page, write_report
from mpsearch.runs.run import Run

REPORT_SECONDS = 60.0  # between two reports


class LiveReport:
    """Writes the report of what `record` returns to `folder`, where the last one is at least `REPORT_SECONDS` old."""

    def __init__(self, record: Callable[[], Run], folder: Path) -> None:
        self.record, self.folder = record, folder
        self._drawn = time.monotonic()

    def searched(self, evaluation: Evaluation) -> None:
        """After a trial: the page alone."""
        if self._is_due() and (run := self.record()).front:
            write_page(run, self.folder, pick(run))

    def confirmed(self, compared: Callable[[], Sequence[Confirmed]]) -> None:
        """After a point was confirmed: all of the report; `compared` returns the points so far."""
        if self._is_due():
            run = self.record()
            write_report(run, self.folder, pick(run), compared())

    def _is_due(self) -> bool:
        if time.monotonic() - self._drawn <= REPORT_SECONDS:
            return False
        self._drawn = time.monotonic()
        return True
