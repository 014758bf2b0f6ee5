"""The results of a run in sentences: each number with its split and, where it is a quality, its interval."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from mpsearch.evaluation import Evaluation
from mpsearch.graph.unsearched import sentence as unsearched_sentence
from mpsearch.intervals import FEWEST, Z, is_approximate
from mpsearch.optimize.pareto import hypervolume
from mpsearch.quality import Quality
from mpsearch.runs.noninferiority import NonInferior, smallest_non_inferior
from mpsearch.runs.run import Run

MAX_DOMINATED = 4  # uniform allocations with a sentence of their own
MUCH_FLOAT = 0.05  # of the parameters: more that stay float is worth a warning
UNITS = {"size_bytes": "bytes", "latency_ms": "milliseconds (predicted)"}


def findings(run: Run, picked: Evaluation, confirmed: pd.DataFrame | None) -> list[str]:
    """A list item each; `confirmed` is the table of `confirm.csv`, where there is one."""
    sentences = [
        f"The picked point has {picked.average_bits:.2f} bits per weight on average ({picked.average_bits_all:.2f} over all "
        f"parameters) and {picked.size_bytes:,} bytes, {100 * picked.fraction:.1f} % of the float32 model."
    ]
    if warning := overfit_warning(run):
        sentences.append(f"**{warning}**")
    if run.baseline() is not None:
        sentences.append(non_inferior_sentence(run, smallest_non_inferior(run, run.max_drop)))
    dominated = uniform_sentences(run)
    sentences += [*accepted_sentences(run), *dominated[:MAX_DOMINATED]]
    if len(dominated) > MAX_DOMINATED:
        sentences.append(f"{len(dominated) - MAX_DOMINATED} more uniform allocations are dominated; see `index.html`.")
    volume = run_hypervolume(run)
    if volume is not None:
        sentences.append(
            "Hypervolume on the search split (average bits x log10 loss, against the largest and the smallest uniform "
            f"allocation): {volume:.3f}."
        )
    if confirmed is not None and len(confirmed):
        front = confirmed[confirmed.scheme == ""]
        dominated = front[front.dominated_by_bytes.notna()]
        sentences.append(
            f"On the confirm split {len(dominated)} of {len(front)} points of the front are dominated in loss by a point that "
            f"costs at most as much; for {int(dominated.significantly_dominated.sum())} of them that point's "
            f"{run.quality_name} is significantly better, too."
        )
    return [f"- {sentence}" for sentence in sentences]


def non_inferior_sentence(run: Run, answer: NonInferior) -> str:
    """Which point is the smallest non-inferior one, what decided it, and what the samples cannot decide."""
    quality, point, drop = run.quality, answer.point, run.quality.drop_word
    margin = quality.drop_text(answer.max_drop)
    measured = f"{quality.drop_text(answer.drop)} (95 % interval {_interval(quality, answer.drop_low, answer.drop_high)})"
    size = f"{point.average_bits:.2f} bits ({point.size_bytes:,} bytes)"
    if answer.decided:
        until = f"until the upper limit of a {drop} exceeded {margin}"
        if len(answer.tested) == answer.n_points and point == answer.tested[-1]:
            until = "and all of them passed"
        return (
            f"The smallest point that is not inferior to the float model by more than {margin} has {size}: on the confirm split "
            f"its {run.quality_name} has a {drop} of {measured}. The search split fixed the order of the points; the confirm "
            f"split decided: {len(answer.tested)} of {answer.n_points} points were tested on it, from the largest down, {until}."
        )
    reason = f" by the {answer.n_samples:,} samples of the confirm split"
    if answer.split == "search":
        reason = ", because the front is not confirmed"
    undecided = f"Undecided: no point is shown to be within a {drop} of {margin} of the float model{reason}. "
    if not answer.within:
        return (
            f"{undecided}The largest point of the front, {size}, already has an estimated {drop} of {measured} on the "
            f"{answer.split} split."
        )
    enough = f"; about {answer.n_needed:,} samples would decide on it" if answer.n_needed and answer.split == "confirm" else ""
    return (
        f"{undecided}The smallest point before the estimated {drop} exceeds that, from the largest down, has {size}: "
        f"{measured} on the {answer.split} split{enough}."
    )


def uniform_sentences(run: Run) -> list[str]:
    """Of each uniform allocation that the front dominates: by how much, on the confirm split, or else on the search split."""
    sentences, quality = [], run.quality
    split = "confirm" if any(e.allocation in run.on("confirm") for _, e in run.uniform) else "search"
    measured = run.on(split)
    front = [measured[e.allocation] for e in run.front if e.allocation in measured]
    for scheme, e in [(name, measured[e.allocation]) for name, e in run.uniform if e.allocation in measured]:
        better = [x for x in front if x.costs_at_most(e, run.objectives) and x.loss < e.loss]
        if better:
            best = min(better, key=lambda x: x.loss)
            sentences.append(
                f"On the {split} split uniform {scheme} is dominated: at no more {_unit(run)} a point of the front has a loss of "
                f"{best.loss:.3g} instead of {e.loss:.3g}, and {quality.name} {score_text(quality, best)} instead of "
                f"{score_text(quality, e)}."
            )
    return sentences


def accepted_sentences(run: Run) -> list[str]:
    """How many points of the front are proposals shown to be better than the additive solution, and up to which size."""
    proposals = [e for e in run.evaluations if e.split == "search" and e.origin == "sampler"]
    front = {e.allocation for e in run.front}
    better = [e for e in proposals if e.accepted and e.allocation in front]
    if not proposals:
        return []
    if not better:
        return [
            "No proposal was shown to be better than the additive solution of its size, the allocation of least summed "
            "sensitivity: the front consists of such solutions and uniform allocations."
        ]
    return [
        f"{len(better)} of {len(front)} points of the front, of at most {max(e.average_bits for e in better):.2f} bits, are "
        "proposals that samples of which no sampler was told show to be better than the additive solution of their size, the "
        "allocation of least summed sensitivity; the others are such solutions and uniform allocations."
    ]


def run_hypervolume(run: Run) -> float | None:
    """Hypervolume (`pareto.hypervolume`) of a front of sizes; `None` where fewer than two uniform allocations were measured."""
    uniform, front = run.uniform, run.front
    if len(uniform) < 2 or not front or not np.isfinite(uniform[0][1].loss) or list(run.objectives) != ["size_bytes"]:
        return None
    bits, losses = (np.array(values) for values in zip(*((e.average_bits, e.loss) for e in front), strict=True))
    return hypervolume(bits, losses, uniform[-1][1].average_bits, uniform[0][1].loss)


def budget_positions(run: Run, objective: str) -> Mapping[str, float]:
    """Name -> position on the axis of an objective, of the budgets on it; in bytes also those on size in other units."""
    space, positions = run.space, {}
    in_bytes = {"bytes": 1.0, "bits": space.numel / 8, "fraction": space.size_bits() / 8}
    for name, limit in run.budgets.items():
        if objective == "size_bytes" and name in in_bytes:
            rest = space.other_bits / 8 if name == "bits" else 0.0
            positions[f"budget.{name} = {limit:,.10g}"] = limit * in_bytes[name] + rest
        elif name == objective:
            positions[f"budget.{name} = {limit:,.10g}"] = limit
    return positions


def times_differ(run: Run) -> bool:
    """Whether the forward passes of the confirmed points differ by more than repeated passes of one point do."""
    difference, spread = _times(run)
    return difference > spread


def times_sentence(run: Run) -> str:
    """Where forward passes were timed, and how much repeated ones differ; empty where none was."""
    places = sorted({e.measured_on for e in run.on("confirm").values() if e.measured_on})
    if not places:
        return ""
    difference, spread = _times(run)
    place = f" on {' and '.join(places)}; the quartiles of repeated passes are {spread:.2g} ms apart (median over the points)."
    if difference > spread:
        return f" Times are medians of forward passes{place}"
    return f" Times are left out, for the points' quartiles are only {difference:.2g} ms apart: medians of forward passes{place}"


def _times(run: Run) -> tuple[float, float]:
    """(interquartile range of the confirmed points' median times, median of their own interquartile ranges), milliseconds."""
    timed = [e for e in run.on("confirm").values() if e.measured_ms is not None]
    if not timed:
        return 0.0, 0.0
    low, high = np.percentile([e.measured_ms or 0.0 for e in timed], [25, 75])
    spreads = [(e.measured_ms_high or 0.0) - (e.measured_ms_low or 0.0) for e in timed]
    return float(high - low), float(np.median(spreads))


def overfit_warning(run: Run) -> str | None:
    """Where the float model is much better on the search split than on the confirm split; `None` where it is not.

    A share is compared by the 95 % interval of the difference of two independent proportions (Agresti and Caffo 2000), other
    qualities by a tenth of their value on the confirm split.
    """
    search, confirm, quality = run.baseline("search"), run.baseline("confirm"), run.quality
    if search is None or confirm is None:
        return None
    better = quality.sign * (search.quality - confirm.quality)
    significant, interval = better > 0.1 * abs(confirm.quality), ""
    if quality.kind == "share":
        p, q = ((e.quality * e.n_samples + 1) / (e.n_samples + 2) for e in (search, confirm))
        half = Z * math.sqrt(p * (1 - p) / (search.n_samples + 2) + q * (1 - q) / (confirm.n_samples + 2))
        significant, interval = p - q > half, f", {100 * better:.1f} points more (95 % interval from {100 * (p - q - half):.1f})"
    if not significant:
        return None
    return (
        f"The float model does much better on the search split ({run.quality_name} {score_text(quality, search)}, "
        f"{search.n_samples:,} samples) than on the confirm split ({score_text(quality, confirm)}, {confirm.n_samples:,} samples)"
        f"{interval}: it was probably trained on the search data. Losses on such data are too low, 5 to 13 times on the "
        "networks that this was measured on, and a front that is searched there may not hold elsewhere. Search on data that "
        "the model was not trained on."
    )


def warnings(run: Run) -> list[str]:
    """What weakens the run's statements: a float model trained on the search data, splits that overlap."""
    overfit, overlap = overfit_warning(run), run.identity.get("overlap")
    shared = [splits_sentence(overlap).replace("**", "")] if overlap and any(overlap["shared"].values()) else []
    return [*([overfit] if overfit else []), *shared]


def cautions(run: Run) -> list[str]:
    """What the reader of a page should know first: `warnings`, weights that stay float, and what the samples cannot decide."""
    said, confirm = warnings(run), run.baseline("confirm")
    about = run.identity.get("not_searched")
    if about and about["weights"] and about["float_bytes"] > MUCH_FLOAT * max(about["bytes"], 1):
        said.append(unsearched_sentence(about))
    if confirm is None:
        said.append("Nothing is confirmed yet: all numbers are of the search split, which selects the points.")
    elif run.front and not (answer := smallest_non_inferior(run, run.max_drop)).decided:
        said.append(f"Intervals are too wide to decide. {non_inferior_sentence(run, answer)}")
    if confirm is not None and is_approximate(confirm.n_samples):
        said.append(f"Intervals are approximate: {confirm.n_samples} independent samples; coverage needs at least {FEWEST}.")
    if wrong := [e for e in run.on("confirm").values() if not e.verified]:
        sizes = ", ".join(f"{e.size_bytes:,}" for e in wrong)
        said.append(f"The packed outputs of the points of {sizes} bytes differ from the simulated ones.")
    return said


def splits_sentence(overlap: Mapping[str, Any] | None) -> str:
    """Whether the splits are disjoint, from the result of `tasks.overlap.overlap` (`None`: they could not be compared)."""
    chosen = "The search split selects the front; the confirm split only measures it, except where a sentence says otherwise."
    if overlap is None:
        return f"Whether the splits share samples was not checked, for their samples cannot be told apart. {chosen}"
    shared = overlap["shared"]
    sizes = ", ".join(f"{count:,} {split}" for split, count in overlap["samples"].items())
    if not any(shared.values()):
        return f"The splits are disjoint: no input occurs in two of them ({sizes} samples, compared by hashes). {chosen}"
    counts = "; ".join(f"{count:,} of the {pair} split" for pair, count in shared.items() if count)
    return f"**The splits are not disjoint** ({sizes} samples, compared by hashes): {counts}. {chosen}"


def drop_text(quality: Quality, drop: float, low: float, high: float) -> str:
    """As in "0.25 (-0.10 to 0.60)"."""
    return f"{quality.difference(drop)} ({_interval(quality, low, high)})"


def _interval(quality: Quality, low: float, high: float) -> str:
    return f"{quality.difference(low)} to {quality.difference(high)}"


def score_text(quality: Quality, e: Evaluation) -> str:
    """The quality of an evaluation with its unit."""
    return quality.text(e.quality) + (" %" if quality.kind == "share" else "")


def _unit(run: Run) -> str:
    return " and ".join(UNITS.get(column, column.replace("_", " ")) for column in run.objectives)
