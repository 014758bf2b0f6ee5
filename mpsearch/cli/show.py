"""What the commands print: tables that keep their width in a file, and paths."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mpsearch.evaluation import Evaluation
from mpsearch.reporting.findings import non_inferior_sentence, times_sentence, warnings
from mpsearch.reporting.summary import summary_header, summary_rows
from mpsearch.runs.noninferiority import smallest_non_inferior
from mpsearch.runs.run import Run

FILE_WIDTH = 120


def stdout() -> Console:
    """Tables keep their width in a file or a pipe, where nobody knows how wide a line may be."""
    return Console(width=None if sys.stdout.isatty() else FILE_WIDTH)


def summary(result: Run, picked: Evaluation, max_drop: float | None = None) -> None:
    """Print the float model, the uniform allocations and the picked point as a table, and what the confirm split decided.

    `max_drop` is the margin that was asked for, `None`: the run's own.
    """
    table = Table(title=f"{len(result.front)} points on the front")
    for i, column in enumerate(summary_header(result)):
        table.add_column(column, justify="right" if i else "left", no_wrap=not i)
    for row in summary_rows(result, picked):
        table.add_row(*row)
    stdout().print(table)
    print(non_inferior_sentence(result, smallest_non_inferior(result, result.max_drop if max_drop is None else float(max_drop))))
    if said := times_sentence(result):
        print(said.strip())
    for warning in warnings(result):
        print(f"warning: {warning}")


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
