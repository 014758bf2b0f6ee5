"""Solve a finished run again for budgets that it was not made for, from what it measured; then measure what comes out.

The sensitivities make it a knapsack, which takes milliseconds. Additive predictions are not to be trusted near a limit, so the
solution is measured on the search split like any other, and the best that was ever measured within the budgets is the answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpsearch.allocation import Allocation, SearchSpace
from mpsearch.budget import Budget
from mpsearch.costs.base import CostTable
from mpsearch.errors import InputError
from mpsearch.evaluation import Evaluation, SensitivityTable
from mpsearch.knapsack import repair
from mpsearch.knapsack import solve as solve_knapsack
from mpsearch.search import Evaluator

MOST_STEPS = 12  # of a bisection, each measured: the cost is known to 1 / 4096 of its range


def solution(space: SearchSpace, losses: np.ndarray, budgets: Sequence[Budget]) -> Allocation:
    """The allocation of least additive loss within all `budgets` (one or more).

    Exact for one budget. For several: of the solutions for each of them alone, brought back under the others, the best.
    """
    tables, rooms = [budget.table.values for budget in budgets], [budget.room for budget in budgets]
    found = [repair(solve_knapsack(losses, t, room), losses, tables, rooms) for t, room in zip(tables, rooms, strict=True)]
    return space.allocation(min(found, key=lambda choice: losses[np.arange(len(choice)), choice].sum()))


def best_within(evaluate: Evaluator, sensitivity: SensitivityTable, budgets: Sequence[Budget]) -> Evaluation:
    """Measure the solution for `budgets`; of all that was measured within them, the one of lowest loss."""
    space = sensitivity.space
    evaluate(solution(space, sensitivity.losses(), budgets), "knapsack")
    return min(_within(evaluate, space, budgets), key=lambda e: (e.loss, e.size_bytes))


def cheapest_within(
    evaluate: Evaluator, sensitivity: SensitivityTable, budgets: Sequence[Budget], objective: CostTable, max_drop: float
) -> Evaluation:
    """Of all that was measured within `budgets`, the cheapest whose quality is at most `max_drop` worse than the float model's.

    Bisects the cost between the cheapest allocation that keeps to it so far and the costliest below that does not, and measures
    the solution at each limit. The drop is that on the search split, on which the point is chosen, so that it flatters: what it
    is worth, confirmation says.

    Raises `InputError` where no allocation that was measured keeps to it.
    """
    space, losses, quality = sensitivity.space, sensitivity.losses(), evaluate.engine.quality
    baseline = next(e for e in evaluate.evaluations if e.origin == "float" and e.split == "search")

    def cost(e: Evaluation) -> float:
        return objective.of(space.choice(e.allocation))

    def drop(e: Evaluation) -> float:
        return e.drop_from(baseline, quality)[0]

    def keeps(e: Evaluation) -> bool:
        return bool(np.isfinite(e.loss)) and drop(e) <= max_drop + 1e-9

    def cheapest() -> Evaluation | None:
        return min((e for e in _within(evaluate, space, budgets) if keeps(e)), key=lambda e: (cost(e), e.loss), default=None)

    best = cheapest()
    if best is None:
        evaluate(solution(space, losses, budgets) if budgets else space.allocation(losses.argmin(axis=1)), "knapsack")
        best = cheapest()
    if best is None:
        drops = [drop(e) for e in _within(evaluate, space, budgets)]
        raise InputError(
            f"No allocation within the budgets has a {quality.drop_word} of at most {max_drop:g}; the least is "
            f"{min(drops, default=np.nan):.4g}. Allow more, raise a budget, or search with larger schemes."
        )
    low = objective.of(np.where(space.allowed, objective.values, np.inf).argmin(axis=1))
    for _ in range(MOST_STEPS):
        limit = Budget(objective, (low + cost(best)) / 2)
        try:
            tried = evaluate(solution(space, losses, [*budgets, limit]), "knapsack")
        except InputError:  # no allocation is within this limit and the budgets
            low = limit.limit
            continue
        if keeps(tried) and cost(tried) < cost(best):
            best = tried
        else:
            low = limit.limit
    return cheapest() or best


def _within(evaluate: Evaluator, space: SearchSpace, budgets: Sequence[Budget]) -> list[Evaluation]:
    measured = [e for e in evaluate.evaluations if e.split == "search" and e.origin != "float"]
    return [e for e in measured if all(budget.allows(space.choice(e.allocation)) for budget in budgets)]
