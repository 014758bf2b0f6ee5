"""Bits that never fall along the depth: the optimum among such allocations, the nearest one, and the moves that lead to others.

A chain is a list of groups along which bits may stay or rise; one along which they fall is read backwards. As it is cut into
runs of equal bits, the best cuts are found level by level of bits, each by prefix sums over all its groups at once: groups x
levels steps, whatever the losses.

Everywhere: tables are `[..., n_groups, n_choices]`, infinite where a choice is not allowed (each group has one that is), an
allocation is `choice` intp `[..., n_groups]`. No argument is modified.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Choice = NDArray[np.intp]


class Monotone:
    """The order that an allocation keeps: along each of `chains` (groups, in order) `bits` [n_groups, n_choices] never fall.

    `bits` are infinite where a choice is not allowed. Without chains it is false, and every allocation keeps it.
    """

    def __init__(self, chains: Sequence[Sequence[int]], bits: Floats) -> None:
        self.chains = [np.array(chain, dtype=np.intp) for chain in chains]
        self.allowed = np.isfinite(bits)
        known = np.unique(bits[self.allowed])
        self.n_levels = len(known)
        self.level = np.where(self.allowed, np.searchsorted(known, bits), self.n_levels)  # [n_groups, n_choices]
        self._slots = [self._slots_of(chain, np.zeros(bits.shape)) for chain in self.chains]

    def __bool__(self) -> bool:
        return bool(self.chains)

    def preferring(self, loss: Floats) -> Monotone:
        """The same order; where a move leaves open which of several choices of equal bits is taken, that of least `loss`."""
        other = copy.copy(self)
        other._slots = [other._slots_of(chain, loss) for chain in self.chains]
        return other

    def consistent(self) -> NDArray[np.bool_]:
        """bool [n_groups, n_choices]: what is part of some allocation that keeps the order; nothing of a chain that has none."""
        kept = self.allowed.copy()
        for chain in self.chains:
            least = 0
            for group in chain:
                kept[group] &= self.level[group] >= least
                least = self.level[group][kept[group]].min(initial=self.n_levels)
            most = self.n_levels - 1
            for group in chain[::-1]:
                kept[group] &= self.level[group] <= most
                most = self.level[group][kept[group]].max(initial=-1)
        return kept

    @cached_property
    def count(self) -> int:
        """How many allocations keep the order."""
        free = np.ones(len(self.allowed), dtype=bool)
        found = 1
        for chain in self.chains:
            free[chain] = False
            ways = [1] + [0] * (self.n_levels - 1)  # Python's integers: there may be more than any float holds
            for group in chain:
                sums = np.cumsum(np.array(ways, dtype=object))
                ways = [sums[k] * int((self.level[group] == k).sum()) for k in range(self.n_levels)]
            found *= sum(ways)
        return found * math.prod(self.allowed[free].sum(1).tolist())

    def every(self) -> Choice:
        """[n, n_groups]: all allocations that keep the order, the last groups changing first."""
        found = np.zeros((1, 0), dtype=np.intp)
        before = {int(b): int(a) for chain in self.chains for a, b in itertools.pairwise(chain)}
        after = {a: b for b, a in before.items()}
        for group, allowed in enumerate(self.allowed):
            options = np.flatnonzero(allowed)
            found = np.column_stack((np.repeat(found, len(options), axis=0), np.tile(options, len(found))))
            here = self.level[group, found[:, -1]]
            lower, upper = before.get(group, group), after.get(group, group)
            if lower < group:
                found = found[self.level[lower, found[:, lower]] <= here]
            elif upper < group:
                found = found[here <= self.level[upper, found[:, upper]]]
        return found

    def holds(self, choices: Choice) -> NDArray[np.bool_]:
        """[...]: which of `choices` [..., n_groups] keep the order."""
        kept = np.ones(choices.shape[:-1], dtype=bool)
        for chain in self.chains:
            levels = self.level[chain, choices[..., chain]]
            kept &= (levels[..., 1:] >= levels[..., :-1]).all(-1)
        return kept

    def argmin(self, table: Floats) -> Choice:
        """[..., n_groups]: of those that keep the order, the allocation of least total `table`. Exact but for rounding."""
        choice = np.where(self.allowed, table, np.inf).argmin(-1)
        for chain, slots in zip(self.chains, self._slots, strict=True):
            rows, n = table[..., chain, :], np.arange(len(chain))
            padded = np.concatenate([rows, np.full((*rows.shape[:-1], 1), np.inf)], axis=-1)
            options = padded[..., n[:, None], slots]  # [..., n_levels, n, most]
            level = _runs(options[..., 0] if slots.shape[2] == 1 else options.min(-1))
            equal = np.take_along_axis(padded, slots[level, n], axis=-1).argmin(-1)
            choice[..., chain] = slots[level, n, equal]
        return choice

    def nearest(self, choices: Choice, center: Choice | None = None) -> Choice:
        """`choices` [..., n_groups] brought into order by the fewest steps from bits to bits.

        Where a `center` [n_groups] is given, what differs from it was moved there on purpose: the other groups give way, and of
        two such that bar each other the one of fewer bits.
        """
        found = choices.copy()
        for chain, slots in zip(self.chains, self._slots, strict=True):
            levels, at, scale = self.level[chain, choices[..., chain]], np.arange(len(chain)), np.ones(1, dtype=np.intp)
            broken = (levels[..., 1:] < levels[..., :-1]).any(-1)
            if not broken.any():
                continue
            levels, rows = levels[broken], found[broken]
            to, left = levels.copy(), np.ones(len(levels), dtype=bool)
            if center is not None:
                middle = self.level[chain, center[chain]]
                moved = levels != middle
                least = np.maximum.accumulate(np.where(moved, levels, 0), axis=1)
                most = np.minimum.accumulate(np.where(moved, levels, self.n_levels)[:, ::-1], axis=1)[:, ::-1]
                to = np.clip(middle, least, np.maximum(least, most))
                left = (slots[to, at, 0] == self.level.shape[1]).any(1)  # where one of the others may not
                scale = np.where(moved, 1 + self.level.size, 1)[left]  # its step is more than all those of the others
            steps = np.abs(np.arange(self.n_levels)[:, None] - levels[left][:, None]) * scale[:, None]
            to[left] = _runs(np.where(slots[:, :, 0] < self.level.shape[1], steps, np.inf))
            rows[:, chain] = np.where(to == levels, rows[:, chain], slots[to, at, 0])
            found[broken] = rows
        return found

    def pushing(self, choice: Choice, tables: Floats) -> Floats:
        """[..., n_groups, n_choices]: what is added to the totals of `tables` when a group takes a choice and pushes others.

        Up in bits it takes along those after it in its chain that have fewer, down those before it that have more; infinite
        where one of them may not follow. `choice` [n_groups] keeps the order.
        """
        change = tables - np.take_along_axis(tables, np.broadcast_to(choice[:, None], (*tables.shape[:-1], 1)), axis=-1)
        change = np.where(self.allowed, change, np.inf)
        for chain, slots in zip(self.chains, self._slots, strict=True):
            own, at = change[..., chain, :], np.arange(len(chain))
            padded = np.concatenate([own, np.full((*own.shape[:-1], 1), np.inf)], axis=-1)
            followed = padded[..., at, slots[:, :, 0]]  # [..., n_levels, n]: what each adds that follows to these bits
            barred, sums = (np.zeros((*followed.shape[:-1], len(chain) + 1)) for _ in range(2))
            np.cumsum(~np.isfinite(followed), axis=-1, out=barred[..., 1:])
            np.cumsum(np.where(np.isfinite(followed), followed, 0.0), axis=-1, out=sums[..., 1:])
            level, at = np.minimum(self.level[chain], self.n_levels - 1), at[:, None]  # [n, n_choices], [n, 1]
            first, last = (ends[level] for ends in self._block(choice, chain))
            begin, end = np.where(at < first, at + 1, np.minimum(last, at)), np.where(at < first, first, at)
            others = sums[..., level, end] - sums[..., level, begin]
            change[..., chain, :] = own + np.where(barred[..., level, end] > barred[..., level, begin], np.inf, others)
        return change

    def free(self, choice: Choice) -> NDArray[np.bool_]:
        """[n_groups, n_choices]: what a group can take alone, so that `choice` [n_groups] keeps the order."""
        least, most = np.zeros(len(choice), dtype=np.intp), np.full(len(choice), self.n_levels - 1)
        for chain in self.chains:
            levels = self.level[chain, choice[chain]]
            least[chain[1:]], most[chain[:-1]] = levels[:-1], levels[1:]
        return self.allowed & (self.level >= least[:, None]) & (self.level <= most[:, None])

    def pushed(self, choice: Choice, group: int, to: int) -> Choice:
        """`choice` after that move: `group` takes `to`, and those that stand in its way follow."""
        choice = choice.copy()
        for chain, slots in zip(self.chains, self._slots, strict=True):
            if group in chain:
                at, level = int(np.flatnonzero(chain == group)[0]), self.level[group, to]
                first, last = (int(ends[level]) for ends in self._block(choice, chain))
                others = slice(at + 1, max(first, at + 1)) if at < first else slice(min(last, at), at)
                choice[chain[others]] = slots[level, others, 0]
        choice[group] = to
        return choice

    def around(self, table: Floats) -> tuple[Choice, Floats, Floats]:
        """Levels [n_groups, n_choices], and [n_groups, n_levels] twice: the least totals of `table` before and after a group.

        Of those before it in its chain with no more bits than that, of those after it with no fewer. Of a group that is in no
        chain all are 0.
        """
        level = np.zeros(self.level.shape, dtype=np.intp)
        before, after = np.zeros((2, len(level), self.n_levels))
        for chain, slots in zip(self.chains, self._slots, strict=True):
            level[chain] = np.minimum(self.level[chain], self.n_levels - 1)
            padded = np.pad(table[chain], ((0, 0), (0, 1)), constant_values=np.inf)
            lowest = padded[np.arange(len(chain))[:, None], slots].min(-1)
            before[chain] = _sums(lowest)[0][:, :-1].T
            after[chain] = _sums(lowest[::-1, ::-1])[0][::-1, -2::-1].T
        return level, before, after

    def _block(self, choice: Choice, chain: Choice) -> tuple[Choice, Choice]:
        """[n_levels] each: where in the chain the first group of at least, and of more than, so many bits stands."""
        levels = self.level[chain, choice[chain]]
        every = np.arange(self.n_levels)
        return np.searchsorted(levels, every), np.searchsorted(levels, every, side="right")

    def _slots_of(self, chain: Choice, loss: Floats) -> Choice:
        """[n_levels, n, most]: the choices of those bits of each group of the chain; `n_choices`, one too many, where none is."""
        levels, n_choices = self.level[chain], self.level.shape[1]
        order = np.lexsort((loss[chain], levels))
        levels = np.take_along_axis(levels, order, axis=1)
        rank = np.arange(n_choices) - np.stack([np.searchsorted(row, row) for row in levels])
        allowed = levels < self.n_levels
        slots = np.full((self.n_levels, len(chain), 1 + rank[allowed].max(initial=0)), n_choices, dtype=np.intp)
        group, column = np.nonzero(allowed)
        slots[levels[group, column], group, rank[group, column]] = order[group, column]
        return slots


def _sums(table: Floats) -> tuple[Floats, list[Floats]]:
    """[..., n_levels, n + 1]: the least totals of the first groups of a chain, `table` [..., n_levels, n], up to each level.

    And for each level but the first a list's [..., n + 1]: the same up to the level before less this level's own sums, the least
    so far: where it was reached is where this level begins.
    """
    allowed = np.isfinite(table)
    if not allowed.all():  # what is not costs more than all the rest can save, and no more, for the sums to stay exact
        least, worst = table.min(-2, keepdims=True), np.where(allowed, table, -np.inf).max(-2, keepdims=True)
        barrier = 2 * (worst - least).sum(-1, keepdims=True)
        table = np.where(allowed, table, worst + np.where(barrier > 0, barrier, 1.0)) - least
    sums = np.zeros((*table.shape[:-1], table.shape[-1] + 1))
    np.cumsum(table, axis=-1, out=sums[..., 1:])
    ahead = []
    for level in range(1, table.shape[-2]):
        ahead.append(np.minimum.accumulate(sums[..., level - 1, :] - sums[..., level, :], axis=-1))
        sums[..., level, :] += ahead[-1]
    return sums, ahead


def _runs(table: Floats) -> Choice:
    """[..., n]: the levels along a chain that never fall and of which `table` [..., n_levels, n] has the least total."""
    flat = table.reshape(-1, *table.shape[-2:])
    rows, n = np.arange(len(flat)), flat.shape[-1]
    found, end = np.zeros((len(flat), n), dtype=np.intp), np.full(len(flat), n)
    for lowest in reversed(_sums(flat)[1]):
        end = (lowest <= lowest[rows, end][:, None]).argmax(1)
        found += np.arange(n) >= end[:, None]
    return found.reshape(*table.shape[:-2], n)
