"""Several runs compared on the confirm split: their fronts in one figure, and the best point of each at equal bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mpsearch.errors import InputError
from mpsearch.evaluation import Evaluation
from mpsearch.files import write_atomically
from mpsearch.reporting.answer import size_text
from mpsearch.reporting.charts.comparison import draw_comparison
from mpsearch.reporting.findings import drop_text, score_text
from mpsearch.reporting.markdown import markdown_table
from mpsearch.runs.run import Run

N_SIZES = 6  # rows of the table
SAME = ("quality_name", "quality_kind", "data_sha256")  # what runs must have in common to be compared


@dataclass(frozen=True)
class Series:
    """A front on the confirm split: its points, cheapest first, and the run that they are of."""

    name: str
    run: Run
    points: tuple[Evaluation, ...]


def compare(runs: Mapping[str, Run], folder: Path) -> Path:
    """Write `comparison.md`, `.csv` and the figure `comparison`; returns the path of the first.

    Parameters
    ----------
    runs
        Name -> run. They must be of the same data and quality.
    folder
        Where to.

    Raises
    ------
    InputError
        Runs that cannot be compared, or of which fewer than two fronts are confirmed.
    """
    first, *others = runs.items()
    for name, run in others:
        for key in SAME:
            if run.identity.get(key) != first[1].identity.get(key):
                raise InputError(
                    f"'{first[0]}' and '{name}' have another {key.replace('_', ' ')}, so their qualities cannot be compared. "
                    "Give runs of the same task and data."
                )
    shown = [series for name, run in runs.items() for series in series_of(name, run)]
    if len(shown) < 2:
        raise InputError(f"Got {len(shown)} confirmed fronts to compare, expected two or more. Finish the runs first.")
    table = at_equal_bytes(shown)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "comparison.csv", table.to_csv(index=False))
    draw_comparison([(s.name, s.points) for s in shown], first[1], folder)
    file = folder / "comparison.md"
    write_atomically(file, _page(shown, table))
    return file


def series_of(name: str, run: Run) -> Iterator[Series]:
    """The confirmed fronts of a run: with the weights that an export has, and, where they differ, unrefined and trained ones."""
    front = {e.allocation for e in (*run.front, *(e for _, e in run.uniform))}
    refined, trained = run.refined("confirm"), run.finetuned("confirm")
    plain = {a: e for a, e in run.unrefined.on("confirm").items() if a in refined}
    stages = [(" refined" if refined else "", run.on("confirm")), (" unrefined", plain), (" trained", trained)]
    for stage, measured in stages:
        points = sorted((e for a, e in measured.items() if a in front or stage), key=lambda e: (e.size_bytes, e.loss))
        if points:
            yield Series(f"{name}{stage}", run, tuple(points))


def at_equal_bytes(shown: Sequence[Series]) -> pd.DataFrame:
    """At each of `N_SIZES` sizes that all fronts reach: of each the confirmed point of lowest loss that is at most as large.

    Columns: bytes, series, size_bytes, loss, quality, quality_low, quality_high, drop, drop_low, drop_high, point.
    """
    low = max(s.points[0].size_bytes for s in shown)
    high = min(s.points[-1].size_bytes for s in shown)
    rows: list[dict[str, Any]] = []
    for size in np.unique(np.geomspace(low, max(low, high), N_SIZES).astype(np.int64)):
        for series in shown:
            best = min((e for e in series.points if e.size_bytes <= size), key=lambda e: e.loss)
            baseline, quality = series.run.baseline("confirm"), series.run.quality
            drops = (np.nan,) * 3 if baseline is None else best.drop_from(baseline, quality)
            scores = {name: getattr(best, name) for name in ("loss", "quality", "quality_low", "quality_high")}
            ends = dict(zip(("drop", "drop_low", "drop_high"), drops, strict=True))
            about = {"bytes": int(size), "series": series.name, "size_bytes": best.size_bytes}
            rows.append({**about, **scores, **ends, "point": best.allocation.id})
    return pd.DataFrame(rows)


def _page(shown: Sequence[Series], table: pd.DataFrame) -> str:
    quality = shown[0].run.quality
    sizes = list(dict.fromkeys(table.bytes))
    header = ["at most", *(s.name for s in shown)]
    losses, drops = [], []
    for size in sizes:
        at = table[table.bytes == size].set_index("series")
        least = at.loss.min()
        losses.append([size_text(size), *(f"**{x:.4g}**" if x == least else f"{x:.4g}" for x in at.loss)])
        drops.append([size_text(size), *(drop_text(quality, *at.loc[s.name, ["drop", "drop_low", "drop_high"]]) for s in shown)])
    floats = [e for s in shown if (e := s.run.baseline("confirm")) is not None]
    texts = (f"float model: {quality.name} {score_text(quality, e)}, {e.n_samples:,} samples" for e in floats)
    about = "; ".join(dict.fromkeys(texts))
    blocks = [
        "# Comparison of runs on the confirm split",
        f"{about}. At each size, of each front the confirmed point of lowest loss that is at most as large.",
        "![Comparison](comparison.png)",
        f"## Loss: {shown[0].run.loss_label}",
        markdown_table(header, losses),
        f"## {quality.name}: {quality.drop_label} (95 %)",
        markdown_table(header, drops),
        "Intervals are paired with the float model on the same samples, not between the runs: where two of them overlap, the "
        "difference between the runs may still be significant, or not. Table: `comparison.csv`.",
    ]
    return "\n\n".join(blocks) + "\n"
