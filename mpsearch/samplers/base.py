"""The contract of a sampler: an `optuna.samplers.BaseSampler` that proposes allocations, one categorical parameter per group.

A YAML gives a function that waits for the rest of its arguments (`_partial_: true`): our own samplers (`proposer.py`) for all
that the search knows, Optuna's for a seed; the search keeps these within the budgets (`repaired.py`).

It is used by ask and tell on an in-memory study that minimizes two objectives, and every parameter is asked for at once:
`study.ask(distributions(groups, choices))`. A sampler's proposals are within the budgets; what was enqueued is taken as it is.
The same seed gives the same proposals. A killed run goes on because our own samplers depend on the recorded trials alone, which
are added to a new study; and because Optuna's, which have hidden state, are asked again from the seed and told what was
recorded, in the same order.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler

from mpsearch.budget import Budget, restricted
from mpsearch.costs.base import CostTable
from mpsearch.errors import InputError
from mpsearch.evaluation import SensitivityTable


def distributions(groups: Sequence[str], choices: Sequence[Sequence[str]]) -> dict[str, BaseDistribution]:
    """The search space as Optuna wants it: per group, in order, the names of the schemes that it may take."""
    return {group: CategoricalDistribution(tuple(names)) for group, names in zip(groups, choices, strict=True)}


def seeded(make: Callable[..., BaseSampler], seed: int) -> BaseSampler:
    """`make(seed=seed)`, without the note that some of Optuna's samplers may change in a later release."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        try:
            return make(seed=seed)
        except TypeError as error:
            raise InputError(f"The sampler cannot be made: {error}. Give its arguments as +sampler.NAME=VALUE.") from error


def complete(
    make: Callable[..., BaseSampler],
    sensitivity: SensitivityTable,
    costs: Sequence[CostTable],
    budgets: Sequence[Budget],
    seed: int,
) -> BaseSampler:
    """The sampler: with all that is known, where it asks for the sensitivity (the objective is the first cost); else `seeded`."""
    if "sensitivity" not in inspect.signature(make).parameters:
        return seeded(make, seed)
    space, budgets = restricted(sensitivity.space, budgets)
    return make(space=space, sensitivity=replace(sensitivity, space=space), costs=costs, budgets=budgets, seed=seed)
