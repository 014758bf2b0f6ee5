"""What the commands print: tables and paths."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from mpsearch.evaluation import Evaluation
from mpsearch.pipeline.watch import Progress
from mpsearch.reporting.summary import Summary, summary
from mpsearch.reporting.tables import evenly
from mpsearch.runs.run import Run

FILE_WIDTH = 120
SCREEN = 25  # lines
OPTIONAL = (2, 4, 8, 5, 6)  # columns of the summary, left out in this order where the screen is narrow: bits of all, loss, …


def stdout() -> Console:
    """A console whose tables have a fixed width in a file or a pipe."""
    return Console(width=None if sys.stdout.isatty() else FILE_WIDTH)


def print_summary(
    run: Run, picked: Evaluation, folder: Path | None = None, max_drop: float | None = None, said: Sequence[str] = ()
) -> None:
    """Print the lines `said` and what `mpsearch.reporting.summary` says of a run, on one screen.

    What does not fit is left out: columns that are too many for the width, uniform allocations between the smallest and the
    largest, and the ends of sentences, which the page has in full.
    """
    about, console = summary(run, picked, folder, max_drop), stdout()
    wanted, total = [*said, *about.lines, *about.steps], len(about.rows)
    for n_rows in range(total, min(total, 4) - 1, -1):  # float, the smallest, the largest, picked
        table = _table(about, sorted({0, total - 1, *_spread(n_rows - 2, total - 2)}), console)
        n_left = SCREEN - len(console.render_lines(table, console.options))
        if _height(wanted, console.width) <= n_left:
            break
    for line in said:
        print(line)
    console.print(table)
    n_left -= _height([*said, *about.steps], console.width)
    for line in about.lines:
        shown = _cut(line, n_left, console.width)
        n_left -= _height([shown], console.width)
        if shown:
            print(shown)
    for line in about.steps:
        print(line)


def _table(about: Summary, rows: Sequence[int], console: Console) -> Table:
    """The table of a summary with these of its rows, without columns that make it wider than the console."""
    for n_left_out in range(len(OPTIONAL) + 1):
        table = Table(title=about.title)
        kept = [i for i in range(len(about.header)) if i not in OPTIONAL[:n_left_out]]
        for i in kept:
            table.add_column(about.header[i], justify="right" if i else "left", no_wrap=not i)
        for row in rows:
            table.add_row(*(about.rows[row][i] for i in kept))
        if Measurement.get(console, console.options.update(width=1000), table).maximum <= console.width:
            break
    return table


def _spread(n: int, total: int) -> list[int]:
    """`n` of the rows 1 to `total`, evenly spread."""
    return [1 + round(i * (total - 1) / max(n - 1, 1)) for i in range(n)]


def _height(lines: Sequence[str], width: int) -> int:
    """How many lines of the screen the terminal wraps these to."""
    return sum(max(1, -(-cell_len(line) // width)) for line in lines if line)


def _cut(line: str, n_lines: int, width: int) -> str:
    """The line, or as much of it as `n_lines` of the screen hold."""
    if _height([line], width) <= n_lines:
        return line
    end = " … (see report.md)"
    return "" if n_lines < 1 else line[: max(n_lines * width - len(end), 0)].rsplit(" ", 1)[0] + end


def path_lines(folder: Path, page: Path, *names: str) -> list[str]:
    """Where the page and other files of a folder lie, a line each."""
    return [relative(path) for path in (page, *(folder / name for name in names))]


def paths(folder: Path, page: Path, *names: str) -> None:
    """Print where the page and other files of a folder lie."""
    for line in path_lines(folder, page, *names):
        print(line)


def relative(path: Path) -> str:
    """As seen from the working directory, where it lies below it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def progress_lines(now: Progress) -> list[str]:
    """The phase at work with the time left, and how far the front is."""
    lines = ["no phase has begun"]
    if now.phases:
        last = now.phases[-1]
        left = "" if last.left is None or now.finished else f", {last.left:.0f} s left"
        latest = f"; latest: {last.note}" if last.note else ""
        lines = [f"{last.what}: {last.done} of {last.total} in {last.seconds:.0f} s{left}{latest}"]
        if now.finished:
            lines.append("no phase is at work: the run is finished, or was interrupted")
    if now.front:
        sizes = f"{now.front[0].size_bytes:,} to {now.front[-1].size_bytes:,} bytes"
        lines.append(f"{now.n_evaluations} evaluations, {len(now.front)} points on the front, {sizes}")
    return lines


def progress_table(now: Progress) -> Table:
    """At most twelve points of the front, evenly spread, on the search split."""
    table = Table(title="front so far, on the search split")
    if now.run is None:
        return table
    quality = now.run.quality
    for column in ("bits per weight", "bytes", f"loss: {now.run.loss_label}", quality.label):
        table.add_column(column, justify="right")
    for e in (now.front[i] for i in evenly(len(now.front), 12)):
        table.add_row(f"{e.average_bits:.2f}", f"{e.size_bytes:,}", f"{e.loss:.4g}", quality.text(e.quality))
    return table
