"""Additive allocation, as other tools do it: a list of allocations computed once from the sensitivities.

There is one list for each table of sensitivities: `metric=kl`, `fisher` (NVIDIA ModelOpt's score), `hawq` (HAWQ-V2 and V3's) or
`weight_mse`.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property

import numpy as np

from mpsearch.optimize import knapsack
from mpsearch.samplers.base import Choice
from mpsearch.samplers.proposer import History, Proposer


class Path(Proposer):
    """Proposes the allocations of `path`, each once; when all were proposed, changes one at random."""

    @abstractmethod
    def path(self) -> Choice:
        """intp `[n, n_groups]`: the allocations, from one end of the front to the other."""

    @cached_property
    def _spread(self) -> Choice:
        """The path in van der Corput's order: any first few are spread over all of it."""
        path = np.stack([self.feasible.repair(choice) for choice in self.path()])
        width = max(1, len(path) - 1).bit_length()
        return path[sorted(range(len(path)), key=lambda i: f"{i:0{width}b}"[::-1])]

    def choose(self, history: History, rng: np.random.Generator) -> Choice:
        """The first that no trial has."""
        left = (choice for choice in self._spread if choice.tobytes() not in self.asked)
        return next(left, self._spread[rng.integers(len(self._spread))])


class ILP(Path):
    """The exact optimum of the additive problem at `n` sizes: 0/1 linear programming on a sensitivity table.

    So do HAWQ-V3 (Yao et al. 2021, https://arxiv.org/abs/2011.10680, eq. 8), NVIDIA ModelOpt's `auto_quantize` and Sony's MCT.
    """

    n = 400

    def path(self) -> Choice:
        """One allocation for each of `n` sizes, distinct."""
        return np.stack(knapsack.front(self.losses, self.size, self.n))
