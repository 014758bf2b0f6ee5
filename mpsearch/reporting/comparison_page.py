"""`comparison.md`: runs compared at equal bytes, in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd

from mpsearch.quality import Quality
from mpsearch.reporting.answer import size_text
from mpsearch.reporting.findings import drop_text, score_text
from mpsearch.reporting.markdown import markdown_table
from mpsearch.runs.run import Run
from mpsearch.runs.samples import FOLDER


def comparison_page(runs: Mapping[str, Run], table: pd.DataFrame, opened: pd.DataFrame) -> str:
    """The page, of `comparison.at_equal_bytes` and `comparison.in_runtimes`."""
    run = next(iter(runs.values()))
    quality = run.quality
    texts = (
        f"{name}: {quality.name} {score_text(quality, e)}, {e.n_samples:,} samples"
        for name, e in ((run.identity.get("model_name", "float model"), run.baseline("confirm")) for run in runs.values())
        if e is not None
    )
    blocks = [
        "# Comparison of runs on the confirm split",
        f"Float model {'; '.join(dict.fromkeys(texts))}. At each size, of each series the point of lowest search loss that is at "
        "most as large; the confirm split only measures it.",
        "![Comparison](comparison.png)",
        f"## Loss: {run.loss_label}",
        _by_size(table, _loss_cell),
        f"## {quality.name}: {quality.drop_label}, from the float model (95 %)",
        _by_size(table, lambda row, _: drop_text(quality, row["drop"], row.drop_low, row.drop_high)),
        *_difference_blocks(run, table),
        *_runtime_blocks(run, opened),
        "Table: `comparison.csv`.",
    ]
    return "\n\n".join(blocks) + "\n"


def _difference_blocks(run: Run, table: pd.DataFrame) -> list[str]:
    """The differences from the first series, and whether they are paired."""
    first, quality = table.series.iloc[0], run.quality
    others = table[table.series != first]
    n_unpaired = int(others.loss_difference_low.isna().sum()) if "loss_difference_low" in others else len(others)
    paired = (
        f"Positive: worse than `{first}`. Intervals are paired: both points were scored on the same samples. "
        "Bold: the interval excludes 0. Each interval covers the true difference in 95 % of cases; of many, some do not."
    )
    missing = (
        f"{n_unpaired} of {len(others)} differences have no interval, because a run has no readable samples of the point in its "
        f"folder `{FOLDER}/` (removed, damaged, more than are kept, or confirmed by an earlier version). Their points have only "
        "the intervals from the float model above: where two of these overlap, the difference may still be significant, or not."
    )
    sentences = ([paired] if n_unpaired < len(others) else []) + ([missing] if n_unpaired else [])
    return [
        f"## Differences from {first}",
        " ".join(sentences),
        f"Loss: {run.loss_label}",
        _by_size(others, lambda row, _: _difference_cell(row, "loss_difference", lambda x: f"{x:+.3g}")),
        f"{quality.name}: {quality.drop_label}",
        _by_size(others, lambda row, _: _difference_cell(row, "drop_difference", lambda x: _signed(quality, x))),
    ]


def _runtime_blocks(run: Run, opened: pd.DataFrame) -> list[str]:
    """What the exported files measure in their runtimes."""
    if not len(opened):
        return []
    q = run.quality
    header = ["", "point", "bytes of files", f"{q.label} (95 %)", f"loss: {run.loss_label}", "ms per forward pass"]
    rows = [
        (
            v.series,
            f"`{v.point}`",
            f"{v.size_bytes:,}",
            f"{q.text(v.quality)} ({q.range_text(v.quality_low, v.quality_high)})",
            f"{v.loss:.4g}",
            f"{v.ms:.3g} ({v.measured_on})",
        )
        for v in opened.itertuples()
    ]
    return ["## Exported files in their runtimes, on the confirm split", markdown_table(header, rows)]


def _by_size(table: pd.DataFrame, cell: Callable[[pd.Series, pd.DataFrame], str]) -> str:
    """A row for each size, a column for each series; `cell` gets a row of the table, and all rows of its size."""
    names = list(dict.fromkeys(table.series))
    rows = []
    for size, at in table.groupby("bytes"):
        by_name = at.set_index("series")
        rows.append([size_text(size), *(cell(by_name.loc[name], at) if name in by_name.index else "" for name in names)])
    return markdown_table(["at most", *names], rows)


def _loss_cell(row: pd.Series, at: pd.DataFrame) -> str:
    return f"**{row.loss:.4g}**" if row.loss == at.loss.min() else f"{row.loss:.4g}"


def _difference_cell(row: pd.Series, key: str, text: Callable[[float], str]) -> str:
    """As in "+0.3 (-0.1 to +0.7)", bold where the interval excludes 0."""
    low, high = (row.get(f"{key}_{end}", np.nan) for end in ("low", "high"))
    if low == high == 0:
        return "0 (same outputs)"
    if not np.isfinite([low, high]).all():
        return f"{text(row[key])} (not paired)"
    cell = f"{text(row[key])} ({text(low)} to {text(high)})"
    return f"**{cell}**" if low > 0 or high < 0 else cell


def _signed(quality: Quality, value: float) -> str:
    text = quality.difference(value)
    return text if text.startswith("-") or not text.strip("0.") else f"+{text}"
