"""Several runs compared on the confirm split: their fronts in one figure, and the best point of each at equal bytes.

Points are chosen by their search losses, so that the confirm split only measures them. Where both runs kept what each sample
scored (`mpsearch.runs.samples`), the interval of their difference is paired.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mpsearch.allocation import Allocation
from mpsearch.errors import InputError
from mpsearch.evaluation import Evaluation
from mpsearch.files import write_atomically
from mpsearch.intervals import paired_interval
from mpsearch.reporting.charts.comparison import Drawn, draw_comparison
from mpsearch.reporting.comparison_page import comparison_page
from mpsearch.runs.run import Run
from mpsearch.runs.samples import SampleFiles, Samples
from mpsearch.runs.verified import Verified

N_SIZES = 6  # rows of the table
SAME = ("quality_name", "quality_kind", "data_sha256")  # what runs must have in common to be compared
ENDS = ("", "_low", "_high")


@dataclass(frozen=True, eq=False)
class Compared:
    """A run as it is compared: its record, its rows of `verified.csv`, and the samples of its points, where they were kept."""

    run: Run
    verified: Sequence[Verified] = ()
    files: SampleFiles | None = None

    def samples(self, point: Evaluation) -> Samples | None:
        """See `SampleFiles.read`."""
        return None if self.files is None else self.files.read(point, self.run.quality)


@dataclass(frozen=True)
class Series:
    """A front on the confirm split: its points, cheapest first, and the search losses by which one of them is chosen.

    `stage` says which weights its points have: "refined", "unrefined", "trained", or "" where no point of the run was refined.
    """

    name: str
    stage: str
    source: Compared
    points: tuple[Evaluation, ...]
    search_losses: Mapping[Allocation, float]

    def best(self, size: int, above: int = 0) -> Evaluation | None:
        """Of the points of more than `above` and at most `size` bytes that of the lowest loss on the search split, if any."""
        fitting = [e for e in self.points if above < e.size_bytes <= size]
        return min(fitting, key=lambda e: self.search_losses[e.allocation], default=None)


def compare(runs: Mapping[str, Compared], folder: Path) -> Path:
    """Write `comparison.md`, `.csv` and the figure `comparison`; returns the path of the first.

    Parameters
    ----------
    runs
        Name -> run. They must be of the same data and quality; differences are taken from the first.
    folder
        Where to.

    Raises
    ------
    InputError
        Runs that cannot be compared, or of which fewer than two fronts are confirmed.
    """
    first, *others = ((name, compared.run) for name, compared in runs.items())
    for name, run in others:
        for key in SAME:
            if run.identity.get(key) != first[1].identity.get(key):
                raise InputError(
                    f"'{first[0]}' and '{name}' have another {key.replace('_', ' ')}, so their qualities cannot be compared. "
                    "Give runs of the same task and data."
                )
    shown = [series for name, compared in runs.items() for series in series_of(name, compared)]
    if len(shown) < 2:
        raise InputError(f"Got {len(shown)} confirmed fronts to compare, expected two or more. Finish the runs first.")
    table, opened = at_equal_bytes(shown), in_runtimes(runs)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "comparison.csv", table.to_csv(index=False))
    draw_comparison(_drawn(runs, shown, opened), first[1], folder)
    file = folder / "comparison.md"
    write_atomically(file, comparison_page({name: compared.run for name, compared in runs.items()}, table, opened))
    return file


def series_of(name: str, compared: Compared) -> Iterator[Series]:
    """The confirmed fronts of a run: with the weights that an export has, and, where they differ, unrefined and trained ones."""
    run = compared.run
    front = {e.allocation for e in (*run.front, *(e for _, e in run.uniform))}
    refined = run.refined("confirm")
    plain = {a: e for a, e in run.unrefined.on("confirm").items() if a in refined}
    stages = [
        ("refined" if refined else "", run.on("confirm"), run.on("search")),
        ("unrefined", plain, run.unrefined.on("search")),
        ("trained", run.finetuned("confirm"), run.finetuned("search")),
    ]
    for stage, measured, searched in stages:
        points = [e for a, e in measured.items() if a in searched and (stage or a in front)]
        if points:
            losses = {e.allocation: searched[e.allocation].loss for e in points}
            points.sort(key=lambda e: (e.size_bytes, losses[e.allocation]))
            yield Series(f"{name} {stage}".rstrip(), stage, compared, tuple(points), losses)


def at_equal_bytes(shown: Sequence[Series]) -> pd.DataFrame:
    """The best point of each series at `N_SIZES` sizes that the front of every run reaches.

    Columns: bytes, series, point, size_bytes, loss; quality and drop from the float model, each with `_low` and `_high`; and the
    differences from the first series, `loss_difference` and `drop_difference`, positive for the worse, with `_low` and `_high`
    where they are paired. A series without a point of at most so many bytes has no row; nor have trained points, of which there
    may be only one, where they are not larger than the size before.
    """
    fronts = [s for s in shown if s.stage in ("", "refined")]
    low, high = max(s.points[0].size_bytes for s in fronts), min(s.points[-1].size_bytes for s in fronts)
    rows: list[dict[str, Any]] = []
    before = 0
    for size in np.unique(np.geomspace(low, max(low, high), N_SIZES).astype(np.int64)).tolist():
        reference = shown[0].best(size)
        for series in shown:
            if (point := series.best(size, before if series.stage == "trained" else 0)) is not None:
                about = {"bytes": size, "series": series.name, "point": point.allocation.id}
                differences = _differences(shown[0], reference, series, point)
                rows.append({**about, **_measured(series.source.run, point), **differences})
        before = size
    return pd.DataFrame(rows)


def in_runtimes(runs: Mapping[str, Compared]) -> pd.DataFrame:
    """What exported files measure in their runtimes, of each file the latest.

    Columns: run, series, point, size_bytes (of the files), loss, quality, quality_low, quality_high, ms, measured_on.
    """
    rows = []
    for name, compared in runs.items():
        latest = {(v.exporter, v.point, v.trained): v for v in compared.verified}
        for v in latest.values():
            file = "" if v.exporter == v.runtime else f" ({v.exporter})"
            series = f"{name}{' trained' if v.trained else ''} in {v.runtime}{file}"
            scores = {key: getattr(v, key) for key in ("loss", *(f"quality{end}" for end in ENDS), "ms", "measured_on")}
            rows.append({"run": name, "series": series, "point": v.point, "size_bytes": v.file_bytes, **scores})
    return pd.DataFrame(rows)


def _measured(run: Run, point: Evaluation) -> dict[str, float]:
    """The scores of a point, and its drop from the float model."""
    baseline = run.baseline("confirm")
    drops = (np.nan,) * 3 if baseline is None else point.drop_from(baseline, run.quality)
    scores = {key: getattr(point, key) for key in ("size_bytes", "loss", *(f"quality{end}" for end in ENDS))}
    return {**scores, **{f"drop{end}": drop for end, drop in zip(ENDS, drops, strict=True)}}


def _differences(first: Series, reference: Evaluation | None, series: Series, point: Evaluation) -> dict[str, float]:
    """How much higher loss and drop of a point are than those of the reference; without ends where samples cannot be paired."""
    if series is first or reference is None:
        return {}
    own, other = series.source.samples(point), first.source.samples(reference)
    quality = series.source.run.quality
    differences = {
        "loss_difference": point.loss - reference.loss,
        "drop_difference": quality.drop(reference.quality, point.quality, point.quality, point.quality)[0],
    }
    if own is None or other is None or any(len(x) != len(y) or len(x) < 2 for x, y in zip(own, other, strict=True)):
        return differences
    if all(np.array_equal(x, y) for x, y in zip(own, other, strict=True)):  # the same model: nothing is estimated
        pairs = dict.fromkeys(differences, (0.0, 0.0))
    else:
        drop, low, high = quality.paired_drop(own[0], other[0])
        pairs = {"loss_difference": paired_interval(own[1], other[1]), "drop_difference": (low, high)}
        differences["drop_difference"] = drop
    return {**differences, **{f"{key}{end}": x for key, both in pairs.items() for end, x in zip(ENDS[1:], both, strict=True)}}


def _drawn(runs: Mapping[str, Compared], shown: Sequence[Series], opened: pd.DataFrame) -> list[Drawn]:
    """The series of the figure: fronts, and the points of each runtime."""
    columns = ["size_bytes", "loss", *(f"quality{end}" for end in ENDS)]
    sources = list(runs.values())
    drawn = [
        Drawn(s.name, sources.index(s.source), s.stage, pd.DataFrame([{c: getattr(e, c) for c in columns} for e in s.points]))
        for s in shown
    ]
    if len(opened):
        groups = opened.groupby("series", sort=False)
        drawn += [Drawn(name, list(runs).index(rows.run.iloc[0]), "runtime", rows[columns]) for name, rows in groups]
    return drawn
