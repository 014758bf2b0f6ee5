"""EvoPress (Sieberling et al. 2024, https://arxiv.org/abs/2410.14649): evolution at a fixed size by switching levels.

A child raises one or a few groups by a level and lowers others until the size is the parent's again; the best so far is the next
parent, a (1 + lambda) scheme. EvoPress searches one size; here `n_sizes` of them take turns, so that there is a front.
"""

from __future__ import annotations

import numpy as np

from mpsearch.samplers.levels import Levels
from mpsearch.samplers.proposer import Choice, History


class EvoPress(Levels):
    """See above; a size's first parent is the uniform allocation below it, filled up at random."""

    n_sizes = 40

    def propose(self, history: History, rng: np.random.Generator) -> Choice:
        """A child of the best allocation of this trial's size."""
        free = self.space.allowed
        least, most = (f(1).sum() for f in (np.where(free, self.size, np.inf).min, np.where(free, self.size, -np.inf).max))
        limit = least + (most - least) * (1 + len(history.sizes) % self.n_sizes) / (self.n_sizes + 1)
        fits = np.flatnonzero(history.measured & (history.sizes <= limit) & self.within(history.choices))
        parent = history.choices[fits[history.log_losses[fits].argmin()]] if len(fits) else self.smallest
        child = parent.copy()
        for _ in range(min(rng.integers(1, 4, 2))):
            child = self.step(child, rng, up=True)
        while self.sizes(child[None])[0] > limit and (child != (lower := self.step(child, rng, up=False))).any():
            child = lower
        for _ in range(len(child)):  # the room that is left
            fuller = self.step(child, rng, up=True)
            if self.sizes(fuller[None])[0] <= limit:
                child = fuller
        return child
