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
) -> Evaluation:
    """A point of the front (its evaluation on the search split).

    The lowest loss within `max_bytes`, `bits` (average, at most) and `max_ms` (measured on the confirm split); with
    `min_accuracy` the cheapest whose quality on the confirm split (on the search split where not all of the front was confirmed)
    is at least that, which makes that quality a little optimistic, for it was selected on; without any of them the knee.
    """
    front = result.front
    if not front:
        raise InputError("The run has no point to pick yet. Let the search go on: mpsearch search run=<folder>.")
    if max_bytes is None and bits is None and max_ms is None and min_accuracy is None:
        return front[knee(np.array([e.cost(result.objective) for e in front]), np.array([e.loss for e in front]))]
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
    if min_accuracy is None:
        return front[-1]
    least = _number("min_accuracy", min_accuracy)
    all_confirmed = all(e.allocation in confirmed for e in front)  # else the splits would be mixed
    qualities = [(confirmed[e.allocation] if all_confirmed else e).quality for e in front]
    good = [e for e, quality in zip(front, qualities, strict=True) if quality >= least]
    if not good:
        best = f"the best has {max(qualities):.4f}"
        raise InputError(f"No point of the front that fits has {result.quality_name} >= {min_accuracy}; {best}.")
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
