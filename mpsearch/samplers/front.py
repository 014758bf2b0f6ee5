"""Our own sampler: searches round the measured front with a model that learns the interactions of the groups.

It begins with the knapsack's front (the search enqueues it), fits `surrogate.py` to what was measured, and proposes the
allocation whose expected gain of hypervolume is largest (Emmerich, Giannakoglou and Naujoks 2006; the cost is known, so that
the gain is a sum of expected improvements over the steps of the front), among

- whole knapsack solutions of the surrogate's own additive table, taken near the front at random sizes, thin places first;
- single-level moves round points of the front;
- exchanges, which raise one group and lower another;
- mixtures of two neighbours on the front;

and, in a second round, the moves round the best of these.

Additive allocation is where others stop (HAWQ-V3, ModelOpt, AIMET); measuring what was proposed and looking again is what
EvoPress (Sieberling et al. 2024, https://arxiv.org/abs/2410.14649) and AMQ do with ten thousand evaluations. Here the prior, the
sensitivities and what groups do together, makes do with fifty.
"""

from __future__ import annotations

import numpy as np
from scipy.special import ndtr

from mpsearch.divergence import LOSS_FLOOR
from mpsearch.optimize import knapsack
from mpsearch.optimize.pareto import nearest_front, non_dominated
from mpsearch.optimize.surrogate import Surrogate
from mpsearch.samplers.levels import Levels
from mpsearch.samplers.proposer import Choice, Floats, History

MAX_FITTED = 256  # evaluations that the surrogate is fitted to, those nearest to the front; and so is what it costs
MAX_EVIDENCE = 128  # evaluations that choose its variances
GROWTH = 1.4  # the variances are chosen again when there are so many times the evaluations
POOL = 2e9  # multiplications that may be spent on predicting a pool of candidates
MIN_CANDIDATES, MAX_CANDIDATES = 96, 400
CENTERS = 6  # points of the front that moves start from
TARGETS = 3  # sizes that the knapsack is solved for
MAX_STATES = 5_000  # of its dynamic programme: a proposal need not be the exact optimum of a model


