"""Samplers of other tools, after their papers and sources: rivals of the package's own in the benchmarks.

`RIVALS` has them by name; each is built as the package's own (`mpsearch.samplers.base.build_sampler`).
"""

from __future__ import annotations

import numpy as np
from scipy.interpolate import RBFInterpolator

from mpsearch.optimize.pareto import non_dominated
from mpsearch.samplers.base import Choice, Floats
from mpsearch.samplers.front import neighbours
from mpsearch.samplers.path import Path
from mpsearch.samplers.proposer import History, Proposer


class AMQ(Proposer):
    """AMQ (Lee et al. 2025, https://arxiv.org/abs/2509.12019): NSGA-II on a predictor, whose best predictions are measured.

    The first `n_first` trials are drawn at random, spread in size. Then every trial fits a radial basis function to all that was
    measured, evolves a population on its predictions with NSGA-II (Deb et al. 2002), and measures the point of the predicted
    front that is farthest from what was measured. AMQ's own budget is 250 + 200 x 50 evaluations; its steps are taken here one
    trial at a time. AMQ also pins groups whose lowest scheme is more than twice as sensitive as the median; that made it worse
    here and is left out.
    """

    n_first = 50
    population, generations = 100, 15

    def choose(self, history: History, rng: np.random.Generator) -> Choice:
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
        population = population[self.feasible.contains(population)]
        population = population[[row.tobytes() not in self.asked for row in population]]
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


class EvoPress(Proposer):
    """EvoPress (Sieberling et al. 2024, https://arxiv.org/abs/2410.14649): evolution at a fixed size by switching levels.

    A child raises one or a few groups by a level and lowers others until the size is the parent's again; the best so far is the
    next parent, a (1 + lambda) scheme. EvoPress searches one size; here `n_sizes` of them take turns, so that there is a front.
    The first parent of a size is the smallest allocation, filled up at random.
    """

    n_sizes = 40

    def choose(self, history: History, rng: np.random.Generator) -> Choice:
        """A child of the best allocation of this trial's size."""
        free = self.space.allowed
        least, most = (f(1).sum() for f in (np.where(free, self.size, np.inf).min, np.where(free, self.size, -np.inf).max))
        limit = least + (most - least) * (1 + len(history.sizes) % self.n_sizes) / (self.n_sizes + 1)
        fits = np.flatnonzero(history.measured & (history.sizes <= limit) & self.feasible.contains(history.choices))
        parent = history.choices[fits[history.log_losses[fits].argmin()]] if len(fits) else self.smallest()
        up, down = neighbours(self.size, self.space.allowed)
        child = parent.copy()
        for _ in range(min(rng.integers(1, 4, 2))):
            child = _step(child, up, rng)
        while self.sizes(child[None])[0] > limit and (child != (lower := _step(child, down, rng))).any():
            child = lower
        for _ in range(len(child)):  # fill what is left
            fuller = _step(child, up, rng)
            if self.sizes(fuller[None])[0] <= limit:
                child = fuller
        return child


def _step(choice: Choice, neighbour: Choice, rng: np.random.Generator) -> Choice:
    """`choice` with one group, drawn among those that can move, at its `neighbour` `[n_groups, n_schemes]`."""
    to = neighbour[np.arange(len(choice)), choice]
    movable = np.flatnonzero(to != choice)
    moved = choice.copy()
    if len(movable):
        group = rng.choice(movable)
        moved[group] = to[group]
    return moved


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


RIVALS = {"amq": AMQ, "evopress": EvoPress, "greedy_accuracy": GreedyAccuracy, "greedy_gain": GreedyGain}
