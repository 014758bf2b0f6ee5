"""`mpsearch report`: draw a run again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from mpsearch.cli.show import paths, summary
from mpsearch.errors import InputError
from mpsearch.evaluation import Evaluation
from mpsearch.pipeline.pick import pick
from mpsearch.pipeline.prepare import Build, Settings
from mpsearch.reporting.report import write_report
from mpsearch.runs.run import Run
from mpsearch.schemes.base import QuantScheme


def report(settings: Settings, build: Build, folder: Path) -> None:
    """Draw the tables, figures and page again from what lies in the folder; nothing that the config names is built."""
    if "n_trials" not in settings:
        raise InputError(
            "This folder holds a sensitivity table alone; there is no front to report. Its chart is sensitivity.png."
        )
    result, picked, page = redraw(folder, pick)
    summary(result, picked)
    paths(folder, page, "pareto.png", "front.csv")


def redraw(
    folder: Path, choose: Callable[[Run], Evaluation], schemes: Mapping[str, QuantScheme] | None = None
) -> tuple[Run, Evaluation, Path]:
    """Load the run, write its report with the point that `choose` returns, without its lock: a search may be at work there.

    `confirm.csv` may then be newer than the evaluations that were read before it, so that they do not agree: where
    `evaluations.csv` grew meanwhile, all is read again.
    """
    file = folder / "evaluations.csv"
    while True:
        size = file.stat().st_size if file.exists() else 0
        try:
            result = Run.load(folder, schemes)
            picked = choose(result)
            return result, picked, write_report(result, folder, picked)
        except InputError:
            if (file.stat().st_size if file.exists() else 0) <= size:
                raise
