"""What our own samplers have in common: they see the trials so far as arrays, and propose what is new and within the budgets.

A proposal depends on the seed, the trial's number and the trials before it, and on nothing else.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpsearch.costs.base import mixed
from mpsearch.errors import InputError
from mpsearch.samplers.base import Choice, Floats, Problem, Sampler

TRIES = 200  # to turn a proposal that a trial has already into a new one


@dataclass(frozen=True)
class History:
    """The trials so far, by number.

    Attributes
    ----------
    choices
        intp `[n, n_groups]`, scheme indices.
    log_losses
        float64 `[n]`, natural logarithm; NaN where a trial is still running or failed.
    sizes
        float64 `[n]`, the cost that is weighed against the loss, without its constant.
    running
        bool `[n]`: which trials are not told yet.
    """

    choices: Choice
    log_losses: Floats
    sizes: Floats
    running: NDArray[np.bool_]

    @property
    def measured(self) -> NDArray[np.bool_]:
        """bool `[n]`: which trials have a loss."""
        return np.isfinite(self.log_losses)


class Proposer(Sampler):
    """A sampler without hidden state: a subclass chooses the next allocation from the history.

    With two objectives each proposal weighs another mixture of them against the loss, drawn at random, so that together they
    cover the front (random scalarization: Knowles 2006, ParEGO): `size` `[n_groups, n_schemes]` is that mixture.

    Raises
    ------
    InputError
        There are two objectives, and the sampler takes one.
    """

    replayable = False
    many_costs = False

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.space, self.losses, self.feasible = problem.space, problem.losses, problem.feasible
        objectives = problem.objectives
        if len(objectives) > 1 and not self.many_costs:
            raise InputError(
                f"This sampler ({type(self).__name__}) weighs one cost against the loss; got {len(objectives)}: "
                f"{', '.join(table.name for table in objectives)}. Take sampler=front or one of Optuna's, or one objective and a "
                "budget on the other."
            )
        self.costs = [np.where(self.space.allowed, table.values, 0.0) for table in objectives]
        self.even = self.costs[0] if len(objectives) == 1 else mixed(self.costs, [1.0] * len(objectives), self.space.allowed)
        self.size = self.even
        self._choices: list[Choice] = []
        self._log10_losses: list[float] = []
        self._running: list[bool] = []

    @abstractmethod
    def choose(self, history: History, rng: np.random.Generator) -> Choice:
        """Scheme indices `[n_groups]`; repaired, and changed at random where a trial has them already."""

    def propose(self) -> Choice:
        """See `Sampler`."""
        rng = np.random.default_rng([self.problem.seed, len(self._choices)])
        if len(self.costs) > 1:
            self.size = mixed(self.costs, _weights(len(self.costs), rng), self.space.allowed)
        choice = self._new(self.feasible.repair(self.choose(self._history(), rng)), rng)
        self.take(choice)
        return choice

    def take(self, choice: Choice) -> None:
        """See `Sampler`."""
        self._choices.append(choice)
        self._log10_losses.append(np.nan)
        self._running.append(True)

    def tell(self, trial: int, values: Sequence[float]) -> None:
        """See `Sampler`."""
        self._log10_losses[trial], self._running[trial] = values[0], False

    def sizes(self, choices: Choice) -> Floats:
        """float64 `[n]`: the weighed cost of `choices` `[n, n_groups]`, without its constant."""
        return self.size[np.arange(choices.shape[1]), choices].sum(1)

    def smallest(self) -> Choice:
        """intp `[n_groups]`: the cheapest choice of each group, repaired."""
        return self.feasible.repair(np.where(self.space.allowed, self.even, np.inf).argmin(1))

    def _history(self) -> History:
        log_losses = np.log(10.0) * np.array(self._log10_losses)
        broken = np.isposinf(log_losses)  # such a network counts as the worst that was measured
        log_losses[broken] = log_losses[np.isfinite(log_losses)].max(initial=0.0)
        choices = np.array(self._choices, dtype=np.intp).reshape(-1, len(self.losses))
        return History(choices, log_losses, self.sizes(choices), np.array(self._running, dtype=bool))

    def _new(self, choice: Choice, rng: np.random.Generator) -> Choice:
        """`choice`, or one within the budgets that no trial has and that differs from it in few groups."""
        free = np.flatnonzero(self.space.allowed.sum(1) > 1)
        if choice.tobytes() not in self.asked or not len(free):
            return choice
        for attempt in range(TRIES):
            other = choice.copy()
            for group in rng.choice(free, min(len(free), 1 + attempt // 40), replace=False):
                other[group] = rng.choice(np.flatnonzero(self.space.allowed[group]))
            other = self.feasible.repair(other)
            if other.tobytes() not in self.asked:
                return other
        return self.nearest_not_asked(choice)


def _weights(n: int, rng: np.random.Generator) -> Floats:
    """float64 `[n]`, of sum 1: evenly distributed; half of the time one cost alone, for the ends of the front."""
    return np.eye(n)[rng.integers(n)] if rng.random() < 0.5 else rng.dirichlet(np.ones(n))
