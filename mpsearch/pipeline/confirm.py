"""The front and the uniform allocations, scored again on data that the search never saw: packed, on the compiled kernels.

Nothing is filtered here, for that would select points on the confirm split: a point that is dominated there is marked, together
with whether the difference in quality is significant.
"""

from __future__ import annotations

from collections.abc import Sequence

from mpsearch.engine.engine import FLOAT
from mpsearch.evaluation import Confirmed, Evaluation
from mpsearch.pipeline.search import Evaluator
from mpsearch.progress import phase
from mpsearch.runs.run import Run


def confirm(evaluate: Evaluator, result: Run) -> list[Confirmed]:
    """Score the front's points and the uniform allocations on the confirm split; smallest first, front before uniform."""
    named: list[tuple[Evaluation, str | None]] = [*((e, None) for e in result.front), *((e, s) for s, e in result.uniform)]
    with phase("confirm", len(named) + 1) as advance:
        baseline = evaluate(FLOAT, "float", "confirm")
        advance("float")
        measured = []
        for point, scheme in named:
            measured.append((evaluate(point.allocation, point.origin, "confirm"), scheme))
            advance(f"{point.average_bits:.2f} bits")
    points = [e for e, _ in measured]
    return [_compare(evaluate, e, scheme, baseline, points, result) for e, scheme in measured]


def _compare(
    evaluate: Evaluator,
    point: Evaluation,
    scheme: str | None,
    baseline: Evaluation,
    points: Sequence[Evaluation],
    result: Run,
) -> Confirmed:
    quality = result.quality
    rivals = [e for e in points if e.costs_at_most(point, result.objectives) and e.loss < point.loss and e.feasible]
    rival = min(rivals, key=lambda e: e.cost(result.objectives[0]), default=None)
    significant = False
    if rival is not None:
        ours, theirs = (evaluate.qualities(e.allocation) for e in (point, rival))
        significant = quality.paired_drop(theirs, ours)[2] < 0
    return Confirmed(point, scheme, *point.drop_from(baseline, quality), rival, significant)
