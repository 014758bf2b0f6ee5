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
    min_accuracy: float | None = None,
) -> Evaluation:
    """A point of the front (its evaluation on the search split).

    The lowest loss within `max_bytes` and `bits` (average, at most); with `min_accuracy` the smallest whose quality on the
    confirm split (on the search split where not all of the front was confirmed) is at least that, which makes that quality a
    little optimistic, for it was selected on; without any of them the knee.
    """
    front = result.front
    if not front:
        raise InputError("The run has no point to pick yet. Let the search go on: mpsearch search run=<folder>.")
    if max_bytes is None and bits is None and min_accuracy is None:
        return front[knee(np.array([e.size_bytes for e in front]), np.array([e.loss for e in front]))]
    if max_bytes is not None:
        limit: float = parse_bytes(max_bytes)
        front = _within(
            front, [e.size_bytes <= limit for e in front], f"at most {limit:,} bytes", f"{front[0].size_bytes:,} bytes"
        )
    if bits is not None:
        limit = _number("bits", bits)
        front = _within(
            front, [e.average_bits <= limit for e in front], f"at most {bits} bits", f"{front[0].average_bits:.3f} bits"
        )
    if min_accuracy is None:
        return front[-1]
    least = _number("min_accuracy", min_accuracy)
    confirmed = result.on("confirm")
    all_confirmed = all(e.allocation in confirmed for e in front)  # else the splits would be mixed
    qualities = [(confirmed[e.allocation] if all_confirmed else e).quality for e in front]
    good = [e for e, quality in zip(front, qualities, strict=True) if quality >= least]
    if not good:
        best = f"the best has {max(qualities):.4f}"
        raise InputError(f"No point of the front that fits has {result.quality_name} >= {min_accuracy}; {best}.")
    return good[0]


def _within(front: list[Evaluation], fits: list[bool], asked: str, smallest: str) -> list[Evaluation]:
    if not any(fits):
        raise InputError(
            f"No point of the front has {asked}; the smallest has {smallest}. Search with smaller schemes or a budget."
        )
    return [e for e, ok in zip(front, fits, strict=True) if ok]


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise InputError(f"pick.{name} is a number; '{value}' came.") from None
