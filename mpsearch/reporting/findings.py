"""What a run found, in sentences: each number with its split and, where it is a quality, its interval."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from mpsearch.evaluation import Evaluation
from mpsearch.intervals import Z
from mpsearch.optimize.pareto import hypervolume
from mpsearch.quality import Quality
from mpsearch.runs.noninferiority import NonInferior, smallest_non_inferior
from mpsearch.runs.run import Run


def findings(result: Run, picked: Evaluation, confirmed: pd.DataFrame | None) -> list[str]:
    """A list item each; `confirmed` is the table of `confirm.csv`, where there is one."""
    said = [
        f"The picked point has {picked.average_bits:.2f} bits per weight on average ({picked.average_bits_all:.2f} over all "
        f"parameters) and {picked.size_bytes:,} bytes, "
        f"{100 * picked.fraction:.1f} % of the float32 model."
    ]
    if warning := overfit_warning(result):
        said.append(f"**{warning}**")
    if result.baseline() is not None:
        said.append(non_inferior_sentence(result, smallest_non_inferior(result, result.max_drop)))
    said += uniform_sentences(result)
    volume = run_hypervolume(result)
    if volume is not None:
        said.append(
            "Hypervolume on the search split (average bits x log10 loss, against the largest and the smallest uniform "
            f"allocation): {volume:.3f}."
        )
    if confirmed is not None and len(confirmed):
        front = confirmed[confirmed.scheme == ""]
        dominated = front[front.dominated_by_bytes.notna()]
        said.append(
            f"On the confirm split {len(dominated)} of {len(front)} points of the front are dominated in loss by a point that "
            f"costs at most as much; for {int(dominated.significantly_dominated.sum())} of them that point's "
            f"{result.quality_name} is significantly better, too."
        )
    return [f"- {sentence}" for sentence in said]


def non_inferior_sentence(result: Run, found: NonInferior) -> str:
    """Which point is the smallest non-inferior one, what decided it, and what the samples cannot decide."""
    quality, point = result.quality, found.point
    margin = quality.drop_text(found.max_drop)
    measured = f"{quality.drop_text(found.drop)} (95 % interval {_interval(quality, found.drop_low, found.drop_high)})"
    what = f"{point.average_bits:.2f} bits ({point.size_bytes:,} bytes)"
    if found.decided:
        until = f"until the upper limit of a {quality.drop_word} exceeded {margin}"
        if found.n_tested == len(result.front) and point == result.front[0]:
            until = "and all of them passed"
        return (
            f"The smallest point that is not inferior to the float model by more than {margin} has {what}: on the confirm split "
            f"its {result.quality_name} has a {quality.drop_word} of {measured}. The search split fixed the order of the points; "
            f"the confirm split decided: {found.n_tested} of {len(result.front)} points were tested on it, from the largest "
            f"down, {until}."
        )
    undecided = f"Undecided: no point is shown to be within a {quality.drop_word} of {margin} of the float model"
    if found.split == "search":
        why = f"{undecided}, for the front is not confirmed. "
    else:
        why = f"{undecided} by the {found.n_samples:,} samples of the confirm split. "
    if not found.within:
        return (
            f"{why}The largest point of the front, {what}, has an estimated {quality.drop_word} of {measured} on the "
            f"{found.split} split, which is more already."
        )
    enough = f"; about {found.n_needed:,} samples would decide on it" if found.n_needed and found.split == "confirm" else ""
    return (
        f"{why}The smallest point before the estimated {quality.drop_word} exceeds that, from the largest down, has {what}: "
        f"{measured} on the {found.split} split{enough}."
    )


def uniform_sentences(result: Run) -> list[str]:
    """Of each uniform allocation: whether the front dominates it, on the confirm split, or on the search split without one."""
    said, quality = [], result.quality
    for split in ("confirm", "search"):
        measured = result.on(split)
        front = [measured[e.allocation] for e in result.front if e.allocation in measured]
        uniform = [(name, measured[e.allocation]) for name, e in result.uniform if e.allocation in measured]
        for scheme, e in uniform:
            better = [x for x in front if x.costs_at_most(e, result.objectives) and x.loss < e.loss]
            if better:
                best = min(better, key=lambda x: x.loss)
                said.append(
                    f"On the {split} split uniform {scheme} is dominated: with no more {_unit(result)} a point of the front "
                    f"has a loss of {best.loss:.3g} instead of {e.loss:.3g}, and {quality.name} {_score(quality, best)} "
                    f"instead of {_score(quality, e)}."
                )
        if uniform:
            break
    return said


def run_hypervolume(result: Run) -> float | None:
    """Hypervolume (`pareto.hypervolume`) of a front of sizes; `None` where fewer than two uniform allocations were measured."""
    uniform = result.uniform
    if len(uniform) < 2 or not result.front or not np.isfinite(uniform[0][1].loss) or list(result.objectives) != ["size_bytes"]:
        return None
    reference_bits, reference_kl = uniform[-1][1].average_bits, uniform[0][1].loss
    front = result.front
    return hypervolume(np.array([e.average_bits for e in front]), np.array([e.loss for e in front]), reference_bits, reference_kl)


def times_differ(result: Run) -> bool:
    """Whether the forward passes of the confirmed points differ by more than repeated passes of one point do."""
    difference, spread = _times(result)
    return difference > spread


def times_sentence(result: Run) -> str:
    """Where forward passes were timed, and how much repeated ones differ; nothing where none was."""
    where = sorted({e.measured_on for e in result.on("confirm").values() if e.measured_on})
    if not where:
        return ""
    difference, spread = _times(result)
    said = f" on {' and '.join(where)}; the quartiles of repeated passes are {spread:.2g} ms apart (median over the points)."
    if difference > spread:
        return f" Times are medians of forward passes{said}"
    return f" Times are left out, for the points' quartiles are only {difference:.2g} ms apart: medians of forward passes{said}"


def _times(result: Run) -> tuple[float, float]:
    """(interquartile range of the confirmed points' median times, median of their own interquartile ranges), milliseconds."""
    timed = [e for e in result.on("confirm").values() if e.measured_ms is not None]
    medians = [e.measured_ms or 0.0 for e in timed]
    spreads = [(e.measured_ms_high or 0.0) - (e.measured_ms_low or 0.0) for e in timed]
    if not timed:
        return 0.0, 0.0
    low, high = np.percentile(medians, [25, 75])
    return float(high - low), float(np.median(spreads))


def overfit_warning(result: Run) -> str | None:
    """Where the float model is much better on the search split than on the confirm split; `None` where it is not.

    A share is compared by the 95 % interval of the difference of two independent proportions (Agresti and Caffo 2000), other
    qualities by a tenth of their value on the confirm split.
    """
    search, confirm, quality = result.baseline("search"), result.baseline("confirm"), result.quality
    if search is None or confirm is None:
        return None
    better = quality.sign * (search.quality - confirm.quality)
    if quality.kind == "share":
        p, q = ((e.quality * e.n_samples + 1) / (e.n_samples + 2) for e in (search, confirm))
        half = Z * math.sqrt(p * (1 - p) / (search.n_samples + 2) + q * (1 - q) / (confirm.n_samples + 2))
        significant, interval = p - q > half, f", {100 * better:.1f} points more (95 % interval from {100 * (p - q - half):.1f})"
    else:
        significant, interval = better > 0.1 * abs(confirm.quality), ""
    if not significant:
        return None
    return (
        f"The float model does much better on the search split ({result.quality_name} {_score(quality, search)}, "
        f"{search.n_samples:,} samples) than on the confirm split ({_score(quality, confirm)}, {confirm.n_samples:,} samples)"
        f"{interval}: it was probably trained on the search data. Losses on such data are too low, 5 to 13 times on the "
        "networks that this was measured on, and a front that is searched there need not hold elsewhere. Search on data that "
        "the model was not trained on."
    )


def warnings(result: Run) -> list[str]:
    """What makes the run's statements less than they seem: a float model trained on the search data, splits that overlap."""
    found, shared = overfit_warning(result), result.identity.get("overlap")
    overlapping = [splits_sentence(shared).replace("**", "")] if shared and any(shared["shared"].values()) else []
    return [*([found] if found else []), *overlapping]


def splits_sentence(overlap: Mapping[str, Any] | None) -> str:
    """Whether the splits are disjoint, from what `tasks.overlap.overlap` found (`None`: they could not be compared)."""
    chosen = "The search split selects the front; the confirm split only measures it, except where a sentence says otherwise."
    if overlap is None:
        return f"Whether the splits share samples was not checked, for their samples cannot be told apart. {chosen}"
    n, shared = overlap["samples"], overlap["shared"]
    sizes = ", ".join(f"{count:,} {split}" for split, count in n.items())
    if not any(shared.values()):
        return f"The splits are disjoint: no input occurs in two of them ({sizes} samples, compared by hashes). {chosen}"
    found = "; ".join(f"{count:,} of the {pair} split" for pair, count in shared.items() if count)
    return f"**The splits are not disjoint** ({sizes} samples, compared by hashes): {found}. {chosen}"


def drop_text(quality: Quality, drop: float, low: float, high: float) -> str:
    """As in "0.25 (-0.10 to 0.60)"."""
    return f"{quality.difference(drop)} ({_interval(quality, low, high)})"


def _interval(quality: Quality, low: float, high: float) -> str:
    return f"{quality.difference(low)} to {quality.difference(high)}"


def _score(quality: Quality, e: Evaluation) -> str:
    return quality.text(e.quality) + (" %" if quality.kind == "share" else "")


def _unit(result: Run) -> str:
    known: Mapping[str, str] = {"size_bytes": "bytes", "latency_ms": "milliseconds (predicted)"}
    return " and ".join(known.get(column, column.replace("_", " ")) for column in result.objectives)
