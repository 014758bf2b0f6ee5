"""Which point of a front the user wants: the knee, the best within a size, or the smallest that is good enough."""

from __future__ import annotations

from typing import Any

import numpy as np

from mpsearch.costs.size import parse_bytes
from mpsearch.errors import InputError
from mpsearch.evaluation import Evaluation
from mpsearch.pareto import knee
from mpsearch.result import SearchResult


def pick(
    result: SearchResult,
    *,
    max_bytes: str | float | None = None,
    bits: float | None = None,
    max_ms: float | None = None,
    min_accuracy: float | None = None,
    max_perplexity: float | None = None,
) -> Evaluation:
    """A point of the front (its evaluation on the search split).

    The lowest loss within `max_bytes`, `bits` (average, at most) and `max_ms` (measured on the confirm split); with
    `min_accuracy` (whatever the task measures, where higher is better) or `max_perplexity` the cheapest whose quality on the
    confirm split (on the search split where not all of the front was confirmed) is at least that good, which makes that quality a
    little optimistic, for it was selected on; without any of them the knee.
    """
    front = result.front
    if not front:
        raise InputError("The run has no point to pick yet. Let the search go on: mpsearch search run=<folder>.")
    if all(limit is None for limit in (max_bytes, bits, max_ms, min_accuracy, max_perplexity)):
        costs = np.array([[e.cost(column) for column in result.objectives] for e in front])
        return front[knee((costs / np.maximum(np.ptp(costs, axis=0), 1e-300)).sum(1), np.array([e.loss for e in front]))]
    confirmed = result.on("confirm")
    if max_bytes is not None:
        front = _within(front, [e.size_bytes for e in front], parse_bytes(max_bytes), "bytes")
    if bits is not None:
        front = _within(front, [e.average_bits for e in front], _number("bits", bits), "bits")
    if max_ms is not None:
        times = [confirmed[e.allocation].measured_ms if e.allocation in confirmed else None for e in front]
        if any(ms is None for ms in times):
            raise InputError(
                "The front of this run was not timed, so pick.max_ms is of no use. Go on with: mpsearch search run=…"
            )
        front = _within(front, [ms or 0.0 for ms in times], _number("max_ms", max_ms), "ms")
    quality = result.quality
    asked, limit, other, unasked = "min_accuracy", min_accuracy, "max_perplexity", max_perplexity
    if quality.sign < 0:
        asked, limit, other, unasked = other, unasked, asked, limit
    if unasked is not None:
        raise InputError(f"The quality of this run is {quality.name}: give pick.{asked}, not pick.{other}.")
    if limit is None:
        return min(front, key=lambda e: e.loss)
    wanted = _number(asked, limit)
    all_confirmed = all(e.allocation in confirmed for e in front)  # else the splits would be mixed
    qualities = [(confirmed[e.allocation] if all_confirmed else e).quality for e in front]
    good = [e for e, found in zip(front, qualities, strict=True) if quality.sign * (found - wanted) >= 0]
    if not good:
        best = f"the best has {quality.sign * max(quality.sign * found for found in qualities):.4f}"
        raise InputError(
            f"No point of the front that fits has {quality.name} {'>=' if quality.sign > 0 else '<='} {limit}; {best}."
        )
    return good[0]


def _within(front: list[Evaluation], values: list[float], limit: float, unit: str) -> list[Evaluation]:
    if min(values) > limit:
        raise InputError(
            f"No point of the front has at most {limit:,.10g} {unit}; the least is {min(values):,.10g} {unit}. Search with "
            "smaller schemes or a budget."
        )
    return [e for e, value in zip(front, values, strict=True) if value <= limit]


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise InputError(f"pick.{name} is a number; '{value}' came.") from None
