"""Allocations as levels: what Front, EvoPress and AMQ share, the next larger and the next smaller scheme of a group."""

from __future__ import annotations

import numpy as np

from mpsearch.samplers.proposer import Choice, Floats, Proposer


class Levels(Proposer):
    """A sampler that moves groups from level to level."""

    def weigh(self, size: Floats) -> None:
        """See `Proposer`. `neighbours`, [n_groups, n_schemes] twice, are each scheme's next larger and smaller one, or itself."""
        super().weigh(size)
        up = np.tile(np.arange(self.losses.shape[1]), (len(self.losses), 1))
        down = up.copy()
        order = np.argsort(np.where(self.space.allowed, self.size, np.inf), axis=1, kind="stable")
        for group, (row, n_allowed) in enumerate(zip(order, self.space.allowed.sum(1), strict=True)):
            up[group, row[: n_allowed - 1]] = row[1:n_allowed]
            down[group, row[1:n_allowed]] = row[: n_allowed - 1]
        self.neighbours: tuple[Choice, Choice] = up, down

    def step(self, choice: Choice, rng: np.random.Generator, up: bool) -> Choice:
        """`choice` with one group, drawn among those that can, a level up or down."""
        to = self.neighbours[0 if up else 1][np.arange(len(choice)), choice]
        can = np.flatnonzero(to != choice)
        moved = choice.copy()
        if len(can):
            group = rng.choice(can)
            moved[group] = to[group]
        return moved
