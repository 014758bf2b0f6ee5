"""What our own samplers have in common: they see what was measured as arrays, and propose what is new and within the budgets.

A proposal depends on the seed, the trial's number and the trials before it, and on nothing else: a run goes on from its recorded
trials alone, added to a new study, and workers that ask for different trials get different proposals.
"""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from mpsearch.allocation import SearchSpace
from mpsearch.budget import Budget
from mpsearch.costs.base import CostTable, mixed
from mpsearch.errors import InputError
from mpsearch.evaluation import SensitivityTable
from mpsearch.optimize import knapsack
from mpsearch.samplers.base import distributions

Choice = NDArray[np.intp]
Floats = NDArray[np.float64]

MAX_LISTED = 20_000  # allocations; in a space this small all of them are listed, so that none is missed
TRIES = 200  # to turn a proposal that was measured already into a new one


@dataclass(frozen=True)
class History:
    """The trials so far, by number: `choices` intp [n, n_groups] (scheme indices), `log_losses` float64 [n] (natural logarithm;
    NaN where a trial still runs or failed), `sizes` float64 [n], the first cost without its constant, `running` bool [n].
    """

    choices: Choice
    log_losses: Floats
    sizes: Floats
    running: NDArray[np.bool_]

    @property
    def measured(self) -> NDArray[np.bool_]:
        """[n]: which trials have a loss."""
        return np.isfinite(self.log_losses)


