"""The tables of a run as tidy data frames: one row per measurement, one column per variable."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mpsearch.allocation import Allocation
from mpsearch.errors import run_option
from mpsearch.evaluation import Confirmed, Evaluation, SensitivityTable
from mpsearch.files.csv_rows import Row, read_rows
from mpsearch.intervals import is_approximate
from mpsearch.runs.evaluation_rows import SCORED, evaluation_columns, evaluation_row
from mpsearch.runs.noninferiority import smallest_non_inferior
from mpsearch.runs.run import Run

SIZES = ("size_bytes", "average_bits", "average_bits_all")
TIMES = ("measured_ms", "measured_ms_low", "measured_ms_high")
DROPS = ("drop", "drop_low", "drop_high")
STATEMENTS = ("approximate", "verified", "non_inferior", "dominated_by_bytes", "significantly_dominated")


def evenly(n: int, most: int) -> list[int]:
    """The indices of n rows, or of `most` of them, evenly spread, the first and the last included."""
    return list(range(n)) if n <= most else np.linspace(0, n - 1, most).round().astype(int).tolist()


def evaluations_table(run: Run) -> pd.DataFrame:
    """All evaluations in the order measured, with the columns of `evaluations.csv`.

    An allocation is one character per group, the code of its scheme in `space.json`.
    """
    rows = [evaluation_row(e, run.space, run.quality_name, run.costs) for e in run.evaluations]
    return pd.DataFrame(rows, columns=list(evaluation_columns(run.quality_name, run.costs)))


def sensitivity_table(table: SensitivityTable) -> pd.DataFrame:
    """One row per group and scheme that it may take: `group`, `scheme`, `metric`, `value`, `size_bits`."""
    space = table.space
    rows = [
        (space.names[i], space.scheme_names[j], table.metric, float(table.values[i, j]), int(space.storage_bits[i, j]))
        for i, j in np.argwhere(space.allowed)
    ]
    return pd.DataFrame(rows, columns=["group", "scheme", "metric", "value", "size_bits"])


def front_table(run: Run, points: Sequence[Evaluation] | None = None) -> pd.DataFrame:
    """One row per point of the front and split (search and, where measured, confirm), with the columns of `front.csv`.

    `points` are evaluations on the search split to list instead of the front. Allocations are JSON.
    """
    confirmed, q = run.on("confirm"), run.quality_name
    columns = [*SIZES, *run.costs, "loss", q, f"{q}_low", f"{q}_high", *TIMES, "split", "allocation"]
    pairs = [(e, confirmed.get(e.allocation)) for e in (run.front if points is None else points)]
    rows = [_values(run, e) for pair in pairs for e in pair if e is not None]
    return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(TIMES, float))


def uniform_table(run: Run) -> pd.DataFrame:
    """The same for the uniform allocations, with their `scheme`."""
    tables = [front_table(run, [e]).assign(scheme=scheme) for scheme, e in run.uniform]
    return pd.concat(tables, ignore_index=True) if tables else front_table(run, []).assign(scheme="")


def trained_table(run: Run) -> pd.DataFrame:
    """One row per finetuned point and split: costs, `loss` and quality, and the same two before training (`…_before`)."""
    q = run.quality_name
    rows = [
        {**_values(run, after), "loss_before": before.loss, f"{q}_before": before.quality}
        for split in SCORED
        for allocation, after in run.finetuned(split).items()
        if (before := run.on(split).get(allocation)) is not None
    ]
    return pd.DataFrame(rows, columns=[*SIZES, *run.costs, "split", "loss", "loss_before", q, f"{q}_before"])


def confirm_columns(quality_name: str) -> tuple[str, ...]:
    """The columns of `confirm.csv`."""
    return ("scheme", *SIZES, "loss", quality_name, *DROPS, *STATEMENTS, "allocation")


def confirm_table(run: Run, confirmed: Iterable[Confirmed]) -> pd.DataFrame:
    """Each confirmed point's drop from the float model with its paired interval, and what dominates it there.

    `non_inferior` is "yes" for the points that passed the test of `runs.noninferiority`, "no" for the one that ended it, and
    empty for those that were not tested.
    """
    tested = _tested(run)
    rows = [
        {
            **_values(run, c.evaluation),
            "scheme": c.scheme or "",
            **dict(zip(DROPS, (c.drop, c.drop_low, c.drop_high), strict=True)),
            "approximate": is_approximate(c.evaluation.n_samples),
            "verified": c.evaluation.verified,
            "non_inferior": tested.get(c.evaluation.allocation, "") if c.scheme is None else "",
            "dominated_by_bytes": c.dominated_by.size_bytes if c.dominated_by else None,
            "significantly_dominated": c.significantly_dominated,
        }
        for c in confirmed
    ]
    return pd.DataFrame(rows, columns=list(confirm_columns(run.quality_name)), dtype=object)


def read_confirm(run: Run, folder: Path) -> pd.DataFrame | None:
    """The table of `confirm.csv`, `None` where there is none.

    Raises `InputError` for a damaged file, and for a row that is not an evaluation of `run` on the confirm split.
    """
    file, columns = folder / "confirm.csv", confirm_columns(run.quality_name)
    if not file.exists():
        return None
    measured = {e.allocation.to_json(): e for e in run.on("confirm").values()}

    def parse(row: Row) -> tuple[Any, ...]:
        e = measured[row.one_of("allocation", list(measured))]
        known = {column: value for column, value in _values(run, e).items() if column in columns}
        for column, value in known.items():
            row.one_of(column, [str(value)])
        values: dict[str, Any] = {
            **known,
            **{column: row.number(column, -np.inf, infinite=True, nan=not np.isfinite(e.loss)) for column in DROPS},
            **{column: row.boolean(column) for column in ("approximate", "verified", "significantly_dominated")},
            "scheme": row.one_of("scheme", ["", *run.space.scheme_names]),
            "non_inferior": row.one_of("non_inferior", ["", "yes", "no"]),
            "dominated_by_bytes": row.integer("dominated_by_bytes") if row.cells["dominated_by_bytes"] else None,
        }
        return tuple(values[column] for column in columns)

    remedy = f"Delete it and confirm again: mpsearch search {run_option(folder)}"
    return pd.DataFrame(read_rows(file, columns, parse, at_once=True, remedy=remedy), columns=list(columns))


def _values(run: Run, e: Evaluation) -> dict[str, Any]:
    """An evaluation's sizes, costs, scores and times by column."""
    q = run.quality_name
    fields = {column: getattr(e, column) for column in (*SIZES, *TIMES, "loss", "split")}
    qualities = {q: e.quality, f"{q}_low": e.quality_low, f"{q}_high": e.quality_high}
    return {**fields, **e.costs, **qualities, "allocation": e.allocation.to_json()}


def _tested(run: Run) -> dict[Allocation, str]:
    """Allocation -> "yes" or "no", of the points that were tested for non-inferiority."""
    if not run.front or run.baseline() is None:
        return {}
    answer = smallest_non_inferior(run, run.max_drop)
    tested = [e.allocation for e in answer.tested]
    n_passed = tested.index(answer.point.allocation) + 1 if answer.decided else 0
    return {allocation: "yes" if i < n_passed else "no" for i, allocation in enumerate(tested)}
