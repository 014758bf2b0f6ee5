"""The front and the uniform allocations, scored again on data that the search never saw: packed, on the compiled kernels.

Confirmation never filters, for that would be selecting on it: a point that is overtaken there is marked, and whether the
difference is more than chance is said beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpsearch.engine import FLOAT
from mpsearch.evaluation import Evaluation
from mpsearch.intervals import paired_interval
from mpsearch.progress import phase
from mpsearch.result import SearchResult
from mpsearch.search import Evaluator


@dataclass(frozen=True)
class Confirmed:
    """A point on the confirm split, beside the float model and its rivals there.

    `scheme` names a uniform allocation, `None` a point of the front. `drop` is how much worse than the float model it is, with
    its paired 95 % interval. `overtaken_by` is the cheapest measured point that costs no more and has a lower loss (`None`: not
    overtaken), `overtaken_surely` says that its quality is better by more than the paired interval of their difference.
    """

    evaluation: Evaluation
    scheme: str | None
    drop: float
    drop_low: float
    drop_high: float
    overtaken_by: Evaluation | None
    overtaken_surely: bool

    @property
    def significant(self) -> bool:
        """Whether there is a drop beyond chance: its interval lies above 0. That it is not is no proof that there is none."""
        return self.drop_low > 0


def confirm(evaluate: Evaluator, result: SearchResult) -> list[Confirmed]:
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
    result: SearchResult,
) -> Confirmed:
    quality = result.quality
    rivals = [e for e in points if e.no_dearer(point, result.objectives) and e.loss < point.loss and e.feasible]
    rival = min(rivals, key=lambda e: e.cost(result.objectives[0]), default=None)
    surely = False
    if rival is not None:
        ours, theirs = (evaluate.qualities(e.allocation) for e in (point, rival))
        low, high = paired_interval(theirs, ours)
        surely = low > 0 if quality.sign > 0 else high < 0
    return Confirmed(point, scheme, *point.drop_from(baseline, quality), overtaken_by=rival, overtaken_surely=surely)
