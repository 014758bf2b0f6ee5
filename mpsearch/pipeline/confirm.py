"""The front and the uniform allocations, scored on data that the search did not use: packed, on the compiled kernels.

Nothing is filtered, for that would select points on the confirm split: a point that is dominated there is marked, and whether the
difference in quality is significant.
"""

from __future__ import annotations

from collections.abc import Sequence

from mpsearch.engine.engine import FLOAT
from mpsearch.evaluation import Confirmed, Evaluation
from mpsearch.pipeline.evaluators import ConfirmEvaluator
from mpsearch.progress import phase
from mpsearch.runs.run import Run


def confirm(evaluate: ConfirmEvaluator, result: Run) -> list[Confirmed]:
    """Score the points of the front, then the uniform allocations, each from small to large, on the confirm split."""
    points = [(e, None) for e in result.front] + [(e, scheme) for scheme, e in result.uniform]
    with phase("confirm", len(points) + 1) as advance:
        baseline = evaluate(FLOAT, "float")
        advance("float")
        confirmed = []
        for point, _ in points:
            confirmed.append(evaluate(point.allocation, point.origin))
            advance(f"{point.average_bits:.2f} bits")
    schemes = (scheme for _, scheme in points)
    return [_compared(evaluate, e, scheme, baseline, confirmed, result) for e, scheme in zip(confirmed, schemes, strict=True)]


def _compared(
    evaluate: ConfirmEvaluator,
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