class Proposer(BaseSampler):
    """A sampler that is completed with all that a search knows; a subclass says in `propose` what comes next.

    Args:
        space, sensitivity: what is searched, and what was measured of each group alone.
        costs: what the front trades against the loss, one or two.
        budgets: limits that every proposal keeps.
        seed: of all randomness.

    Raises:
        InputError: no allocation is within all the budgets; or there are two costs, and the sampler knows what to do with one.

    Of two costs each proposal weighs another mixture against the loss, drawn at random, so that together they cover the front
    (random scalarization: Knowles 2006, ParEGO): `size` is that mixture.
    """

    many_costs = False

    def __init__(
        self,
        space: SearchSpace,
        sensitivity: SensitivityTable,
        costs: Sequence[CostTable],
        budgets: Sequence[Budget],
        seed: int,
    ) -> None:
        self.space, self.seed = space, seed
        self.losses, self.exact, self.effects = sensitivity.losses(), sensitivity.exact, sensitivity.effects
        if len(costs) > 1 and not self.many_costs:
            names = ", ".join(table.name for table in costs)
            raise InputError(
                f"This sampler ({type(self).__name__}) weighs one cost against the loss; {len(costs)} came: {names}. Take "
                "sampler=front or one of Optuna's, or one objective and a budget on the other."
            )
        self.costs = [np.where(space.allowed, table.values, 0.0) for table in costs]
        self.even = self.costs[0] if len(costs) == 1 else mixed(self.costs, [1.0] * len(costs), space.allowed)
        self.weigh(self.even)
        self.tables = [np.where(space.allowed, budget.table.values, 0.0) for budget in budgets]
        self.rooms = [budget.room for budget in budgets]
        self.distributions = distributions(space.names, space.choices)
        self.smallest = self.repair(np.where(space.allowed, self.size, np.inf).argmin(1))
        self._index = {name: i for i, name in enumerate(space.scheme_names)}
        self._choices: dict[int, Choice] = {}  # of each trial; they never change
        self._n_within = self._count() if space.log10_combinations <= math.log10(MAX_LISTED) else None

    def weigh(self, size: Floats) -> None:
        """Take `size` [n_groups, n_schemes] for the cost that is weighed against the loss."""
        self.size = size

    @abstractmethod
    def propose(self, history: History, rng: np.random.Generator) -> Choice:
        """Scheme indices [n_groups]; brought within the budgets, and changed at random where they were measured already."""

    def repair(self, choice: Choice) -> Choice:
        """`choice` within the budgets."""
        return knapsack.repair(choice, self.losses, self.tables, self.rooms)

    def within(self, choices: Choice) -> NDArray[np.bool_]:
        """[n]: which of `choices` [n, n_groups] keep the budgets."""
        rows = np.arange(choices.shape[1])
        kept = np.ones(len(choices), dtype=bool)
        for table, room in zip(self.tables, self.rooms, strict=True):
            kept &= table[rows, choices].sum(1) <= room
        return kept

    def sizes(self, choices: Choice) -> Floats:
        """[n]: the first cost of `choices` [n, n_groups], without its constant."""
        return self.size[np.arange(choices.shape[1]), choices].sum(1)

    def exhausted(self, study: Study) -> bool:
        """Whether every allocation within the budgets was asked for; always False in a space of more than 20,000."""
        if self._n_within is None:
            return False
        choices = self._asked(study)
        return len(np.unique(choices[self.within(choices)], axis=0)) >= self._n_within

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Every group: an allocation is proposed as a whole."""
        return self.distributions

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        """A scheme for every group: within the budgets, and none that was asked for before while there is another."""
        rng = np.random.default_rng([self.seed, trial.number])
        if len(self.costs) > 1:
            self.weigh(mixed(self.costs, _weights(len(self.costs), rng), self.space.allowed))
        history = self._history(study)
        choice = self.repair(self.propose(history, rng))
        choice = self._new(choice, {row.tobytes() for row in history.choices}, rng)
        return {name: self.space.scheme_names[i] for name, i in zip(self.space.names, choice, strict=True)}

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        """Never asked for: every group of several choices is proposed together with the others."""
        raise NotImplementedError(f"'{param_name}' is no group of this search.")

    def _history(self, study: Study) -> History:
        trials = [trial for trial in study.get_trials(deepcopy=False) if self._is_asked(trial)]
        losses = [trial.values[0] if trial.state is TrialState.COMPLETE and trial.values else np.nan for trial in trials]
        log_losses = np.log(10.0) * np.array(losses)
        broken = np.isposinf(log_losses)  # such a network is as bad as the worst that could be measured
        log_losses[broken] = log_losses[np.isfinite(log_losses)].max(initial=0.0)
        choices = self._asked(study)
        running = np.array([trial.state is TrialState.RUNNING for trial in trials], dtype=bool)
        return History(choices, log_losses, self.sizes(choices), running)

    def _is_asked(self, trial: FrozenTrial) -> bool:
        return trial.state is not TrialState.WAITING and len(trial.params) == len(self.space.names)

    def _asked(self, study: Study) -> Choice:
        rows = []
        for trial in study.get_trials(deepcopy=False):
            if self._is_asked(trial):
                if trial.number not in self._choices:
                    self._choices[trial.number] = np.array([self._index[trial.params[name]] for name in self.space.names])
                rows.append(self._choices[trial.number])
        return np.array(rows, dtype=np.intp).reshape(-1, len(self.space.names))

    def _new(self, choice: Choice, seen: set[bytes], rng: np.random.Generator) -> Choice:
        """`choice`, or one that differs from it in as few groups as it takes to be new and within the budgets."""
        if choice.tobytes() not in seen:
            return choice
        free = np.flatnonzero(self.space.allowed.sum(1) > 1)
        if not len(free):
            return choice
        for attempt in range(TRIES):
            other = choice.copy()
            for group in rng.choice(free, min(len(free), 1 + attempt // 40), replace=False):
                other[group] = rng.choice(np.flatnonzero(self.space.allowed[group]))
            other = self.repair(other)
            if other.tobytes() not in seen:
                return other
        if self._n_within is not None:
            every = self._every()
            unseen = every[[row.tobytes() not in seen for row in every]]
            if len(unseen):
                return unseen[(unseen != choice).sum(1).argmin()]
        return choice

    def _every(self) -> Choice:
        """[n, n_groups]: all allocations within the budgets."""
        every = np.array(list(itertools.product(*map(np.flatnonzero, self.space.allowed))), dtype=np.intp)
        return every[self.within(every)]

    def _count(self) -> int:
        return len(self._every())


def _weights(n: int, rng: np.random.Generator) -> Floats:
    """[n], of sum 1: evenly distributed; half of the time one cost alone, for the ends of the front."""
    return np.eye(n)[rng.integers(n)] if rng.random() < 0.5 else rng.dirichlet(np.ones(n))
