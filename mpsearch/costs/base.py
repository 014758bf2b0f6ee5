"""The contract of the costs: what an allocation costs, as a table that adds up over the groups, or of which the largest counts.

Either can be budgeted, solved for and repaired without running anything: that is all the search asks of it. A limit on a peak
forbids the choices above it, one by one (`budget.restricted`).
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
    """`constant` + the sum of each group's entry in `values` (float64 `[n_groups, n_schemes]`) is an allocation's cost.

    Of a `peak` the cost is the largest of them instead.
    """

    name: str
    column: str
    values: np.ndarray
    constant: float
    peak: bool = False

    def of(self, choice: np.ndarray | Sequence[int]) -> float:
        """The cost of an allocation, given as scheme indices."""
        entries = self.values[np.arange(len(self.values)), np.asarray(choice, dtype=np.intp)]
        return max(self.constant, float(entries.max(initial=0.0))) if self.peak else self.constant + float(entries.sum())


class Cost(ABC):
    """A cost; its conf file adds it as `cost.<name>` and `budget.<name>`."""

    name: ClassVar[str]
    column: ClassVar[str]

    @abstractmethod
    def table(self, space: SearchSpace) -> CostTable:
        """What every choice of every group costs."""

    def parse(self, text: str | float) -> float:
        """A limit as the user writes it; `InputError` where it is no number."""
        try:
            return float(text)
        except (TypeError, ValueError):
            raise InputError(f"budget.{self.name} is a number; '{text}' came.") from None


def mixed(tables: Sequence[np.ndarray], weights: Sequence[float] | np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """float64 `[n_groups, n_schemes]`: one cost made of several, each as a share of the way from its least to its most.

    `tables` are float64 `[n_groups, n_schemes]`, `weights` one each, `allowed` bool `[n_groups, n_schemes]` the choices.
    """
    found = np.zeros(allowed.shape)
    for values, weight in zip(tables, weights, strict=True):
        least, most = np.where(allowed, values, np.inf).min(1).sum(), np.where(allowed, values, -np.inf).max(1).sum()
        found += weight * values / max(most - least, 1e-300)
    return np.where(allowed, found, 0.0)


def per_layer(space: SearchSpace, of: Callable[[LayerSpec, QuantScheme], float]) -> np.ndarray:
    """float64 `[n_groups, n_schemes]`: what `of` says of each layer in each scheme, summed over the layers of a group."""
    values = [[sum(of(layer, s) for layer in group.layers) for s in space.schemes.values()] for group in space.groups]
    return np.array(values, dtype=np.float64).reshape(len(space.groups), len(space.schemes))
