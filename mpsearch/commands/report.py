"""`mpsearch report`: draw a run again."""

from __future__ import annotations

from pathlib import Path

from mpsearch.commands.prepare import Build, Settings
from mpsearch.commands.show import paths, summary
from mpsearch.errors import InputError
from mpsearch.pick import pick
from mpsearch.report import write_report
from mpsearch.result import SearchResult


def report(settings: Settings, build: Build, folder: Path) -> None:
    """Draw the tables, figures and page again from what lies in the folder; nothing that the config names is built."""
    if "n_trials" not in settings:
        raise InputError(
            "This folder holds a sensitivity table alone; there is no front to report. Its chart is sensitivity.png."
        )
    result = SearchResult.load(folder)
    picked = pick(result)
    page = write_report(result, folder, picked)
    summary(result, picked)
    paths(folder, page, "pareto.png", "front.csv")
