"""The contract of the costs: the cost of an allocation, as a table of which the sum over the groups or the maximum counts.

Either can be budgeted, solved for and repaired without running anything. A limit on a peak forbids the choices above it, one by
one (`budget.restricted`).

To add a cost: write `costs/<name>.py` with a subclass of `Cost`, and `conf/cost/<name>.yaml` with its `_target_`, which adds
`cost.<name>` and `budget.<name>`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpsearch.allocation import SearchSpace
from mpsearch.errors import InputError
from mpsearch.layer import LayerSpec
from mpsearch.schemes.base import QuantScheme


@dataclass(frozen=True)
class CostTable:
    """The cost of every choice.

    Attributes
    ----------
    name, column
        The name of the cost, and of its column in the tables of a run.
    values
        float64 `[n_groups, n_schemes]`.
    constant
        The cost of everything that is not searched.
    peak
        Whether the cost of an allocation is the largest of the constant and its groups' values, instead of their sum.
    """

    name: str
    column: str
    values: np.ndarray
    constant: float
    peak: bool = False

    def cost_of(self, choice: np.ndarray | Sequence[int]) -> float:
        """The cost of an allocation, given as scheme indices."""
        entries = self.values[np.arange(len(self.values)), np.asarray(choice, dtype=np.intp)]
        return max(self.constant, float(entries.max(initial=0.0))) if self.peak else self.constant + float(entries.sum())


class Cost(ABC):
    """A cost of allocations."""

    name: ClassVar[str]
    column: ClassVar[str]

    @abstractmethod
    def table(self, space: SearchSpace) -> CostTable:
        """The cost of every choice of every group; `InputError` where it is not known."""

    def parse(self, text: str | float) -> float:
        """A limit as the user writes it; `InputError` for anything but a number."""
        try:
            return float(text)
        except (TypeError, ValueError):
            raise InputError(f"budget.{self.name} must be a number; got '{text}'.") from None


def mixed(tables: Sequence[np.ndarray], weights: Sequence[float] | np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """One cost made of several, each scaled to its range over the allocations.

    Parameters
    ----------
    tables
        float64 `[n_groups, n_schemes]` each.
    weights
        One per table.
    allowed
        bool `[n_groups, n_schemes]`, the choices; the others cost 0.

    Returns
    -------
    np.ndarray
        float64 `[n_groups, n_schemes]`.
    """
    total = np.zeros(allowed.shape)
    for values, weight in zip(tables, weights, strict=True):
        least, most = np.where(allowed, values, np.inf).min(1).sum(), np.where(allowed, values, -np.inf).max(1).sum()
        total += weight * values / max(most - least, 1e-300)
    return np.where(allowed, total, 0.0)


def per_layer(space: SearchSpace, cost: Callable[[LayerSpec, QuantScheme], float]) -> np.ndarray:
    """float64 `[n_groups, n_schemes]`: `cost` of each layer in each scheme, summed over the layers of a group."""
    values = [[sum(cost(layer, s) for layer in group.layers) for s in space.schemes.values()] for group in space.groups]
    return np.array(values, dtype=np.float64).reshape(len(space.groups), len(space.schemes))
