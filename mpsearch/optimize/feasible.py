"""The feasible set of a search: the allocations whose costs are within all limits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mpsearch.optimize import knapsack

Choice = NDArray[np.intp]
Floats = NDArray[np.float64]

MAX_ENUMERATED = 100_000  # allocations of a space that is enumerated; no search evaluates more one by one


class Feasible:
    """The set {x : sum_g cost_k[g, x_g] <= limit_k for each k}, over the allowed choices x_g of each group g.

    Parameters
    ----------
    losses
        float64 `[n_groups, n_choices]`: the additive loss of each choice, infinite where it is not allowed.
    costs
        One array `[n_groups, n_choices]` for each limit. Entries of choices that are not allowed are not read.
    limits
        As many numbers as there are costs.

    Raises
    ------
    InfeasibleBudget
        The set is empty.
    """

    def __init__(self, losses: Floats, costs: Sequence[ArrayLike] = (), limits: Sequence[float] = ()) -> None:
        self.losses, self.limits = losses, list(limits)
        self.allowed = np.isfinite(losses)
        self.costs = [np.where(self.allowed, cost, 0) for cost in costs]
        self.repair(losses.argmin(1))

    def contains(self, choices: Choice) -> NDArray[np.bool_]:
        """bool `[n]`: which of `choices` `[n, n_groups]` are within the limits."""
        rows = np.arange(choices.shape[1])
        within = np.ones(len(choices), dtype=bool)
        for cost, limit in zip(self.costs, self.limits, strict=True):
            within &= cost[rows, choices].sum(1) <= limit
        return within

    def repair(self, choice: ArrayLike) -> Choice:
        """`choice` `[n_groups]`, brought within the limits at the least additional loss (`knapsack.repair`)."""
        return knapsack.repair(choice, self.losses, self.costs, self.limits)

    @cached_property
    def log10_allowed(self) -> float:
        """The number of allocations of allowed choices, within the limits or not, as a power of ten."""
        return float(np.log10(self.allowed.sum(1)).sum())

    @cached_property
    def enumerated(self) -> Choice | None:
        """intp `[n, n_groups]`: all of the set, in lexicographic order; `None` for more than `MAX_ENUMERATED` allowed ones."""
        if self.log10_allowed > math.log10(MAX_ENUMERATED):
            return None
        n_choices = self.allowed.sum(1)
        strides = np.append(np.cumprod(n_choices[:0:-1])[::-1], 1)  # not np.unravel_index, which is limited to 64 groups
        digits = np.arange(n_choices.prod())[:, None] // strides % n_choices
        allowed_first = np.argsort(~self.allowed, axis=1, kind="stable")
        every = allowed_first[np.arange(len(n_choices)), digits]
        return every[self.contains(every)]
