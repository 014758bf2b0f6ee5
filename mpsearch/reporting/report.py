"""The tables, the figures and the page of a run: everything is drawn again from what lies in its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mpsearch.allocation import Allocation, SearchSpace
from mpsearch.costs.latency import FLOAT, Latency
from mpsearch.evaluation import Confirmed, Evaluation, SensitivityTable
from mpsearch.files import write_atomically
from mpsearch.files.csv_rows import Row, read_rows, write_rows
from mpsearch.intervals import is_approximate
from mpsearch.reporting import charts
from mpsearch.reporting.findings import times_differ
from mpsearch.reporting.page import page
from mpsearch.runs.evaluation_rows import SCORED
from mpsearch.runs.noninferiority import smallest_non_inferior
from mpsearch.runs.run import Run

# At most this many rows in layers.png; a longer front is thinned evenly, the pick always kept.
MAX_LAYER_ROWS = 24
TIMES = ("measured_ms", "measured_ms_low", "measured_ms_high")
DROPS = ("drop", "drop_low", "drop_high")
STATEMENTS = ("non_inferior", "dominated_by_bytes", "significantly_dominated")


SIZES = ("size_bytes", "average_bits", "average_bits_all")  # of a point in the tables


def write_report(result: Run, folder: Path, picked: Evaluation, confirmed: Sequence[Confirmed] | None = None) -> Path:
    """Write `front.csv`, `uniform.csv`, `confirm.csv`, the figures and `report.md`; returns the page's path.

    `confirmed` is what `confirm` found; `None` draws again from the `confirm.csv` that is there.
    """
    front, uniform = front_table(result, result.front), uniform_table(result)
    _write_csv(front, folder / "front.csv")
    _write_csv(uniform.drop(columns="scheme"), folder / "uniform.csv")
    if confirmed is not None:
        table = confirm_table(result, confirmed)
        write_rows(folder / "confirm.csv", list(table.columns), table.values.tolist())
    draw_sensitivity(result.sensitivity, folder)
    draw_interactions(result.sensitivity, picked, folder)
    charts.pareto(
        front,
        uniform,
        result.to_frame(),
        folder,
        quality=result.quality,
        float_quality={split: baseline.quality for split, baseline in result.baselines.items()},
        limits=[_limits(result, column) for column in result.objectives],
        trained=trained_table(result),
        objectives=result.objectives,
        picked=picked.allocation.to_json(),
        timed=times_differ(result),
        loss_label=result.loss_label,
    )
    shown = _thin(result.front, picked)
    labels = [f"{e.average_bits:.2f}" for e in shown]
    names = list(result.space.names)
    bits = pd.DataFrame([_group_bits(result, e) for e in shown], index=labels, columns=names)
    schemes = pd.DataFrame([[e.allocation[name] for name in names] for e in shown], index=labels, columns=names)
    position = next((i for i, e in enumerate(shown) if e.allocation == picked.allocation), None)
    charts.layers(bits, schemes, folder, position)
    file = folder / "report.md"
    write_atomically(file, page(result, picked, read_confirm(result, folder)))
    return file


def draw_sensitivity(table: SensitivityTable, folder: Path) -> None:
    """`sensitivity.png` from the table."""
    values = pd.DataFrame(table.values.T, index=list(table.space.scheme_names), columns=list(table.space.names))
    charts.sensitivity(values, table.unit, table.metric, folder)


def draw_interactions(table: SensitivityTable, picked: Evaluation, folder: Path) -> None:
    """`interactions.png`: how the effects of the groups in the picked allocation correlate; nothing where there are none."""
    if table.effects is None:
        return
    names = list(table.space.names)
    effects = table.effects[:, np.arange(len(names)), table.space.choice(picked.allocation)].astype(float)
    alone = 2 * table.losses()[np.arange(len(names)), table.space.choice(picked.allocation)]
    correlations = effects.T @ effects / np.sqrt(np.maximum(np.outer(alone, alone), 1e-300))
    charts.interactions(pd.DataFrame(correlations, index=names, columns=names), folder)


def draw_latency(rows: Sequence[Latency], space: SearchSpace, folder: Path) -> None:
    """`latency.png` from the rows of `latency.csv`."""
    schemes = (FLOAT, *space.scheme_names)
    found = {(row.layer, row.scheme): row.milliseconds for row in rows}
    names = [layer.name for layer in space.layers]
    values = pd.DataFrame([[found.get((name, s), np.nan) for s in schemes] for name in names], index=names, columns=list(schemes))
    row = rows[0]
    about = f"batch of {row.batch_size}, {row.threads} threads, {row.backend}"
    charts.latency(values, about, folder)


def front_table(result: Run, points: Sequence[Evaluation]) -> pd.DataFrame:
    """Two rows a point, search and (where measured) confirm: the columns of `front.csv`."""
    q = result.quality_name
    confirmed = result.on("confirm")
    rows = []
    for point in points:
        for e in (point, confirmed.get(point.allocation)):
            if e is not None:
                measured = {q: e.quality, f"{q}_low": e.quality_low, f"{q}_high": e.quality_high}
                size = {**_sizes(e), **e.costs, "loss": e.loss}
                times = {column: getattr(e, column) for column in TIMES}
                rest = {**times, "split": e.split, "allocation": e.allocation.to_json()}
                rows.append({**size, **measured, **rest})
    columns = [*SIZES, *result.costs, "loss", q, f"{q}_low", f"{q}_high", *TIMES, "split", "allocation"]
    return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(TIMES, float))


def _sizes(e: Evaluation) -> dict[str, float]:
    return {column: getattr(e, column) for column in SIZES}


def uniform_table(result: Run) -> pd.DataFrame:
    """The same for the uniform allocations, with their `scheme`."""
    tables = [front_table(result, [e]).assign(scheme=scheme) for scheme, e in result.uniform]
    return pd.concat(tables, ignore_index=True) if tables else front_table(result, []).assign(scheme="")


def trained_table(result: Run) -> pd.DataFrame:
    """A row for each finetuned point and split: its costs, loss and quality, and those two `_before` training."""
    q, rows = result.quality_name, []
    for split in SCORED:
        before = result.on(split)
        for allocation, after in result.finetuned(split).items():
            if (e := before.get(allocation)) is not None:
                costs = {**_sizes(after), **after.costs, "split": split}
                rows.append({**costs, "loss": after.loss, "loss_before": e.loss, q: after.quality, f"{q}_before": e.quality})
    columns = [*SIZES, *result.costs, "split", "loss", "loss_before", q, f"{q}_before"]
    return pd.DataFrame(rows, columns=columns)


def confirm_columns(quality_name: str) -> tuple[str, ...]:
    """The columns of `confirm.csv`."""
    measured = ("scheme", *SIZES, "loss", quality_name)
    return (*measured, *DROPS, "approximate", "verified", *STATEMENTS, "allocation")


def confirm_table(result: Run, confirmed: Sequence[Confirmed]) -> pd.DataFrame:
    """Each confirmed point's drop from the float model with its paired interval, and what dominates it there.

    `non_inferior` is "yes" for the points that passed the sequence of `noninferiority`, "no" for the one that ended it, and empty
    for those that were not tested.
    """
    q = result.quality_name
    passed = _passed(result)
    return pd.DataFrame(
        [
            {
                "scheme": c.scheme or "",
                **_sizes(c.evaluation),
                "loss": c.evaluation.loss,
                q: c.evaluation.quality,
                "drop": c.drop,
                "drop_low": c.drop_low,
                "drop_high": c.drop_high,
                "approximate": is_approximate(c.evaluation.n_samples),
                "verified": c.evaluation.verified,
                "non_inferior": passed.get(c.evaluation.allocation, "") if c.scheme is None else "",
                "dominated_by_bytes": c.dominated_by.size_bytes if c.dominated_by else None,
                "significantly_dominated": c.significantly_dominated,
                "allocation": c.evaluation.allocation.to_json(),
            }
            for c in confirmed
        ],
        columns=list(confirm_columns(q)),
        dtype=object,
    )


def _passed(result: Run) -> dict[Allocation, str]:
    """Allocation -> "yes" or "no", of the points that were tested for non-inferiority."""
    if not result.front or result.baseline() is None:
        return {}
    found = smallest_non_inferior(result, result.max_drop)
    tested = list(reversed(result.front))[: found.n_tested]
    last = [e.allocation for e in tested].index(found.point.allocation) if found.decided else -1
    return {e.allocation: "yes" if i <= last else "no" for i, e in enumerate(tested)}


def _group_bits(result: Run, evaluation: Evaluation) -> np.ndarray:
    space = result.space
    choice = space.choice(evaluation.allocation)
    return space.storage_bits[np.arange(len(choice)), choice] / np.array([max(g.numel, 1) for g in space.groups])


def _thin(front: Sequence[Evaluation], picked: Evaluation) -> Sequence[Evaluation]:
    if len(front) <= MAX_LAYER_ROWS:
        return front
    keep = set(np.linspace(0, len(front) - 1, MAX_LAYER_ROWS).round().astype(int))
    return [e for i, e in enumerate(front) if i in keep or e.allocation == picked.allocation]


def _limits(result: Run, objective: str) -> Mapping[str, float]:
    """Budgets as positions on the axis of an objective: those on it, and on size in any unit where that is the objective."""
    space, limits = result.space, {}
    whole = space.size_bits()
    for name, limit in result.budgets.items():
        to_bytes = {
            "bytes": limit,
            "bits": (limit * space.numel + space.other_bits) / 8,
            "fraction": limit * whole / 8,
        }
        at = to_bytes.get(name) if objective == "size_bytes" else limit if name == objective else None
        if at is not None:
            limits[f"budget.{name} = {limit:,.10g}"] = at
    return limits


def read_confirm(result: Run, folder: Path) -> pd.DataFrame | None:
    """The table of `confirm.csv`, `None` where there is none; every row must be of an evaluation on the confirm split."""
    file, columns = folder / "confirm.csv", confirm_columns(result.quality_name)
    if not file.exists():
        return None
    measured = {e.allocation.to_json(): e for e in result.on("confirm").values()}

    def parse(row: Row) -> tuple[Any, ...]:
        e = measured[row.one_of("allocation", list(measured))]
        known = {**_sizes(e), "loss": e.loss, result.quality_name: e.quality}
        for column, value in known.items():
            row.one_of(column, [str(value)])
        drops = {column: row.number(column, -np.inf, infinite=True, nan=not np.isfinite(e.loss)) for column in DROPS}
        by = row.integer("dominated_by_bytes") if row.cells["dominated_by_bytes"] else None
        statements: dict[str, Any] = {
            column: row.boolean(column) for column in ("approximate", "verified", "significantly_dominated")
        }
        statements["non_inferior"] = row.one_of("non_inferior", ["", "yes", "no"])
        scheme = row.one_of("scheme", ["", *result.space.scheme_names])
        values = {**row.cells, **known, **drops, **statements, "scheme": scheme, "dominated_by_bytes": by}
        return tuple(values[column] for column in columns)

    remedy = f"Delete it and confirm again: mpsearch search run={folder}"
    return pd.DataFrame(read_rows(file, columns, parse, at_once=True, remedy=remedy), columns=list(columns))


def _write_csv(table: pd.DataFrame, file: Path) -> None:
    write_atomically(file, table.to_csv(index=False))
