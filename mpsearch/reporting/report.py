"""The report of a run: its tables, figures and page, made from what lies in its folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from mpsearch.evaluation import Confirmed, Evaluation
from mpsearch.files import write_atomically
from mpsearch.files.csv_rows import write_rows
from mpsearch.progress import read_phases
from mpsearch.reporting.charts.interactions import draw_interactions
from mpsearch.reporting.charts.layers import draw_layers
from mpsearch.reporting.charts.pareto import draw_pareto
from mpsearch.reporting.charts.search import draw_search
from mpsearch.reporting.charts.sensitivity import draw_sensitivity
from mpsearch.reporting.markdown import page
from mpsearch.reporting.page.content import content
from mpsearch.reporting.page.document import document
from mpsearch.reporting.tables import confirm_table, front_table, read_confirm, uniform_table
from mpsearch.runs.left_out import read_left_out
from mpsearch.runs.run import Run
from mpsearch.runs.verified import Verified, read_verified

FIGURE = re.compile(r"(pareto|layers|sensitivity|interactions|search)(_[a-z_]+)?\.(png|svg|pdf)")


def write_report(
    run: Run, folder: Path, picked: Evaluation, confirmed: Sequence[Confirmed] | None = None, every_figure: bool = False
) -> Path:
    """Write `front.csv`, `uniform.csv`, `confirm.csv`, the figures, `index.html` and `report.md`; returns the path of the last.

    `confirmed` is what `confirm` measured; with `None` it is read from `confirm.csv`, if that exists. With `every_figure` each
    panel of a figure is a file of its own as well, and all are written as PNG, SVG and PDF, which takes several times as long.
    """
    tables = {"front": front_table(run), "uniform": uniform_table(run).drop(columns="scheme")}
    for name, table in tables.items():
        write_atomically(folder / f"{name}.csv", table.to_csv(index=False))
    if confirmed is not None:
        rows = confirm_table(run, confirmed)
        write_rows(folder / "confirm.csv", list(rows.columns), rows.values.tolist())
    figures = _draw(run, picked, folder, every_figure)
    file = folder / "report.md"
    compared, verified = read_confirm(run, folder), read_verified(folder, run.quality)
    write_atomically(file, page(run, picked, compared, figures, verified, read_left_out(folder)))
    _write_page(run, folder, picked, compared, verified)
    return file


def _draw(run: Run, picked: Evaluation, folder: Path, every: bool) -> list[str]:
    """Write the figures; returns their names. Those of an earlier report that show nothing any more are removed."""
    figures = [
        *draw_pareto(run, picked, folder, every),
        *draw_layers(run, picked, folder, every),
        *draw_sensitivity(run.sensitivity, folder, every),
        *draw_interactions(run.sensitivity, picked, folder, every),
        *draw_search(run, folder, every),
    ]
    for path in folder.iterdir():
        if FIGURE.fullmatch(path.name) and path.stem not in figures:
            path.unlink()
    return figures


def write_page(run: Run, folder: Path, picked: Evaluation) -> Path:
    """Write `index.html`, the page of the run as far as it is; returns its path."""
    return _write_page(run, folder, picked, read_confirm(run, folder), read_verified(folder, run.quality))


def _write_page(run: Run, folder: Path, picked: Evaluation, compared: pd.DataFrame | None, verified: Sequence[Verified]) -> Path:
    file = folder / "index.html"
    write_atomically(file, document(content(run, picked, folder, compared, verified, read_phases(folder))))
    return file
