"""AMQ (Lee et al. 2025, https://arxiv.org/abs/2509.12019): NSGA-II on a predictor, the best of what it predicts is measured.

The first `n_first` trials are drawn at random, spread in size; then every trial fits a radial basis function to all that was
measured, evolves a population on its predictions with NSGA-II (Deb et al. 2002), and measures the predicted front's point that
lies farthest from what was measured. AMQ's own budget is 250 + 200 x 50 evaluations; its steps are taken here one trial at a
time. AMQ also pins groups that mind their lowest scheme more than twice as much as the median; that made it worse here and is
left out.
"""

from __future__ import annotations

import numpy as np
from scipy.interpolate import RBFInterpolator

from mpsearch.optimize.pareto import non_dominated
from mpsearch.samplers.levels import Levels
from mpsearch.samplers.proposer import Choice, Floats, History


class AMQ(Levels):
    """See above."""

    n_first = 50
    population, generations = 100, 15

    def propose(self, history: History, rng: np.random.Generator) -> Choice:
        """A point of the predicted front."""

        def drawn(n: int) -> Choice:
            """[n, n_groups], evenly spread in size: each leans towards small or towards large schemes."""
            scores = rng.gumbel(size=(n, *self.losses.shape)) + rng.uniform(-4, 4, (n, 1, 1)) * (
                np.argsort(np.argsort(self.size, axis=1), axis=1) / max(1, self.size.shape[1] - 1)
            )
            return np.where(self.space.allowed, scores, -np.inf).argmax(2)

        measured = history.measured
        if measured.sum() < self.n_first:
            return drawn(1)[0]
        known, log_losses = history.choices[measured], history.log_losses[measured]
        known, first = np.unique(known, axis=0, return_index=True)
        predictor = RBFInterpolator(self._bits(known), log_losses[first], kernel="cubic", smoothing=1e-3, neighbors=None)

        def objectives(choices: Choice) -> Floats:
            return np.stack([self.sizes(choices), predictor(self._bits(choices))], axis=1)

        nearest = known[np.argsort(log_losses[first])][: self.population // 2]
        population = np.concatenate([nearest, drawn(self.population - len(nearest))])
        for _ in range(self.generations):
            parents = population[rng.integers(0, len(population), (2, self.population))]
            children = np.where(rng.random(parents[0].shape) < 0.5, parents[0], parents[1])
            mutated = rng.random(children.shape) < 1 / children.shape[1]
            children = np.where(mutated, drawn(len(children)), children)
            population = np.unique(np.concatenate([population, children]), axis=0)
            population = population[_survivors(objectives(population), self.population)]
        population = population[self.within(population)]
        seen = {row.tobytes() for row in history.choices}
        population = population[[row.tobytes() not in seen for row in population]]
        if not len(population):
            return drawn(1)[0]
        values = objectives(population)
        front = np.flatnonzero(non_dominated(values))
        distance = np.abs(values[front, :1] - history.sizes[measured]).min(1)
        return population[front[distance.argmax()]]

    def _bits(self, choices: Choice) -> Floats:
        """What the predictor sees: each group's size as a share of its largest."""
        top = np.where(self.space.allowed, self.size, 0.0).max(1)
        return self.size[np.arange(choices.shape[1]), choices] / np.where(top > 0, top, 1.0)


def _survivors(values: Floats, n: int) -> Choice:
    """Indices of NSGA-II's next generation: front by front, within the last one the least crowded."""
    left, chosen = np.arange(len(values)), np.empty(0, dtype=np.intp)
    while len(left) and len(chosen) < n:
        front = left[non_dominated(values[left])]
        if len(chosen) + len(front) > n:
            crowding = np.zeros(len(front))
            for axis in range(values.shape[1]):
                order = np.argsort(values[front, axis], kind="stable")
                gaps = np.diff(values[front[order], axis], prepend=-np.inf, append=np.inf)
                spread = max(float(np.ptp(values[front, axis])), 1e-300)
                crowding[order] += (gaps[:-1] + gaps[1:]) / spread
            front = front[np.argsort(-crowding, kind="stable")][: n - len(chosen)]
        chosen = np.concatenate([chosen, front])
        left = np.setdiff1d(left, front)
    return chosen
