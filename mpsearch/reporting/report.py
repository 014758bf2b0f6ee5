"""The report of a run: its tables, figures and page, made from what lies in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mpsearch.evaluation import Confirmed, Evaluation
from mpsearch.files import write_atomically
from mpsearch.files.csv_rows import write_rows
from mpsearch.progress import read_phases
from mpsearch.reporting.charts.interactions import draw_interactions
from mpsearch.reporting.charts.layers import draw_layers
from mpsearch.reporting.charts.pareto import draw_pareto
from mpsearch.reporting.charts.sensitivity import draw_sensitivity
from mpsearch.reporting.markdown import page
from mpsearch.reporting.page.content import content
from mpsearch.reporting.page.document import document
from mpsearch.reporting.tables import confirm_table, front_table, read_confirm, uniform_table
from mpsearch.runs.run import Run
from mpsearch.runs.verified import read_verified


def write_report(run: Run, folder: Path, picked: Evaluation, confirmed: Sequence[Confirmed] | None = None) -> Path:
    """Write `front.csv`, `uniform.csv`, `confirm.csv`, the figures, `index.html` and `report.md`; returns the path of the last.

    `confirmed` is what `confirm` measured; with `None` it is read from `confirm.csv`, if that exists.
    """
    tables = {"front": front_table(run), "uniform": uniform_table(run).drop(columns="scheme")}
    for name, table in tables.items():
        write_atomically(folder / f"{name}.csv", table.to_csv(index=False))
    if confirmed is not None:
        rows = confirm_table(run, confirmed)
        write_rows(folder / "confirm.csv", list(rows.columns), rows.values.tolist())
    draw_sensitivity(run.sensitivity, folder)
    interacting = draw_interactions(run.sensitivity, picked, folder)
    draw_pareto(run, picked, folder)
    draw_layers(run, picked, folder)
    file = folder / "report.md"
    verified = read_verified(folder, run.quality)
    write_atomically(file, page(run, picked, read_confirm(run, folder), interacting, verified))
    write_page(run, folder, picked)
    return file


def write_page(run: Run, folder: Path, picked: Evaluation) -> Path:
    """Write `index.html`, the page of the run as far as it is; returns its path."""
    file = folder / "index.html"
    measured = read_confirm(run, folder), read_verified(folder, run.quality), read_phases(folder)
    write_atomically(file, document(content(run, picked, folder, *measured)))
    return file
