"""What a study begins with: the uniform allocations, and exact solutions of the additive problem along the front."""

from __future__ import annotations

import numpy as np

from mpsearch.allocation import Allocation, SearchSpace
from mpsearch.budget import feasible
from mpsearch.costs.base import mixed
from mpsearch.optimize import knapsack
from mpsearch.samplers.base import Floats, Problem


class Seeds:
    """The seeds of a study, in order: the uniform allocations within the budgets, then at most `n` knapsack solutions.

    With two objectives the solutions are those of each, and of both in equal parts.

    Attributes
    ----------
    allocations
        The seeds, distinct.
    infeasible
        The uniform allocations beyond the budgets: evaluated for comparison, but no trials.
    """

    def __init__(self, problem: Problem, n: int) -> None:
        space = problem.space
        uniform = uniform_allocations(problem.full_space)
        within = [a for a in uniform if feasible(problem.all_budgets, space.choice(a))]
        self.infeasible = [a for a in uniform if a not in within]
        self._origins = dict.fromkeys(within, "uniform")
        tables = [space.storage_bits if table.column == "size_bytes" else table.values for table in problem.objectives]
        if len(tables) > 1:
            tables.append(mixed(tables, [1.0] * len(tables), space.allowed))
        for values in tables:
            for allocation in knapsack_seeds(problem, n // len(tables), values):
                self._origins.setdefault(allocation, "knapsack")
        self.allocations = list(self._origins)

    def origin(self, allocation: Allocation) -> str:
        """Who proposes an allocation of the study: "uniform", "knapsack" or "sampler"."""
        return self._origins.get(allocation, "sampler")


def uniform_allocations(space: SearchSpace) -> list[Allocation]:
    """The uniform allocation of each scheme, distinct (pins can make them equal)."""
    return list(dict.fromkeys(space.uniform(scheme) for scheme in space.scheme_names))


def knapsack_seeds(problem: Problem, n: int, values: Floats | None = None) -> list[Allocation]:
    """At most `n` (0, or 2 and more) exact solutions of the additive problem, evenly spread in cost within the budgets.

    `values` `[n_groups, n_schemes]` is the objective's cost table, `None` the stored bits. The order is van der Corput's: any
    first few are spread too, so that a short run sees the whole front.
    """
    if n < 2:
        return []
    space = problem.space
    values = space.storage_bits if values is None else values
    limit = np.inf
    # A budget on the objective (in whichever unit) moves the upper end, so that all seeds fall on this side of it.
    for budget in problem.budgets:
        scale = budget.table.values.sum() / values.sum()  # not entry by entry: what costs nothing is 0 in both
        if np.allclose(budget.table.values, scale * values, atol=0):
            limit = min(limit, budget.capacity / scale)
    solutions = knapsack.front(problem.losses, values, n, limit)
    spread = sorted(range(len(solutions)), key=lambda i: f"{i:b}"[::-1])
    return list(dict.fromkeys(space.allocation(problem.feasible.repair(solutions[i])) for i in spread))
