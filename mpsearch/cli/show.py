"""What the commands print: tables and paths."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mpsearch.evaluation import Evaluation
from mpsearch.reporting.summary import summary
from mpsearch.runs.run import Run

FILE_WIDTH = 120


def stdout() -> Console:
    """A console whose tables have a fixed width in a file or a pipe."""
    return Console(width=None if sys.stdout.isatty() else FILE_WIDTH)


def print_summary(run: Run, picked: Evaluation, folder: Path | None = None, max_drop: float | None = None) -> None:
    """Print what `mpsearch.reporting.summary` says of a run: a table, and the sentences and commands after it."""
    about = summary(run, picked, folder, max_drop)
    table = Table(title=about.title)
    for i, column in enumerate(about.header):
        table.add_column(column, justify="right" if i else "left", no_wrap=not i)
    for row in about.rows:
        table.add_row(*row)
    stdout().print(table)
    for line in about.lines:
        print(line)


def paths(folder: Path, page: Path, *names: str) -> None:
    """Print where the page and other files of a folder lie."""
    for path in (page, *(folder / name for name in names)):
        print(relative(path))


def relative(path: Path) -> str:
    """As seen from the working directory, where it lies below it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
