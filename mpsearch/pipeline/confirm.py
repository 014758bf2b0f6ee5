"""A part of the front and the uniform allocations, scored on data that the search did not use: packed, on the compiled kernels.

Which points these are is decided on the search split, before the first of them is scored, so that the confirm split selects
nothing. A point that is dominated there is marked, and whether the difference in quality is significant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from mpsearch.allocation import Allocation
from mpsearch.divergence import LOSS_FLOOR
from mpsearch.engine.engine import FLOAT
from mpsearch.evaluation import REFINED, Confirmed, Evaluation
from mpsearch.pipeline.evaluators import ConfirmEvaluator
from mpsearch.pipeline.refine import RefiningEvaluator
from mpsearch.progress import phase
from mpsearch.runs.deadline import Deadline
from mpsearch.runs.noninferiority import smallest_non_inferior
from mpsearch.runs.run import Run

REFINED_PASSES = 3  # over the data, of the size of the confirm split's, that a refined point takes in addition to refining
NEIGHBOURS = 2  # points of the front on either side of the expected pick


def confirm(
    evaluate: ConfirmEvaluator | RefiningEvaluator,
    result: Run,
    n_points: int | None = None,
    scored: Callable[[Callable[[], list[Confirmed]]], None] = lambda compared: None,
    deadline: Deadline | None = None,
    refine_seconds: float = 0.0,
) -> list[Confirmed]:
    """Score points of the front, then the uniform allocations, each from large to small, on the confirm split.

    Parameters
    ----------
    n_points
        See `selected`.
    scored
        Called after each point with a function that compares all points so far.
    deadline
        When this should end: then the expected pick and the uniform allocations are scored first, and of the other points as many
        as time allows. `None`: no limit.
    refine_seconds
        About how long a point takes to refine; none is refined if those that are always scored would end too late.

    Returns
    -------
    list of Confirmed
        Points of the front, then uniform allocations, each from small to large.
    """
    front, uniform = selected(result, n_points), result.unrefined.uniform
    deadline = deadline or Deadline()
    if deadline.seconds is not None:
        evaluate, front = _in_time(evaluate, result, front, deadline, refine_seconds)
    points = [*((e, None) for e in front), *((e, scheme) for scheme, e in uniform)]
    order = [*reversed(points[: len(front)]), *reversed(points[len(front) :])]  # as the points are tested for non-inferiority
    with phase("confirm", len(points) + 1) as advance:
        baseline = evaluate(FLOAT, "float")
        advance("float")
        known: dict[Allocation, Evaluation] = {}

        def compared() -> list[Confirmed]:
            measured = list(known.values())
            so_far = [(known[e.allocation], scheme) for e, scheme in points if e.allocation in known]
            return [_compared(evaluate, e, scheme, baseline, measured, result) for e, scheme in so_far]

        for point, _ in order:
            known[point.allocation] = evaluate(point.allocation, point.origin)
            advance(f"{point.average_bits:.2f} bits")
            scored(compared)
    return compared()


def _in_time(
    evaluate: ConfirmEvaluator | RefiningEvaluator,
    result: Run,
    front: tuple[Evaluation, ...],
    deadline: Deadline,
    refine_seconds: float,
) -> tuple[ConfirmEvaluator | RefiningEvaluator, tuple[Evaluation, ...]]:
    """Score what always is scored; the evaluator, and the part of the front, for which time is left then.

    Points are taken in the order of `selected`, whatever the scores are, so that the confirm split selects nothing.
    """
    plain = evaluate.evaluate if isinstance(evaluate, RefiningEvaluator) else evaluate
    seconds = plain(FLOAT, "float").seconds
    result = result.unrefined
    pick = smallest_non_inferior(result, result.max_drop, split="search").point
    always = {e.allocation: e for e in (pick, *(e for _, e in result.uniform))}
    if evaluate is not plain and not any(e.origin == REFINED for e in plain.log):
        n = len(always)
        if deadline.affordable(n, refine_seconds + REFINED_PASSES * seconds) < n:
            deadline.leave_out("refinement")
            evaluate = plain
    with phase("confirm first", len(always)) as advance:
        for point in always.values():
            evaluate(point.allocation, point.origin)
            advance(f"{point.average_bits:.2f} bits")
    of_always = [e for e in plain.log if e.allocation in always and (e.split == "confirm" or e.origin == REFINED)]
    each = sum(e.seconds for e in of_always) / len(always)
    others = [i for i in _spread(_axes(front, result), len(front)) if front[i].allocation not in always]
    n = deadline.affordable(len(others), each)
    if n < len(others):
        deadline.leave_out(f"{len(others) - n} of {len(front)} points of the front")
    taken = {front[i].allocation for i in others[:n]} | always.keys()
    return evaluate, tuple(e for e in front if e.allocation in taken)


def selected(result: Run, n_points: int | None) -> tuple[Evaluation, ...]:
    """The points of the front to confirm, cheapest first.

    `n_points` of them are evenly spread over costs and ln loss: the two ends, then repeatedly the point that is farthest from all
    that are taken (Gonzalez 1985, "Clustering to Minimize the Maximum Intercluster Distance"). The others are the smallest point
    that is not inferior by the search split's estimate, with its neighbours, and all that are confirmed already. `None`: the
    whole front.
    """
    result = result.unrefined  # else what was refined already would decide what is refined next
    front = result.front
    if n_points is None or len(front) <= n_points:
        return front
    known = result.on("confirm")
    taken = {i for i, e in enumerate(front) if e.allocation in known}
    if n_points:
        expected = front.index(smallest_non_inferior(result, result.max_drop, split="search").point)
        taken |= set(range(max(expected - NEIGHBOURS, 0), min(expected + NEIGHBOURS + 1, len(front))))
        taken |= set(_spread(_axes(front, result), n_points))
    return tuple(front[i] for i in sorted(taken))


def _axes(front: Sequence[Evaluation], result: Run) -> NDArray[np.float64]:
    """Costs and ln loss of each point, `[n_points, n_axes]`."""
    columns = [[e.cost(column) for e in front] for column in result.objectives]
    return np.array([*columns, np.log(np.maximum([e.loss for e in front], LOSS_FLOOR))]).T


def _spread(points: NDArray[np.float64], n: int) -> list[int]:
    """Indices of `n` of `points` `[n_points, n_axes]`, each axis scaled to 0…1: the first, the last, then the farthest."""
    scaled = (points - points.min(0)) / np.maximum(np.ptp(points, axis=0), 1e-300)
    taken = list(dict.fromkeys([0, len(points) - 1]))[:n]
    while len(taken) < n:
        distances = np.linalg.norm(scaled[:, None] - scaled[taken], axis=2).min(1)
        taken.append(int(distances.argmax()))
    return taken


def _compared(
    evaluate: ConfirmEvaluator | RefiningEvaluator,
    point: Evaluation,
    scheme: str | None,
    baseline: Evaluation,
    points: Sequence[Evaluation],
    result: Run,
) -> Confirmed:
    quality = result.quality
    rivals = [e for e in points if e.costs_at_most(point, result.objectives) and e.loss < point.loss and e.feasible]
    rival = min(rivals, key=lambda e: e.cost(result.objectives[0]), default=None)
    significant = rival is not None and (
        quality.paired_drop(evaluate.qualities(rival.allocation), evaluate.qualities(point.allocation))[2] < 0
    )
    return Confirmed(point, scheme, *point.drop_from(baseline, quality), rival, significant)
