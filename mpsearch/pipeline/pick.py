"""Which point of a front the user wants: the smallest non-inferior one, the best within limits, or the smallest good enough."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mpsearch.costs.size import parse_bytes
from mpsearch.errors import InputError
from mpsearch.evaluation import Evaluation
from mpsearch.runs.noninferiority import smallest_non_inferior
from mpsearch.runs.run import Run


def pick(
    result: Run,
    *,
    max_bytes: str | float | None = None,
    bits: float | None = None,
    max_ms: float | None = None,
    max_drop: float | None = None,
    min_quality: float | None = None,
    max_quality: float | None = None,
    point: str | None = None,
) -> Evaluation:
    """A point of the front (its evaluation on the search split).

    Parameters
    ----------
    max_bytes, bits, max_ms
        Limits on the size, the average bits, and the milliseconds measured on the confirm split.
    max_drop
        Of the confirmed points within the limits, the smallest that is not inferior to the float model by more than this.
    min_quality, max_quality
        Of the confirmed points the cheapest whose quality is at least (where lower is better: at most) this on the confirm split;
        where none is confirmed, of all points on the search split.
    point
        The id of an allocation (`Allocation.id`), of all that were measured.

    With limits alone the point of lowest loss is returned; without any argument the smallest non-inferior one by the run's own
    `max_drop`. A point that the confirm split chose looks a little better there than it is.

    Raises `InputError` where no point fits.
    """
    if point is not None:
        if others := [x for x in (max_bytes, bits, max_ms, max_drop, min_quality, max_quality) if x is not None]:
            raise InputError(f"pick.point names one point; got {len(others)} more of pick's limits. Give it alone.")
        return _by_id(result, str(point))
    front: Sequence[Evaluation] = result.front
    if not front:
        raise InputError("The run has no point to pick yet. Resume the search: mpsearch search run=<folder>.")
    limits = (max_bytes, bits, max_ms, max_drop, min_quality, max_quality)
    if all(limit is None for limit in limits):
        return smallest_non_inferior(result, result.max_drop).point
    confirmed = result.on("confirm")
    if max_bytes is not None:
        front = _within(front, [e.size_bytes for e in front], parse_bytes(max_bytes), "bytes")
    if bits is not None:
        front = _within(front, [e.average_bits for e in front], _number("bits", bits), "bits")
    if max_ms is not None:
        known = [(e, confirmed[e.allocation].measured_ms) for e in front if e.allocation in confirmed]
        timed = [(e, ms) for e, ms in known if ms is not None]
        if not timed:
            raise InputError(
                "No point that fits was timed, so pick.max_ms is of no use. Resume the run: mpsearch search run=<folder>."
            )
        front = _within([e for e, _ in timed], [ms for _, ms in timed], _number("max_ms", max_ms), "ms")
    if sum(x is not None for x in (max_drop, min_quality, max_quality)) > 1:
        raise InputError("Give one of pick.max_drop, pick.min_quality and pick.max_quality; got more than one.")
    if max_drop is not None:
        return _not_inferior(result, _number("max_drop", max_drop), front)
    if min_quality is not None or max_quality is not None:
        return _good_enough(result, front, min_quality, max_quality)
    return min(front, key=lambda e: e.loss)


def _by_id(result: Run, asked: str) -> Evaluation:
    for allocation, evaluation in result.on("search").items():
        if allocation.id == asked:
            return evaluation
    raise InputError(f"No allocation of this run has the id '{asked}'. Give the one that mpsearch solve printed.")


def _not_inferior(result: Run, max_drop: float, front: Sequence[Evaluation]) -> Evaluation:
    if not 0 <= max_drop < math.inf:
        raise InputError(f"pick.max_drop is 0 or more; got {max_drop:g}.")
    answer, quality = smallest_non_inferior(result, max_drop, front), result.quality
    if not answer.within:
        raise InputError(
            f"No point of the front that fits has a {quality.drop_word} of at most {quality.drop_text(max_drop)}: on the "
            f"{answer.split} split the largest one has {quality.drop_text(answer.drop)}. Give a larger pick.max_drop, or search "
            "with larger schemes."
        )
    return answer.point


def _good_enough(result: Run, front: Sequence[Evaluation], min_quality: float | None, max_quality: float | None) -> Evaluation:
    quality, confirmed = result.quality, result.on("confirm")
    asked, limit, other, unasked = "min_quality", min_quality, "max_quality", max_quality
    if quality.sign < 0:
        asked, limit, other, unasked = other, unasked, asked, limit
    if unasked is not None:
        better = "higher" if quality.sign > 0 else "lower"
        raise InputError(
            f"The quality of this run is {quality.name}, and {better} is better: give pick.{asked}, not pick.{other}."
        )
    wanted = _number(asked, limit)
    known = [e for e in front if e.allocation in confirmed]
    front = known or front  # one split, not a mixture of both
    qualities = [(confirmed[e.allocation] if known else e).quality for e in front]
    good = [e for e, value in zip(front, qualities, strict=True) if quality.sign * (value - wanted) >= 0]
    if not good:
        best = f"the best has {quality.sign * max(quality.sign * value for value in qualities):.4f}"
        split = "confirm" if known else "search"
        raise InputError(
            f"No point of the front that fits has {quality.name} {'>=' if quality.sign > 0 else '<='} {wanted:g} on the {split} "
            f"split; {best}."
        )
    return good[0]


def _within(front: Sequence[Evaluation], values: list[float], limit: float, unit: str) -> Sequence[Evaluation]:
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
        raise InputError(f"pick.{name} must be a number; got '{value}'.") from None
