"""The answer of a run in one sentence, the points to recommend, and what the picked one saves; for all pages of a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mpsearch.costs.millijoules import Millijoules
from mpsearch.evaluation import FINETUNED, Evaluation
from mpsearch.registry import resolve
from mpsearch.reporting.findings import drop_text, score_text
from mpsearch.runs.noninferiority import smallest_non_inferior
from mpsearch.runs.run import Run
from mpsearch.runs.verified import Verified

STEPS = (0.0, 0.2, 0.5, 1.0, 2.0, 4.0, 10.0)  # drops for which the cheapest point is named, in units of the run's own `max_drop`
ENERGY = 'Horowitz, "Computing\'s energy problem" (ISSCC 2014): 45 nm, 0.9 V, arithmetic and reading the weights from DRAM'


@dataclass(frozen=True)
class Recommendation:
    """A point and why one may want it; `certain`: an interval on the confirm split supports it."""

    purpose: str
    point: Evaluation
    certain: bool


@dataclass(frozen=True)
class Saving:
    """One line of what the picked point saves: of the float model, of the point, and the source of both numbers."""

    what: str
    before: str
    after: str
    source: str


def size_text(n_bytes: float) -> str:
    """ "2.13 MB": three significant digits in a decimal unit."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n_bytes >= factor:
            return f"{_significant(n_bytes / factor)} {unit}"
    return f"{n_bytes:,.0f} bytes"


def answer(run: Run, picked: Evaluation) -> str:
    """What the picked point is: its size, and its quality with the interval of the drop, on the split that is named."""
    quality, name = run.quality, run.identity.get("model_name", "The model")
    fits = f"{name} fits in {size_text(picked.size_bytes)} instead of {size_text(run.space.size_bits() / 8)}"
    split, measured = _scored(run, picked)
    baseline = run.baseline(split)
    if baseline is None:
        return f"{fits}; the float model has not been measured yet."
    drop, low, high = measured.drop_from(baseline, quality)
    unit, unseen = " %" if quality.kind == "share" else "", " unseen" if split == "confirm" and _disjoint(run) else ""
    change = f"{quality.name} {quality.text(baseline.quality)} → {quality.text(measured.quality)}{unit}"
    interval = (
        f"{quality.drop_word} {_typeset(quality.difference(drop))}{quality.drop_unit}, 95 % interval {_range(run, low, high)}"
    )
    where = f"{measured.n_samples:,}{unseen} samples of the {split} split"
    where += "" if split == "confirm" else ", on which it was selected"
    trained = ", trained" if picked.origin == FINETUNED else ""
    return f"{fits}{trained}; {change} ({interval}, {where})."


def recommendations(run: Run, picked: Evaluation) -> list[Recommendation]:
    """The picked point and its alternatives, each point once: smallest non-inferior, lowest loss, cheapest at each drop."""
    chosen: list[Recommendation] = [Recommendation("picked", picked, False)]
    front, quality = run.front, run.quality
    if not front or run.baseline() is None:
        return chosen
    own = smallest_non_inferior(run, run.max_drop)
    margin = quality.drop_text(run.max_drop)
    chosen.append(Recommendation(f"smallest non-inferior, within a {quality.drop_word} of {margin}", own.point, own.decided))
    where = "within the budget" if run.budgets else "of the front"
    chosen.append(Recommendation(f"lowest loss {where}", min(front, key=lambda e: e.loss), False))
    for drop in [step * run.max_drop for step in STEPS]:
        point = smallest_non_inferior(run, drop)
        if point.within:
            purpose = f"cheapest with a {quality.drop_word} of at most {quality.drop_text(drop)}"
            chosen.append(Recommendation(purpose, point.point, point.decided))
    return _once(chosen)


