"""A budget is a limit on a cost; all of them hold for proposals, fronts and exports alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mpsearch.allocation import SearchSpace
from mpsearch.costs.base import Cost, CostTable
from mpsearch.errors import InfeasibleBudget, InputError, did_you_mean
from mpsearch.schemes.base import QuantScheme

# Costs are sums of floats; an allocation that meets its limit exactly must not fail by their last bit.
ROUNDING = 1e-12
WIDE = 2**20  # columns of a layer in which scales of whole channels weigh nothing


@dataclass(frozen=True)
class Budget:
    """`table.cost_of(choice) <= limit`."""

    table: CostTable
    limit: float

    def allows(self, choice: np.ndarray | Sequence[int]) -> bool:
        """Whether an allocation (scheme indices) is within this budget."""
        return self.table.cost_of(choice) <= self.limit * (1 + ROUNDING)

    @property
    def capacity(self) -> float:
        """What is left for the searched groups: the limit less the constant part. Of a cost that adds up."""
        return self.limit * (1 + ROUNDING) - self.table.constant

    def __str__(self) -> str:
        return f"{self.table.column} <= {self.limit:,.10g}"


def check_limits(limits: Mapping[str, Any], costs: Mapping[str, Cost], schemes: Mapping[str, QuantScheme]) -> None:
    """What can be said of limits before a model is loaded.

    Raises
    ------
    InputError
        A limit on no cost, or one that is no positive number or not in the cost's unit.
    InfeasibleBudget
        Fewer bits, or a smaller fraction of float32, than the smallest scheme stores in a layer so wide that its scales of a
        channel weigh nothing.
    """
    least, name = min((scheme.storage_bits((1, WIDE)) / WIDE, name) for name, scheme in schemes.items())
    bounds = {"average_bits": least, "fraction": least / 32}
    for cost, given in limits.items():
        if given is None:
            continue
        limit, column = _parsed(cost, given, costs), costs[cost].column
        bound = bounds.get(column, 0.0)
        if limit < 0.999 * bound:
            raise InfeasibleBudget(
                f"The budget {column} <= {limit:,.10g} is below the least there is, {bound:.4g} or more: every layer at {name}. "
                "Raise the budget, or add a smaller scheme."
            )


def _parsed(name: str, limit: Any, costs: Mapping[str, Cost]) -> float:
    if name not in costs:
        raise InputError(f"There is no cost '{name}' to budget.{did_you_mean(name, costs)}")
    parsed = costs[name].parse(limit)
    if not np.isfinite(parsed) or parsed <= 0:
        raise InputError(f"budget.{name} must be above 0; got {limit}.")
    return parsed


def read_budgets(limits: Mapping[str, Any], costs: Mapping[str, Cost], space: SearchSpace) -> tuple[Budget, ...]:
    """The budgets that were given (`None` is none), each checked against the smallest allocation there is."""
    budgets = []
    for name, limit in limits.items():
        if limit is None:
            continue
        parsed = _parsed(name, limit, costs)
        budget = Budget(costs[name].table(space), parsed)
        smallest = np.where(space.allowed, budget.table.values, np.inf).argmin(axis=1)
        if not budget.allows(smallest):
            wanted = "scheme of narrower inputs" if budget.table.peak else "smaller scheme"
            least = budget.table.cost_of(smallest)
            raise InfeasibleBudget(
                f"The budget {budget} is below the least there is, {least:,.10g}: {_mix(space, smallest)}. "
                f"Raise the budget, add a {wanted}, or loosen a pin."
            )
        budgets.append(budget)
    return tuple(budgets)


def restricted(space: SearchSpace, budgets: Sequence[Budget]) -> tuple[SearchSpace, tuple[Budget, ...]]:
    """The space without the choices that a budget on a peak forbids, and the other budgets, those that add up.

    An allocation of `space` is within `budgets` exactly if it is in the restricted space and within those that are left. Every
    group has a choice left: `read_budgets` saw to it. Groups and schemes, and so all indices, stay as they are.
    """
    peaks = [budget for budget in budgets if budget.table.peak]
    if not peaks:
        return space, tuple(budgets)
    kept = np.logical_and.reduce([space.allowed, *(b.table.values <= b.limit * (1 + ROUNDING) for b in peaks)])
    choices = tuple(tuple(name for name, k in zip(space.scheme_names, row, strict=True) if k) for row in kept)
    return replace(space, choices=choices), tuple(budget for budget in budgets if not budget.table.peak)


def feasible(budgets: Sequence[Budget], choice: np.ndarray) -> bool:
    """Whether an allocation (scheme indices) is within all of the budgets."""
    return all(budget.allows(choice) for budget in budgets)


def _mix(space: SearchSpace, choice: np.ndarray) -> str:
    used = [space.scheme_names[i] for i in choice]
    if len(set(used)) == 1:
        return f"every layer at {used[0]}"
    return ", ".join(f"{used.count(name)} at {name}" for name in dict.fromkeys(used))
