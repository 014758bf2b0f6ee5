"""The smallest point of a front whose quality is not worse than the float model's by more than a margin.

The search split fixes a sequence of points: those of the front that are to be confirmed, from the largest cost down. On the
confirm split they are tested in this order until the upper limit of a drop's 95 % interval exceeds `max_drop`. Each is a
one-sided test of inferiority at 2.5 %, and because a test is made only where all before it have passed, the chance of naming a
point that is worse by more than `max_drop` is 2.5 % as well (fixed-sequence testing: Maurer, Hothorn and Lehmacher 1995; Wiens
2003, Pharmaceutical Statistics 2, 211-215).

Where no point passes, because the split has too few samples, the same sequence is followed by the estimated drops instead: the
point that comes out is *undecided*.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mpsearch.errors import InputError
from mpsearch.evaluation import Evaluation
from mpsearch.intervals import pairs_to_show
from mpsearch.quality import Quality
from mpsearch.runs.run import Run


@dataclass(frozen=True)
class NonInferior:
    """What the sequence says: `point` is the evaluation on the search split, `drop` to `drop_high` those on `split`.

    `decided`: the drop's upper limit is at most `max_drop`. `within`: at least its estimate is; neither holds only where the
    first point of the sequence drops by more already. `tested` are the points that were tested, in the order tested, of a
    sequence of `n_points`; `n_samples` is what `split` has, and `n_needed` about what it takes to decide on this point (`None`:
    it is decided, or no number of samples would do).
    """

    point: Evaluation
    split: str
    max_drop: float
    drop: float
    drop_low: float
    drop_high: float
    decided: bool
    within: bool
    tested: tuple[Evaluation, ...]
    n_points: int
    n_samples: int
    n_needed: int | None


def smallest_non_inferior(
    result: Run, max_drop: float, points: Sequence[Evaluation] | None = None, split: str = "confirm"
) -> NonInferior:
    """Of `points` (of the front, cheapest first; `None`: all of it) the last that passes; see above.

    Where none of them is confirmed, or the float model is not, or with `split="search"`, all points count, with the estimated
    drops on the search split. Raises `InputError` where there is no point, or no score of the float model.
    """
    points = result.front if points is None else points
    confirmed = result.on("confirm") if split == "confirm" and result.baseline("confirm") else {}
    known = [e for e in points if e.allocation in confirmed]
    split, points = ("confirm", known) if known else ("search", points)
    baseline = result.baseline(split)
    if not points or baseline is None:
        raise InputError("The run has no measured point and float model yet. Resume it: mpsearch search run=<folder>.")
    sequence = [(e, confirmed[e.allocation] if split == "confirm" else e) for e in reversed(points)]
    drops = [measured.drop_from(baseline, result.quality) for _, measured in sequence]
    n_passed = _leading([high <= max_drop for _, _, high in drops]) if split == "confirm" else 0
    n_within = _leading([drop <= max_drop for drop, _, _ in drops])
    chosen = max((n_passed or n_within) - 1, 0)
    drop, low, high = drops[chosen]
    n = baseline.n_samples
    return NonInferior(
        point=sequence[chosen][0],
        split=split,
        max_drop=max_drop,
        drop=drop,
        drop_low=low,
        drop_high=high,
        decided=n_passed > 0,
        within=n_passed > 0 or n_within > 0,
        tested=tuple(e for e, _ in sequence[: n_passed + 1]) if split == "confirm" else (),
        n_points=len(sequence),
        n_samples=n,
        n_needed=None if n_passed else needed(result.quality, max_drop, drop, high, n),
    )


def needed(quality: Quality, max_drop: float, drop: float, high: float, n: int) -> int | None:
    """About how many samples bring the upper limit `high` of an estimated `drop`, found with `n`, down to `max_drop`.

    The half-width is taken to fall with the root of n; a share needs as many as a sample without a change does at least.
    `None`: no number does.
    """
    if drop >= max_drop or not math.isfinite(high):
        return None
    scaled = math.ceil(n * ((high - drop) / (max_drop - drop)) ** 2)
    return max(scaled, pairs_to_show(max_drop)) if quality.kind == "share" and max_drop > 0 else scaled


def _leading(passed: Sequence[bool]) -> int:
    """How many are true before the first that is not."""
    return next((i for i, ok in enumerate(passed) if not ok), len(passed))
