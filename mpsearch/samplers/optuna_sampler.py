"""Optuna's samplers: their proposals are repaired to be within the budgets before Optuna stores them.

A proposal that is repaired after the ask would be told under parameters that were never measured, and NSGA-II, for one, would
never leave its first generation. Here the repaired allocation is what Optuna stores and learns from.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseGASampler, BaseSampler, BruteForceSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from mpsearch.errors import InputError
from mpsearch.optimize.feasible import MAX_ENUMERATED
from mpsearch.samplers.base import Choice, Make, Problem, Sampler

optuna.logging.set_verbosity(optuna.logging.WARNING)


class OptunaSampler(Sampler):
    """An in-memory study: one categorical parameter a group, minimizing log10 of the loss and the costs.

    Raises
    ------
    InputError
        `make` cannot be called with a seed alone; the sampler takes one objective only; or it is brute force, and the space is
        too large to be enumerated.
    """

    replayable = True

    def __init__(self, make: Make, problem: Problem) -> None:
        super().__init__(problem)
        space = problem.space
        if not isinstance(inner := _seeded(make, problem.seed), BaseSampler):
            raise InputError(f"sampler must be one of mpsearch's or Optuna's; got {type(inner).__name__}.")
        if isinstance(inner, BruteForceSampler) and problem.feasible.enumerated is None:
            raise InputError(
                f"Brute force is for spaces of at most {MAX_ENUMERATED:,} allocations, and this one has "
                f"10^{problem.feasible.log10_allowed:.1f}: take another sampler, or pin some groups."
            )
        n_objectives = 1 + len(problem.objectives)
        _check_objectives(_seeded(make, problem.seed), n_objectives)
        self.distributions = distributions(space.names, space.choices)
        self.study = optuna.create_study(directions=["minimize"] * n_objectives, sampler=_Repaired(inner, self))
        self._index = {name: i for i, name in enumerate(space.scheme_names)}
        self._running: dict[int, optuna.Trial] = {}

    def propose(self) -> Choice:
        """See `Sampler`."""
        trial = self.study.ask(self.distributions)
        self._running[trial.number] = trial
        return self.to_choice(trial.params)

    def take(self, choice: Choice) -> None:
        """See `Sampler`."""
        self.study.enqueue_trial(self.to_params(choice))
        self.propose()

    def tell(self, trial: int, values: Sequence[float]) -> None:
        """See `Sampler`."""
        if np.isnan(values[0]):
            self.study.tell(self._running.pop(trial), state=TrialState.FAIL)
        else:
            self.study.tell(self._running.pop(trial), list(values))

    def to_choice(self, params: dict[str, Any]) -> Choice:
        """Scheme indices of Optuna's parameters."""
        return np.array([self._index[params[name]] for name in self.problem.space.names], dtype=np.intp)

    def to_params(self, choice: Choice) -> dict[str, str]:
        """Optuna's parameters of scheme indices."""
        space = self.problem.space
        return {name: space.scheme_names[i] for name, i in zip(space.names, choice, strict=True)}


class TPEProposals:
    """Proposals of Optuna's TPE from any history of trials, without hidden state: for samplers that resume from recorded trials.

    `groups` and `choices` are those of a search space.
    """

    def __init__(self, groups: Sequence[str], choices: Sequence[Sequence[str]]) -> None:
        self._distributions = distributions(groups, choices)
        self._trials: list[FrozenTrial] = []

    def propose(self, params: Sequence[dict[str, Any]], values: Sequence[Sequence[float]], seed: int) -> dict[str, Any]:
        """Parameters that TPE proposes after trials with `params` and `values`, which begin with those of the call before."""
        for known, measured in list(zip(params, values, strict=True))[len(self._trials) :]:
            self._trials.append(optuna.create_trial(params=known, distributions=self._distributions, values=list(measured)))
        sampler = _seeded(functools.partial(optuna.samplers.TPESampler, multivariate=True, n_startup_trials=0), seed)
        study = optuna.create_study(directions=["minimize"] * len(values[0]), sampler=sampler)
        study.add_trials(self._trials)
        return study.ask(self._distributions).params


class _Repaired(BaseSampler):
    """`inner`'s proposals within the budgets of the sampler that it belongs to.

    Brute force proposes every allocation within the budgets once: a repaired proposal that a trial has already is replaced by
    the most similar one that none has.
    """

    def __init__(self, inner: BaseSampler, owner: OptunaSampler) -> None:
        self.inner, self.owner = inner, owner

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
        """Every group: only a whole allocation can be repaired."""
        return self.owner.distributions

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        """A scheme for every group, within the budgets."""
        proposed = self.inner.sample_relative(study, trial, self.inner.infer_relative_search_space(study, trial))
        partial = copy.copy(trial)  # brute force reads what has been chosen so far
        params: dict[str, Any] = {}
        partial.params = params
        for group, choices in zip(search_space, self.owner.problem.space.choices, strict=True):
            if len(choices) == 1:
                params[group] = choices[0]
            elif group in proposed:
                params[group] = proposed[group]
            else:
                params[group] = self.inner.sample_independent(study, partial, group, search_space[group])
        choice = self.owner.problem.feasible.repair(self.owner.to_choice(params))
        if isinstance(self.inner, BruteForceSampler) and choice.tobytes() in self.owner.asked:
            choice = self.owner.nearest_not_asked(choice)
        return self.owner.to_params(choice)

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        """Never asked for: every group is proposed together with the others."""
        raise NotImplementedError(f"'{param_name}' is no group of this search.")


def distributions(groups: Sequence[str], choices: Sequence[Sequence[str]]) -> dict[str, BaseDistribution]:
    """The search space as Optuna takes it: for each group, in order, the names of the schemes that it may take."""
    return {group: CategoricalDistribution(tuple(names)) for group, names in zip(groups, choices, strict=True)}


def _seeded(make: Make, seed: int) -> Any:
    """`make(seed=seed)`, without the note that some of Optuna's samplers may change in a later release."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        try:
            return make(seed=seed)
        except (TypeError, ImportError) as error:
            raise InputError(f"The sampler cannot be made: {error}. Give its arguments as +sampler.NAME=VALUE.") from error


def _check_objectives(sampler: BaseSampler, n: int) -> None:
    """Raise `InputError` where a sampler refuses `n` objectives: a trial of a study of its own is asked for."""
    study = optuna.create_study(directions=["minimize"] * n, sampler=sampler)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            study.ask({"x": CategoricalDistribution(("a", "b"))})
        except (ValueError, ImportError) as error:
            raise InputError(
                f"{type(sampler).__name__} cannot search {n} objectives, the loss and the cost ({error}). Take sampler=front, "
                "nsga2, tpe or another of Optuna's multi-objective samplers."
            ) from error