class Front(Levels):
    """See above. Pending trials (of other workers) count as measured, at what the surrogate expects of them."""

    many_costs = True
    _variances: tuple[int, Floats] | None = None

    def propose(self, history: History, rng: np.random.Generator) -> Choice:
        """The candidate of largest expected gain."""
        surrogate = self._fitted(history)
        log_losses = history.log_losses.copy()
        if history.running.any():
            log_losses[history.running] = surrogate.predict(history.choices[history.running])[0]
        usable = np.isfinite(log_losses) & self.within(history.choices)
        front = _Staircase(history.choices[usable], history.sizes[usable], log_losses[usable], self._largest())
        seen = {row.tobytes() for row in history.choices}
        n = int(np.clip(POOL / (self.losses.size * max(1, min(len(history.sizes), MAX_FITTED))), MIN_CANDIDATES, MAX_CANDIDATES))
        pool = self._candidates(front, surrogate, n, rng)
        best = self._best(pool, front, surrogate, seen, 4)
        around = [best, *(self._moves(center, surrogate.table(center), n // (2 * len(best)), rng) for center in best)]
        found = self._best(np.concatenate(around), front, surrogate, seen, 1)
        return found[0] if len(found) else self.smallest

    def _fitted(self, history: History) -> Surrogate:
        """The surrogate, fitted to what was measured nearest to the front."""
        surrogate = Surrogate(self.losses, self.exact, self.effects)
        measured = np.flatnonzero(history.measured)
        when = 0
        for number in _schedule(len(measured)):
            when = number
        if when:
            if self._variances is None or self._variances[0] != when:
                first = measured[:when]
                even = self.even[np.arange(len(self.even)), history.choices[first]].sum(1)  # whichever mixture this one weighs
                first = first[nearest_front(even, history.log_losses[first], MAX_EVIDENCE)]
                surrogate.choose_variances(history.choices[first], history.log_losses[first])
                self._variances = when, surrogate.variances
            surrogate.variances = self._variances[1]
        nearest = measured[nearest_front(history.sizes[measured], history.log_losses[measured], MAX_FITTED)]
        surrogate.fit(history.choices[nearest], history.log_losses[nearest])
        return surrogate

    def _largest(self) -> float:
        """The size up to which a point's gain counts. Also under a budget: its best point serves whoever could afford more."""
        return float(np.where(self.space.allowed, self.size, -np.inf).max(1).sum())

    def _best(self, pool: Choice, front: _Staircase, surrogate: Surrogate, seen: set[bytes], n: int) -> Choice:
        """The `n` candidates of largest expected gain (first the largest) that are new and within the budgets."""
        pool = pool[self.within(pool)]
        pool = pool[[row.tobytes() not in seen for row in pool]]
        if not len(pool):
            return pool
        gain = front.expected_gain(self.sizes(pool), *surrogate.predict(pool))
        order = np.argsort(-gain, kind="stable")[:n]
        return pool[order]

    def _candidates(self, front: _Staircase, surrogate: Surrogate, n: int, rng: np.random.Generator) -> Choice:
        if not len(front.choices):
            return self.repair(self.losses.argmin(1))[None]
        tables: dict[int, Floats] = {}

        def table(i: int) -> Floats:
            if i not in tables:
                tables[i] = surrogate.table(front.choices[i])
            return tables[i]

        found = []
        centers = rng.choice(len(front.choices), min(CENTERS, len(front.choices)), replace=False, p=front.weights)
        for i in centers:
            found.append(self._moves(front.choices[i], table(i), n // (2 * CENTERS), rng))
            j = min(i + 1, len(front.choices) - 1)
            mask = rng.random((n // (4 * CENTERS), len(self.losses))) < rng.random((n // (4 * CENTERS), 1))
            found.append(np.where(mask, front.choices[i], front.choices[j]))
        cheapest = float(np.where(self.space.allowed, self.size, np.inf).min(1).sum())
        for i in rng.choice(len(front.choices), TARGETS, p=front.weights):
            low, high = front.sizes[i], np.append(front.sizes, front.end)[i + 1]
            limit = max(cheapest, rng.uniform(low, max(high, low)))
            choice = front.choices[i]
            for _ in range(2):
                here = table(i) if choice is front.choices[i] else surrogate.table(choice)
                choice = knapsack.solve(np.where(self.space.allowed, here, np.inf), self.size, limit, MAX_STATES)
                found.append(choice[None])
            found.append(self._moves(choice, surrogate.table(choice), n // (4 * TARGETS), rng))
        return np.unique(np.concatenate(found), axis=0)

    def _moves(self, center: Choice, table: Floats, n: int, rng: np.random.Generator) -> Choice:
        """`n` allocations near `center` [n_groups]: moves of a level and exchanges, those that `table` likes most often."""
        found = np.repeat(center[None], n, axis=0)
        kinds = rng.integers(0, 4, n)  # up, down, exchange, exchange of up to two for two
        for step, without in zip(self.neighbours, (1, 0), strict=True):
            to = step[np.arange(len(center)), center]
            there = np.flatnonzero(to != center)
            if not len(there):
                continue
            to = to[there]
            added = table[there, to] - table[there, center[there]]
            grown = self.size[there, to] - self.size[there, center[there]]
            order = np.argsort(added / np.maximum(np.abs(grown), 1e-300), kind="stable")
            ranks = np.minimum(rng.exponential(max(2.0, len(order) / 6), (2, n)).astype(np.intp), len(order) - 1)
            for rank, rows in zip(ranks, (kinds != without, (kinds == 3) & (rng.random(n) < 0.7)), strict=True):
                at = order[rank[rows]]
                found[np.flatnonzero(rows), there[at]] = to[at]
        return found


class _Staircase:
    """The front of measured points, and what a new one would add to it: axes size and ln loss (above the floor)."""

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
        """[n]: the hypervolume that points of known size and normally distributed ln loss are expected to add."""
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


def _schedule(n: int) -> list[int]:
    """8, 11, 15, 21, …: the numbers of evaluations, up to `n`, at which the variances are chosen."""
    numbers, at = [], 8.0
    while at <= n:
        numbers.append(int(at))
        at *= GROWTH
    return numbers
