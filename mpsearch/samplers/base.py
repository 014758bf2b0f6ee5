"""The contract of a sampler: an `optuna.samplers.BaseSampler` that proposes allocations, one categorical parameter per group.

It is used by ask and tell on an in-memory study that minimizes two objectives, and every parameter is asked for at once:
`study.ask(distributions(groups, choices))`. A sampler's proposals are within the budgets; what was enqueued is taken as it is.
The same seed gives the same proposals, also when a new study and a new sampler are asked again and told what was recorded, in the
same order: that is how a killed run goes on.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler

from mpsearch.errors import InputError


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
