"""Our own sampler: Bayesian optimization of the front, with a surrogate that learns the interactions of the groups.

The study begins with exact knapsack solutions (`pipeline/search.py`). Then the surrogate (`optimize/surrogate.py`) is fitted to
the evaluations, and the proposal is the allocation of largest expected hypervolume improvement (Emmerich, Giannakoglou and
Naujoks 2006; the cost is known, so it is a sum of expected improvements over the steps of the front) over what is measured and
what the surrogate predicts of the additive solutions between, which need no trial, among

- knapsack solutions of the surrogate's first-order table near points of the front, at random sizes, wide gaps first;
- moves of single groups by a level, from points of the front;
- exchanges, which raise one group and lower another;
- mixtures of two adjacent points of the front;

and, in a second round, the moves from the best of these. Every eighth trial is proposed by Optuna's TPE, which knows nothing of
sensitivities and so depends on no assumption about them.

HAWQ-V3, ModelOpt and AIMET stop at the additive allocation. EvoPress (Sieberling et al. 2024,
https://arxiv.org/abs/2410.14649) and AMQ evaluate proposals and iterate, with ten thousand evaluations; the prior of
sensitivities and Gauss-Newton features needs about fifty.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from mpsearch.divergence import LOSS_FLOOR
from mpsearch.optimize import knapsack
from mpsearch.optimize.pareto import non_dominated
from mpsearch.optimize.surrogate import MAX_FITTED, Surrogate
from mpsearch.samplers.base import Choice, Floats
from mpsearch.samplers.proposer import History, Proposer

if TYPE_CHECKING:
    from mpsearch.samplers.optuna_sampler import TPEProposals

TPE_EVERY = 8  # trials
GROWTH = 1.4  # the variances are chosen again when there are so many times the evaluations
POOL = 2e9  # multiplications that may be spent on predicting a pool of candidates
MIN_CANDIDATES, MAX_CANDIDATES = 96, 400
CENTERS = 6  # points of the front that moves start from
ADDITIVE = 128  # solutions of the additive problem that an improvement is counted over
TARGETS = 3  # sizes that the knapsack is solved for
MAX_STATES = 5_000  # of its dynamic programme: a proposal need not be the exact optimum of a model

Steps = tuple[Choice, Choice]


class Front(Proposer):
    """See above. Trials that are still running count as measured, at the surrogate's expectation."""

    many_costs = True
    _variances: tuple[int, Floats] | None = None
    _tpe: TPEProposals | None = None

    def choose(self, history: History, rng: np.random.Generator) -> Choice:
        """The candidate of largest expected hypervolume improvement; every `TPE_EVERY`-th trial is what Optuna's TPE proposes."""
        done = np.flatnonzero(history.measured[: int(np.argmax(np.append(history.running, True)))])
        if len(history.sizes) % TPE_EVERY == 0 and len(done):
            return self._from_tpe(history.choices[done], history.log_losses[done], int(rng.integers(2**31)))
        surrogate = self._fitted(history)
        log_losses = history.log_losses.copy()
        if history.running.any():
            log_losses[history.running] = surrogate.predict(history.choices[history.running])[0]
        usable = np.isfinite(log_losses) & self.feasible.contains(history.choices)
        additive = self._additive()
        choices = np.concatenate([history.choices[usable], additive])
        log_losses = np.concatenate([log_losses[usable], surrogate.predict(additive)[0]])
        front = _Staircase(choices, self.sizes(choices), log_losses, self._largest())
        n = int(np.clip(POOL / (self.losses.size * max(1, min(len(history.sizes), MAX_FITTED))), MIN_CANDIDATES, MAX_CANDIDATES))
        steps = neighbours(self.size, self.space.allowed)
        best = self._best(self._candidates(front, surrogate, steps, n, rng), front, surrogate, 4)
        moves = [self._moves(center, surrogate.table(center), steps, n // (2 * len(best)), rng) for center in best]
        best = self._best(np.concatenate([best, *moves]), front, surrogate, 1)
        return best[0] if len(best) else self.smallest()

    def _additive(self) -> Choice:
        """intp `[n, n_groups]`: solutions of the additive problem within the budgets that no trial has."""
        solutions = np.array(knapsack.vertices(self.losses, self.size, ADDITIVE))
        solutions = solutions[self.feasible.contains(solutions)]
        return solutions[[row.tobytes() not in self.asked for row in solutions]]

    def _from_tpe(self, choices: Choice, log_losses: Floats, seed: int) -> Choice:
        """What TPE proposes after trials of `choices` `[n, n_groups]` with `log_losses` `[n]`."""
        if self._tpe is None:
            from mpsearch.samplers.optuna_sampler import TPEProposals  # Optuna is imported where it is used

            self._tpe = TPEProposals(self.space.names, self.space.choices)
        even = self.even[np.arange(len(self.even)), choices].sum(1)  # whichever mixture is weighed now
        params = [dict(self.space.allocation(choice)) for choice in choices]
        proposed = self._tpe.propose(params, np.stack([log_losses, even], axis=1).tolist(), seed)
        index = {name: i for i, name in enumerate(self.space.scheme_names)}
        return np.array([index[proposed[name]] for name in self.space.names], dtype=np.intp)

    def _fitted(self, history: History) -> Surrogate:
        """The surrogate of the measured trials; its variances are chosen again at the numbers of trials of `_schedule`."""
        sensitivity = self.problem.sensitivity
        surrogate = Surrogate(self.losses, sensitivity.exact, sensitivity.effects)
        measured = np.flatnonzero(history.measured)
        if n := max(_schedule(len(measured)), default=0):
            if self._variances is None or self._variances[0] != n:
                first = measured[:n]
                even = self.even[np.arange(len(self.even)), history.choices[first]].sum(1)  # whichever mixture is weighed now
                surrogate.choose_variances(history.choices[first], history.log_losses[first], even)
                self._variances = n, surrogate.variances
            surrogate.variances = self._variances[1]
        surrogate.fit(history.choices[measured], history.log_losses[measured], history.sizes[measured])
        return surrogate

    def _largest(self) -> float:
        """The size up to which an improvement counts; under a budget too, where the best point serves all larger sizes."""
        return float(np.where(self.space.allowed, self.size, -np.inf).max(1).sum())

    def _best(self, pool: Choice, front: _Staircase, surrogate: Surrogate, n: int) -> Choice:
        """The `n` candidates of largest expected improvement, in descending order, that are new and within the budgets."""
        finite = np.isfinite(self.problem.sensitivity.values)  # what breaks the network alone breaks it with others
        pool = pool[finite[np.arange(len(finite)), pool].all(1) & self.feasible.contains(pool)]
        pool = pool[[row.tobytes() not in self.asked for row in pool]]
        if not len(pool):
            return pool
        gain = front.expected_gain(self.sizes(pool), *surrogate.predict(pool))
        return pool[np.argsort(-gain, kind="stable")[:n]]

    def _candidates(self, front: _Staircase, surrogate: Surrogate, steps: Steps, n: int, rng: np.random.Generator) -> Choice:
        if not len(front.choices):
            return self.feasible.repair(self.losses.argmin(1))[None]
        table = functools.cache(lambda i: surrogate.table(front.choices[i]))
        pool = []
        centers = rng.choice(len(front.choices), min(CENTERS, len(front.choices)), replace=False, p=front.weights)
        for i in centers:
            pool.append(self._moves(front.choices[i], table(i), steps, n // (2 * CENTERS), rng))
            j = min(i + 1, len(front.choices) - 1)
            mask = rng.random((n // (4 * CENTERS), len(self.losses))) < rng.random((n // (4 * CENTERS), 1))
            pool.append(np.where(mask, front.choices[i], front.choices[j]))
        cheapest = float(np.where(self.space.allowed, self.size, np.inf).min(1).sum())
        for i in rng.choice(len(front.choices), TARGETS, p=front.weights):
            low, high = front.sizes[i], np.append(front.sizes, front.end)[i + 1]
            limit = max(cheapest, rng.uniform(low, max(high, low)))
            near = table(i)
            for _ in range(2):
                choice = knapsack.solve(np.where(self.space.allowed, near, np.inf), self.size, limit, MAX_STATES)
                near = surrogate.table(choice)
                pool.append(choice[None])
            pool.append(self._moves(choice, near, steps, n // (4 * TARGETS), rng))
        return np.unique(np.concatenate(pool), axis=0)

    def _moves(self, center: Choice, table: Floats, steps: Steps, n: int, rng: np.random.Generator) -> Choice:
        """`n` allocations near `center` `[n_groups]`: moves of a level and exchanges, of low slope in `table` most often."""
        moved = np.repeat(center[None], n, axis=0)
        kinds = rng.integers(0, 4, n)  # up, down, exchange, exchange of up to two for two
        for step, without in zip(steps, (1, 0), strict=True):
            to = step[np.arange(len(center)), center]
            movable = np.flatnonzero(to != center)
            if not len(movable):
                continue
            to = to[movable]
            added = table[movable, to] - table[movable, center[movable]]
            grown = self.size[movable, to] - self.size[movable, center[movable]]
            order = np.argsort(added / np.maximum(np.abs(grown), 1e-300), kind="stable")
            ranks = np.minimum(rng.exponential(max(2.0, len(order) / 6), (2, n)).astype(np.intp), len(order) - 1)
            for rank, rows in zip(ranks, (kinds != without, (kinds == 3) & (rng.random(n) < 0.7)), strict=True):
                at = order[rank[rows]]
                moved[np.flatnonzero(rows), movable[at]] = to[at]
        return moved


class _Staircase:
    """The front of measured points, and the improvement by a new one; axes size and ln loss (above the floor)."""

    def __init__(self, choices: Choice, sizes: Floats, log_losses: Floats, end: float) -> None:
        log_losses = np.maximum(log_losses, np.log(LOSS_FLOOR))
        keep = np.flatnonzero(non_dominated(np.stack([sizes, log_losses], axis=1)))
        keep = keep[np.argsort(sizes[keep], kind="stable")]
        self.choices, self.sizes, self.levels = choices[keep], sizes[keep], log_losses[keep]
        self.end = max(end, float(sizes.max(initial=0.0)))
        self.worst = float(log_losses.max(initial=0.0))
        # A point is drawn as often as the gap behind it is wide and high; all of them sometimes.
        gaps = np.diff(self.sizes, append=self.end) / max(self.end - self.sizes[0], 1e-300) if len(keep) else np.empty(0)
        drops = np.abs(np.diff(self.levels, append=self.levels[-1:])) / max(np.ptp(self.levels), 1e-300) if len(keep) else gaps
        weights = gaps + drops + 0.5 / max(len(keep), 1)
        self.weights = weights / weights.sum() if len(keep) else weights

    def expected_gain(self, sizes: Floats, means: Floats, deviations: Floats) -> Floats:
        """float64 `[n]`: the expected hypervolume improvement by points of known size and normally distributed ln loss."""
        starts = np.append(-np.inf, self.sizes)
        ends = np.append(self.sizes, self.end)
        levels = np.append(self.worst, self.levels)
        widths = np.maximum(ends - np.maximum(starts, sizes[:, None]), 0.0)
        floor = np.log(LOSS_FLOOR)

        def improvement(level: Floats) -> Floats:
            z = (level - means[:, None]) / deviations[:, None]
            return deviations[:, None] * (z * ndtr(z) + np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi))

        gain = improvement(levels[None]) - improvement(np.array([[floor]]))
        return (widths * np.maximum(gain, 0.0)).sum(1)


def neighbours(size: Floats, allowed: NDArray[np.bool_]) -> Steps:
    """intp `[n_groups, n_schemes]` twice: for each scheme of each group the next larger and the next smaller one, or itself."""
    order = np.argsort(np.where(allowed, size, np.inf), axis=1, kind="stable")
    up = np.tile(np.arange(size.shape[1]), (len(size), 1))
    down = up.copy()
    groups, levels = np.nonzero(np.arange(1, size.shape[1]) < allowed.sum(1)[:, None])
    smaller, larger = order[groups, levels], order[groups, levels + 1]
    up[groups, smaller], down[groups, larger] = larger, smaller
    return up, down


def _schedule(n: int) -> list[int]:
    """8, 11, 15, 21, …: the numbers of evaluations, up to `n`, at which the variances are chosen."""
    numbers, at = [], 8.0
    while at <= n:
        numbers.append(int(at))
        at *= GROWTH
    return numbers
