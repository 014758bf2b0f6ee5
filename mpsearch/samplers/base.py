"""The contract of a sampler: it proposes allocations within the budgets, one at a time, and is told what they measured.

A YAML file describes a class or function that waits for the rest of its arguments (`_partial_: true`): one of our own samplers,
which takes the `Problem`, or one of Optuna's, which takes a seed. `build_sampler` makes a `Sampler` of either.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mpsearch.allocation import SearchSpace
from mpsearch.budget import Budget, restricted
from mpsearch.costs.base import CostTable
from mpsearch.costs.size import Bytes
from mpsearch.evaluation import SensitivityTable
from mpsearch.optimize.feasible import Feasible

Choice = NDArray[np.intp]
Floats = NDArray[np.float64]


class Problem:
    """What a sampler knows of a search before the first trial.

    Parameters
    ----------
    sensitivity
        The loss of each group alone in each scheme, with the space that is searched.
    objectives
        The one or two costs that the front weighs against the loss; the size where none is given.
    budgets
        Limits that every proposal keeps.
    seed
        Of all randomness.

    Raises
    ------
    InfeasibleBudget
        No allocation is within all budgets together.

    Attributes
    ----------
    space, budgets
        The space without the choices that a budget on a peak forbids, and the other budgets (`budget.restricted`); as given they
        are `full_space` and `all_budgets`.
    losses
        float64 `[n_groups, n_schemes]`: the sensitivities, infinite where a choice is not allowed.
    feasible
        The allocations within all budgets.
    """

    def __init__(
        self,
        sensitivity: SensitivityTable,
        objectives: Sequence[CostTable] = (),
        budgets: Sequence[Budget] = (),
        seed: int = 0,
    ) -> None:
        self.full_space, self.all_budgets = sensitivity.space, tuple(budgets)
        self.space, self.budgets = restricted(sensitivity.space, budgets)
        self.sensitivity = replace(sensitivity, space=self.space)
        self.losses = self.sensitivity.losses()
        self.objectives = tuple(objectives) or (Bytes().table(self.space),)
        self.feasible = Feasible(self.losses, [b.table.values for b in self.budgets], [b.capacity for b in self.budgets])
        self.seed = seed


class Sampler(ABC):
    """Proposes the allocation of each trial, as scheme indices, and learns from what it is told.

    Trials are numbered in the order in which they were asked for. Several may be asked for before the first of them is told.
    The same seed and the same values give the same proposals.

    `replayable` says how a killed run is resumed. A replayable sampler has hidden state that its seed reproduces: it is asked
    again for each recorded trial, in order, and told what was recorded. The proposals of any other depend on its trials alone:
    the recorded ones are given to it.
    """

    replayable: ClassVar[bool]

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.asked: set[bytes] = set()  # the allocations of all trials so far

    @abstractmethod
    def propose(self) -> Choice:
        """Scheme indices `[n_groups]` of the next trial, within the budgets."""

    @abstractmethod
    def take(self, choice: Choice) -> None:
        """The next trial is `choice`, which the sampler did not propose; it may be beyond the budgets."""

    @abstractmethod
    def tell(self, trial: int, values: Sequence[float]) -> None:
        """What trial number `trial` measured: log10 of its loss, then its costs; NaN where it failed."""

    def ask(self, given: Choice | None = None) -> Choice:
        """The next trial: scheme indices `[n_groups]`, `given` (a seed of the study, a recorded trial) or proposed."""
        if given is None:
            choice = self.propose()
        else:
            choice = np.asarray(given, dtype=np.intp)
            self.take(choice)
        self.asked.add(choice.tobytes())
        return choice

    def exhausted(self) -> bool:
        """Whether all allocations within the budgets were asked for; always false where there are too many to enumerate."""
        every = self.problem.feasible.enumerated
        return every is not None and len(self.asked) >= len(every) and not len(self.not_asked())

    def not_asked(self) -> Choice:
        """intp `[n, n_groups]`: the allocations within the budgets that no trial has; of a space that can be enumerated."""
        every = self.problem.feasible.enumerated
        assert every is not None
        return every[[row.tobytes() not in self.asked for row in every]]

    def nearest_not_asked(self, choice: Choice) -> Choice:
        """The allocation that no trial has and that differs from `choice` in the fewest groups; else `choice` itself."""
        if self.problem.feasible.enumerated is None or not len(left := self.not_asked()):
            return choice
        return left[(left != choice).sum(1).argmin()]


Make = Callable[..., Any]


def build_sampler(make: Make, problem: Problem) -> Sampler:
    """The sampler that `make` describes: `make(problem=problem)`, or one of Optuna's, `make(seed=…)`, kept within the budgets."""
    if "problem" in inspect.signature(make).parameters:
        sampler: Sampler = make(problem=problem)
        return sampler
    from mpsearch.samplers.optuna_sampler import OptunaSampler  # Optuna is imported where it is used

    return OptunaSampler(make, problem)


def check_sampler(
    make: Make, space: SearchSpace, objectives: Sequence[CostTable] = (), budgets: Sequence[Budget] = (), seed: int = 0
) -> None:
    """Raise `InputError` where the sampler cannot search this space, before anything is measured.

    Raises
    ------
    InfeasibleBudget
        No allocation is within all budgets together.
    """
    nothing = SensitivityTable("none", "", np.zeros(space.allowed.shape), space)
    build_sampler(make, Problem(nothing, objectives, budgets, seed))
