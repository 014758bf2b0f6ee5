"""What other tools do: a path of allocations computed once from the sensitivities, and never looked at again.

Every such tool has one path per table of sensitivities: `metric=kl`, `fisher` (NVIDIA ModelOpt's score), `hawq` (HAWQ-V2 and
V3's) or `weight_mse`. Trials walk it in an order in which any first few are spread over the whole path.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property

import numpy as np

from mpsearch.optimize import knapsack
from mpsearch.samplers.proposer import Choice, History, Proposer


class Path(Proposer):
    """Proposes the allocations of `path`, each once; when all were proposed, changes one at random."""

    @abstractmethod
    def path(self) -> Choice:
        """[n, n_groups]: the allocations, from one end of the front to the other."""

    @cached_property
    def _spread(self) -> Choice:
        path = np.stack([self.repair(choice) for choice in self.path()])
        width = max(1, len(path) - 1).bit_length()
        return path[sorted(range(len(path)), key=lambda i: f"{i:0{width}b}"[::-1])]  # van der Corput

    def propose(self, history: History, rng: np.random.Generator) -> Choice:
        """The first that was not asked for."""
        seen = {row.tobytes() for row in history.choices}
        left = (choice for choice in self._spread if choice.tobytes() not in seen)
        return next(left, self._spread[rng.integers(len(self._spread))])


class ILP(Path):
    """The exact optimum of the additive problem at `n` sizes: 0/1 linear programming on a sensitivity table.

    So work HAWQ-V3 (Yao et al. 2021, https://arxiv.org/abs/2011.10680, eq. 8), NVIDIA ModelOpt's `auto_quantize` and Sony's MCT.
    """

    n = 400

    def path(self) -> Choice:
        """One allocation for each of `n` sizes, those that are the same left out."""
        return np.stack(knapsack.front(self.losses, self.size, self.n))


class GreedyAccuracy(Path):
    """AIMET's automatic mixed precision, phase 2: from the largest down the list of all pairs, least harm first.

    The list of (group, scheme) is sorted by what each does alone, whatever it saves; the order is never revisited (Qualcomm
    AIMET, `aimet_common/amp/mixed_precision_algo.py`).
    """

    def path(self) -> Choice:
        """As many allocations as there are pairs that make the group smaller."""
        choice = np.where(self.space.allowed, self.size, -np.inf).argmax(1)
        path = [choice]
        for pair in np.argsort(self.losses, axis=None, kind="stable"):
            group, scheme = divmod(int(pair), self.losses.shape[1])
            if self.space.allowed[group, scheme] and self.size[group, scheme] < self.size[group, choice[group]]:
                choice = choice.copy()
                choice[group] = scheme
                path.append(choice)
        return np.stack(path)


class GreedyGain(Path):
    """exllamav3's optimizer: from the smallest allocation, always the change that lowers the loss most per bit added.

    (turboderp, exllamav3, `conversion/optimize_model.py`; there the gains are measured on the low-bit model, here by `metric`.)
    """

    def path(self) -> Choice:
        """As many allocations as there are changes that gain."""
        rows = np.arange(len(self.losses))
        choice = np.where(self.space.allowed, self.size, np.inf).argmin(1)
        path = [choice]
        while True:
            more = self.size - self.size[rows, choice][:, None]
            gain = self.losses[rows, choice][:, None] - self.losses
            rate = np.where(self.space.allowed & (more > 0), gain / np.where(more > 0, more, 1.0), -np.inf)
            group, scheme = divmod(int(rate.argmax()), rate.shape[1])
            if not rate[group, scheme] > 0:
                return np.stack(path)
            choice = choice.copy()
            choice[group] = scheme
            path.append(choice)
