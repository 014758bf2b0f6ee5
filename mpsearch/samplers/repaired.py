"""Keeps one of Optuna's samplers within the budgets: its proposal is repaired before Optuna freezes it.

Repaired after the ask, a proposal would be told under parameters that were never measured: NSGA-II, for one, would stay at its
first generation. Here the repaired allocation is what Optuna stores, learns from and plots.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseGASampler, BaseSampler, BruteForceSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from mpsearch.errors import InputError
from mpsearch.optimize import knapsack
from mpsearch.samplers.base import distributions

MAX_ENUMERATED = 100_000  # allocations; more than anybody measures one by one


class Repaired(BaseSampler):
    """`inner`'s proposals, brought back under the budgets by `knapsack.repair`.

    Args:
        inner: one of Optuna's samplers, seeded.
        groups: the names of the groups [n_groups]; they are the names of the parameters, to be asked for in this order.
        choices: per group the names of the schemes that it may take; a pinned group has one.
        loss: [n_groups, n_choices] float64, the additive loss of each choice, in the order of `choices`; rows that are shorter
            than the longest are padded with np.inf.
        costs: per budget an array [n_groups, n_choices] (what is padded is not read).
        limits: per budget its limit. Without budgets nothing is repaired.

    Raises:
        InputError: a budget is below its cheapest allocation; or `inner` is Optuna's brute force, and there are more than 100,000
            allocations.

    Brute force proposes every allocation within the budgets once: where the repaired proposal is in the study already, the most
    similar one that is not takes its place. Ask `exhausted` when to stop: the sampler's own way is for `Study.optimize` alone.
    """

    def __init__(
        self,
        inner: BaseSampler,
        groups: Sequence[str],
        choices: Sequence[Sequence[str]],
        loss: NDArray[np.float64],
        costs: Sequence[NDArray] = (),
        limits: Sequence[float] = (),
    ) -> None:
        self.inner = inner
        self.distributions = distributions(groups, choices)
        self._choices = [tuple(names) for names in choices]
        self._index = [{name: index for index, name in enumerate(names)} for names in self._choices]
        self._n_choices = np.array([len(names) for names in self._choices])
        listed = np.arange(loss.shape[1]) < self._n_choices[:, None]
        self._loss = np.where(listed, loss, np.inf)
        self._costs = [np.where(listed, cost, 0) for cost in costs]
        self._limits = list(limits)
        self._repair(self._loss.argmin(1))  # a budget that cannot be met is found here, not at the first trial
        # Numbers an allocation in a mixed radix; not np.unravel_index, which ends at 64 groups.
        self._strides = np.append(np.cumprod(self._n_choices[:0:-1])[::-1], 1)
        magnitude = float(np.log10(self._n_choices).sum())
        self._feasible = self._within_budgets() if magnitude <= np.log10(MAX_ENUMERATED) else None
        if self._feasible is None and isinstance(inner, BruteForceSampler):
            raise InputError(
                f"Brute force is for spaces of at most {MAX_ENUMERATED:,} allocations, and this one has 10^{magnitude:.1f}: "
                "take another sampler, or pin some groups."
            )

    def reseed_rng(self) -> None:
        """See `optuna.samplers.BaseSampler`."""
        self.inner.reseed_rng()

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Also numbers the generation: Optuna asks no sampler about an enqueued trial, which then would be in no population."""
        self.inner.before_trial(study, trial)
        if isinstance(self.inner, BaseGASampler):
            self.inner.get_trial_generation(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """Brute force's is left out: all it does is to stop `Study.optimize`, and it raises outside of it."""
        if not isinstance(self.inner, BruteForceSampler):
            self.inner.after_trial(study, trial, state, values)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Every group: an allocation can be repaired as a whole only."""
        return self.distributions

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        """A scheme for every group, within the budgets."""
        related = self.inner.infer_relative_search_space(study, trial)
        proposed = self.inner.sample_relative(study, trial, related)
        partial = copy.copy(trial)  # brute force looks up what has been chosen so far
        params: dict[str, Any] = {}
        partial.params = params
        for group, distribution in self.distributions.items():
            if distribution.single():
                params[group] = self._choices[len(params)][0]
            elif group in proposed:
                params[group] = proposed[group]
            else:
                params[group] = self.inner.sample_independent(study, partial, group, distribution)
        choice = self._repair(self._to_choice(params))
        if isinstance(self.inner, BruteForceSampler):
            choice = self._nearest_unseen(study, choice)
        return {group: names[index] for group, names, index in zip(self.distributions, self._choices, choice, strict=True)}

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        """For a parameter that is no group of the search space: left to the inner sampler."""
        return self.inner.sample_independent(study, trial, param_name, param_distribution)

    def exhausted(self, study: Study) -> bool:
        """Whether every allocation within the budgets is in the study, running trials included: nothing is left to ask for.

        Beyond 100,000 allocations, which nobody measures one by one, always False.
        """
        if self._feasible is None or len(study.get_trials(deepcopy=False)) < len(self._feasible):
            return False
        return len(self._unseen(study)) == 0

    def _repair(self, choice: NDArray[np.intp]) -> NDArray[np.intp]:
        return knapsack.repair(choice, self._loss, self._costs, self._limits)

    def _to_choice(self, params: dict[str, Any]) -> NDArray[np.intp]:
        pairs = zip(self.distributions, self._index, strict=True)
        return np.fromiter((index[params[group]] for group, index in pairs), dtype=np.intp, count=len(self._index))

    def _within_budgets(self) -> NDArray[np.intp]:
        """[n, n_groups]: every allocation within the budgets."""
        every = np.arange(self._n_choices.prod())[:, None] // self._strides % self._n_choices
        within = np.ones(len(every), dtype=bool)
        for cost, limit in zip(self._costs, self._limits, strict=True):
            within &= cost[np.arange(len(cost)), every].sum(1) <= limit
        return every[within]

    def _unseen(self, study: Study) -> NDArray[np.intp]:
        """[n, n_groups]: the allocations within the budgets that no trial has yet."""
        assert self._feasible is not None
        asked = (trial.params for trial in study.get_trials(deepcopy=False))
        seen = [self._to_choice(params) @ self._strides for params in asked if self.distributions.keys() <= params.keys()]
        return self._feasible[~np.isin(self._feasible @ self._strides, seen)]

    def _nearest_unseen(self, study: Study, choice: NDArray[np.intp]) -> NDArray[np.intp]:
        """`choice`, if no trial has it; else, if there is one left, the allocation that differs from it in the fewest groups."""
        unseen = self._unseen(study)
        return unseen[(unseen != choice).sum(1).argmin()] if len(unseen) else choice