def savings(run: Run, picked: Evaluation, verified: Sequence[Verified] = ()) -> list[Saving]:
    """Bytes, milliseconds and estimated millijoules of the float model and of the picked point, each with its source.

    `verified` are the rows of `verified.csv`.
    """
    space = run.space
    float_bytes = space.size_bits() / 8
    smaller = f"{float_bytes / picked.size_bytes:.2f} times smaller"
    kept = [Saving("size", size_text(float_bytes), f"{size_text(picked.size_bytes)} ({smaller})", "bytes of the stored tensors")]
    measured, baseline = run.on("confirm").get(picked.allocation), run.baseline("confirm")
    if measured is not None and measured.measured_ms is not None and baseline is not None and baseline.measured_ms is not None:
        before, after = (_milliseconds(e.measured_ms, e.measured_ms_low, e.measured_ms_high) for e in (baseline, measured))
        what = "forward pass of mpsearch's packed model, median (quartiles)"
        kept.append(Saving(what, before, after, f"measured on {measured.measured_on or 'this machine'}"))
    opened = {(v.runtime, v.exporter): v for v in verified if v.point == picked.allocation.id}
    for v in opened.values():
        source = f"measured on {v.measured_on}; mpsearch verify exporter={v.exporter}"
        kept.append(Saving(f"forward pass in {v.runtime}", f"{v.float_ms:.3g} ms in PyTorch", f"{v.ms:.3g} ms", source))
        kept.append(Saving(f"files for {v.runtime}", "", size_text(v.file_bytes), f"{v.file_bytes:,} bytes as written"))
    whole, less = (millijoules(run, e) for e in (None, picked))
    if whole > 0:
        what = "energy of one sample, estimated"
        kept.append(Saving(what, f"{_significant(whole)} mJ", f"{_significant(less)} mJ", ENERGY))
    return kept


def millijoules(run: Run, point: Evaluation | None) -> float:
    """What the model of `mpsearch.costs.millijoules` gives for one sample of a point; `None`: of the float model."""
    space = run.space
    if point is not None:
        return Millijoules().table(space).cost_of(space.choice(point.allocation))
    float32 = {"fp32": resolve("scheme", "fp32")}
    whole = replace(space, schemes=float32, choices=tuple(("fp32",) for _ in space.groups))
    return Millijoules().table(whole).cost_of(np.zeros(len(space.groups), dtype=np.intp))


def drop_of(run: Run, point: Evaluation) -> tuple[str, str]:
    """(quality, drop with its interval) of a point as text, on the confirm split where it is measured there."""
    split, measured = _scored(run, point)
    baseline = run.baseline(split)
    if baseline is None:
        return score_text(run.quality, measured), ""
    mark = "" if split == "confirm" else " (search split)"
    return score_text(run.quality, measured) + mark, drop_text(run.quality, *measured.drop_from(baseline, run.quality))


def _scored(run: Run, point: Evaluation) -> tuple[str, Evaluation]:
    """(split, evaluation there): the confirm split where the point and the float model are measured there."""
    confirmed = run.confirmed(point)
    return ("search", point) if confirmed is None or run.baseline("confirm") is None else ("confirm", confirmed)


def _once(chosen: Sequence[Recommendation]) -> list[Recommendation]:
    """Each point once, with all its purposes; of the margins that lead to one point, the tightest."""
    merged: dict[Any, Recommendation] = {}
    for each in chosen:
        before = merged.get(each.point.allocation)
        if before is None:
            merged[each.point.allocation] = each
        elif not (each.purpose.startswith("cheapest") and ("cheapest" in before.purpose or "non-inferior" in before.purpose)):
            purpose = f"{before.purpose}; {each.purpose}"
            merged[each.point.allocation] = Recommendation(purpose, before.point, before.certain or each.certain)
    return list(merged.values())


def _disjoint(run: Run) -> bool:
    """Whether the samples of the confirm split were compared with those of the others, and none is shared."""
    overlap = run.identity.get("overlap")
    return overlap is not None and not any(n for pair, n in overlap["shared"].items() if "confirm" in pair)


def _range(run: Run, low: float, high: float) -> str:
    return f"{_signed(run.quality.difference(low))} to {_signed(run.quality.difference(high))}"


def _signed(text: str) -> str:
    """With a sign, except zero."""
    return _typeset(text) if text.startswith("-") or not text.strip("0.") else f"+{text}"


def _typeset(text: str) -> str:
    """With a minus sign in the place of a hyphen."""
    return text.replace("-", "\N{MINUS SIGN}")


def _significant(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _milliseconds(median: float | None, low: float | None, high: float | None) -> str:
    spread = "" if low is None or high is None else f" ({low:.3g} to {high:.3g})"
    return f"{median:.3g} ms{spread}"
