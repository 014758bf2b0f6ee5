"""The additive solution: the allocation of least summed sensitivity within budgets, with which proposals are compared."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpsearch.allocation import Allocation, SearchSpace
from mpsearch.budget import Budget, restricted
from mpsearch.optimize import knapsack


def solution(space: SearchSpace, losses: np.ndarray, budgets: Sequence[Budget]) -> Allocation:
    """The allocation of least additive loss within all `budgets`.

    Exact for one budget. For several, the solution for each budget alone is repaired to keep the others; the best is returned.
    A budget on a peak excludes choices, so that it stays exact together with others.
    """
    space, budgets = restricted(space, budgets)
    return space.allocation(solved(np.where(space.allowed, losses, np.inf), budgets))


def solved(losses: np.ndarray, budgets: Sequence[Budget], max_states: int = knapsack.MAX_STATES) -> np.ndarray:
    """Scheme indices `[n_groups]` of least total `losses` `[n_groups, n_schemes]` within budgets on costs that add up."""
    if not budgets:
        return losses.argmin(axis=1)
    tables, capacities = [budget.table.values for budget in budgets], [budget.capacity for budget in budgets]
    alone = (knapsack.solve(losses, t, capacity, max_states) for t, capacity in zip(tables, capacities, strict=True))
    repaired = [knapsack.repair(choice, losses, tables, capacities) for choice in alone]
    return min(repaired, key=lambda choice: knapsack.total(losses, choice))
