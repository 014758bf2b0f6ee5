"""The best allocations if the effects of the groups were additive: the multiple-choice knapsack.

One choice per group, the least total loss under a limit on the total cost. Its Lagrangian relaxation gives the convex hull of the
front and a bound, reduced costs fix nearly every group, and a dynamic programme over the few that are left closes the gap
(Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, chapter 11). Also the cheapest way back under budgets, for proposals.

With an `order` (`monotone.py`) allocations keep it. The relaxation then takes a dynamic programme for each price, the moves push
what stands in their way, and a state of the other programme also is the bits that its chain has come to.

Everywhere: `loss` [n_groups, n_choices] float64, np.inf where a choice is not allowed; `cost` [n_groups, n_choices] int64 or
float64 (sums are exact below 2^53); an allocation is `choice` [n_groups] intp. No argument is modified.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mpsearch.errors import InputError
from mpsearch.monotone import Monotone

Floats = NDArray[np.float64]
Choice = NDArray[np.intp]

MAX_STATES = 1_000_000  # of the dynamic programme, all groups together: a second at worst; 224 x 7 ask for some 10,000
ROUNDING = 1e-12  # relative: sums of a few thousand float64 in another order differ by less
TIE = 1e-9  # what the second of two tables counts beside the first, both as shares of their range, where equals are told apart
HUGE = 1e100  # a loss beyond all others that still can be divided by a cost
BEAM = 512  # partial allocations kept when several budgets pull against one another


class _Steps(NamedTuple):
    """Moves of one group each, in the order to take them, that of their slope; and the allocation that they start from."""

    start: Choice  # [n_groups]
    group: Choice  # [n_steps], like the rest
    before: Choice
    to: Choice
    slope: Floats  # loss added per price moved, ascending


def hull(loss: ArrayLike, cost: ArrayLike) -> NDArray[np.intp]:
    """The Lagrangian convex hull of the front: [n_points, n_groups], from the cheapest allocation to the one of lowest loss.

    Every point is the optimum for its own cost. Beware of the size at many groups: n_points is up to
    n_groups x (n_choices - 1) + 1.
    """
    loss, cost = _checked(loss, cost)
    steps = _upward(loss, cost)
    points = np.repeat(steps.start[None], len(steps.group) + 1, axis=0)
    for row, (group, to) in enumerate(zip(steps.group, steps.to, strict=True), start=1):
        points[row:, group] = to
    return points


def solve(loss: ArrayLike, cost: ArrayLike, limit: float, max_states: int = MAX_STATES, order: Monotone | None = None) -> Choice:
    """The allocation of least total loss whose total cost is at most `limit`; of equal losses, a cheap one.

    Exact (to a relative 1e-12 of the losses), unless the dynamic programme outgrows `max_states`: then the greedily filled
    allocation, whose distance to the optimum is at most total(loss, choice) - lower_bound(loss, cost, limit). An `order` is kept.

    Raises:
        InputError: even the cheapest allocation costs more than `limit`.
    """
    loss, cost = _checked(loss, cost)
    if order:
        return _solve_in_order(loss, cost, _ends(loss, cost, order), order, max_states, limit)
    return _solve(loss, cost, _upward(loss, cost), max_states, limit)


def lower_bound(loss: ArrayLike, cost: ArrayLike, limit: float) -> float:
    """No allocation whose total cost is at most `limit` has less total loss than this (the Lagrangian bound)."""
    loss, cost = _checked(loss, cost)
    steps = _upward(loss, cost)
    _feasible_or_raise(total(cost, steps.start), limit)
    taken, price = _relaxed(cost, limit, steps)
    return float((loss + price * cost).min(1).sum() - price * limit) if price > 0 else total(loss, _walk(steps, taken))


def front(loss: ArrayLike, cost: ArrayLike, n: int, limit: float = np.inf, order: Monotone | None = None) -> list[Choice]:
    """At most `n` (2 or more) optimal allocations within `limit`, distinct, ascending in cost, strictly falling in loss.

    Their own limits are evenly spread in cost from the cheapest allocation to the one of lowest loss, both of which are in it.
    """
    if n < 2:
        raise ValueError(f"A front has two ends: n must be 2 or more, not {n}.")
    loss, cost = _checked(loss, cost)
    if order:
        cheapest, best = ends = _ends(loss, cost, order)
        solved = functools.partial(_solve_in_order, loss, cost, ends, order, MAX_STATES)
    else:
        steps = _upward(loss, cost)
        cheapest, best = steps.start, _walk(steps, len(steps.group))
        solved = functools.partial(_solve, loss, cost, steps, MAX_STATES)
    if total(cost, best) > limit:
        best = solved(limit)
    limits = np.linspace(total(cost, cheapest), total(cost, best), n)[1:-1]
    found = [solved(limit) for limit in limits]
    found.sort(key=lambda choice: (total(cost, choice), total(loss, choice)))
    distinct = [cheapest]
    for choice in found:
        if total(loss, best) < total(loss, choice) < total(loss, distinct[-1]):
            distinct.append(choice)
    return distinct if (best == cheapest).all() else [*distinct, best]


def repair(
    choice: ArrayLike,
    loss: ArrayLike,
    costs: Sequence[ArrayLike],
    limits: Sequence[float],
    order: Monotone | None = None,
) -> Choice:
    """The allocation, brought back under every budget by the moves that add least loss per cost saved; unchanged if it is under.

    `costs` is one [n_groups, n_choices] array per budget, `limits` as many numbers. No move raises any of the costs; of equal
    slopes the move that saves most goes first; the slack that the last move leaves is not filled. Where budgets pull against
    one another so that no such way exists, a feasible allocation is sought from scratch (exactly in small spaces, by a beam of
    partial allocations in large ones). Where there is an `order` the allocation is first brought into it, and then kept in it;
    the slack is filled, for moves that push others save much at once.

    Raises:
        InputError: a limit is below its cheapest allocation, or no allocation was found that meets them all.
    """
    choice = np.array(choice, dtype=np.intp)
    if order:
        loss = np.asarray(loss, dtype=np.float64)
        known = np.isfinite(loss[np.arange(len(choice)), choice])
        choice = order.nearest(np.where(known, choice, loss.argmin(1)))
    if not len(costs):
        return choice
    stack = np.stack([np.asarray(cost, dtype=np.float64) for cost in costs])  # [n_budgets, n_groups, n_choices]
    limit = np.asarray(limits, dtype=np.float64)
    over = _totals(stack, choice) > limit
    if not over.any():
        return choice
    loss = np.asarray(loss, dtype=np.float64)
    for cost, bound in zip(stack, limit, strict=True):
        _feasible_or_raise(float(np.where(np.isfinite(loss), cost, np.inf).min(1).sum()), bound)
    if order:
        return _repair_in_order(choice, loss, stack, limit, order)
    while over.any():
        weight = over / _scale(limit)  # a budget's cost as a share of its limit
        steps = _chain(loss, -np.tensordot(weight, stack, 1), choice, stack)
        saved = stack[:, steps.group, steps.before] - stack[:, steps.group, steps.to]
        excess = _totals(stack, choice) - limit
        under = (np.cumsum(saved[over], axis=1) >= excess[over, None]).any(0)
        if not under.any():
            return _beam(loss, stack, limit)
        still, taken = over, int(under.argmax())
        while still[over].all():  # once, or again where a float sum depends on its order
            taken += 1
            choice = _walk(steps, taken)
            still = _totals(stack, choice) > limit
            if taken >= len(steps.group):
                break
        over = still
    return choice


def _repair_in_order(choice: Choice, loss: Floats, stack: Floats, limits: Floats, order: Monotone) -> Choice:
    """As `repair`: an allocation in order that is over a limit, by moves that raise none of the costs."""
    allowed = np.isfinite(loss) & (stack <= stack[:, np.arange(len(choice)), choice][:, :, None]).all(0)
    loss_left = np.where(allowed, loss, np.inf)
    price = np.tensordot((_totals(stack, choice) > limits) / _scale(limits), stack, 1)
    lowest = order.argmin(np.where(allowed, price, np.inf))

    def fits(found: Choice) -> bool:
        return bool((_totals(stack, found) <= limits).all())

    if not fits(lowest):
        return _beam(loss, stack, limits, order)
    found, _ = _on_hull(loss_left, price, lowest, choice, fits, order)
    return _filled_in_order(found, loss_left, stack, limits, order)


def total(table: NDArray, choice: Choice) -> float:
    """The sum over the groups of `table` [n_groups, n_choices] at their `choice` [n_groups]."""
    return float(table[np.arange(len(choice)), choice].sum())


def _checked(loss: ArrayLike, cost: ArrayLike) -> tuple[Floats, NDArray]:
    loss, cost = np.asarray(loss, dtype=np.float64), np.asarray(cost)
    cost = cost.astype(np.float64 if cost.dtype.kind == "f" else np.int64)
    if loss.ndim != 2 or loss.shape != cost.shape:
        raise ValueError(f"loss and cost must be [n_groups, n_choices] alike, not {loss.shape} and {cost.shape}.")
    allowed = np.isfinite(loss)
    if np.isnan(loss).any() or np.isneginf(loss).any() or not np.isfinite(cost[allowed]).all():
        raise InputError(
            "A loss or a cost is not a number: losses are finite (or inf where a choice is not allowed), costs finite."
        )
    if not allowed.any(1).all():
        raise InputError(f"Group {int(allowed.any(1).argmin())} has no choice that is allowed.")
    return loss, np.where(allowed, cost, 0)


def _feasible_or_raise(cheapest: float, limit: float) -> None:
    if not cheapest <= limit:
        raise InputError(
            f"The limit of {limit:,.12g} is below the cost of the cheapest allocation, {cheapest:,.12g}: "
            "raise the budget or add a cheaper scheme."
        )


def _chain(loss: Floats, price: Floats, start: Choice, falling: Floats | None = None) -> _Steps:
    """The lower convex hull of every group's (price, loss) from its `start` upwards in price, merged by slope.

    `falling` [n, n_groups, n_choices]: tables in which no move may rise.
    """
    group, at, step = np.arange(len(start)), start, 0
    slope = np.full(len(start), -np.inf)
    parts = []
    while len(group):
        mine, here = loss[group], (np.arange(len(group)), at)
        gain = price[group] - price[group, at][:, None]
        usable = (gain > 0) & np.isfinite(mine)
        if falling is not None:
            usable &= (falling[:, group] <= falling[:, group, at][:, :, None]).all(0)
        slopes = np.full(mine.shape, np.inf)
        lost = np.minimum(mine[here], HUGE)[:, None]  # a start that is not allowed is left first, to the next choice that is
        np.divide(mine - lost, gain, out=slopes, where=usable)
        steepest = slopes.min(1)
        to = np.where(slopes == steepest[:, None], gain, -np.inf).argmax(1)  # of equal slopes the farthest
        moves = steepest < np.inf
        gained = gain[here[0], to][moves]
        slope = np.maximum(slope, steepest)[moves]  # convex but for rounding
        group, before, at = group[moves], at[moves], to[moves]
        parts.append((group, before, at, slope, gained, np.full(len(group), step)))
        step += 1
    group, before, to, slope, gained, rank = (np.concatenate(part) for part in zip(*parts, strict=True))
    order = np.lexsort((group, -gained, rank, slope))
    return _Steps(start, group[order], before[order], to[order], slope[order])


def _upward(loss: Floats, cost: NDArray) -> _Steps:
    """The moves from the cheapest allocation (of equal costs the lowest loss) along the hull to the one of lowest loss."""
    lowest = np.where(np.isfinite(loss), cost, np.inf).min(1)
    start = np.where(cost == lowest[:, None], loss, np.inf).argmin(1)
    steps = _chain(loss, cost, start)
    useful = steps.slope < 0
    return _Steps(start, steps.group[useful], steps.before[useful], steps.to[useful], steps.slope[useful])


def _walk(steps: _Steps, taken: int) -> Choice:
    choice = steps.start.copy()
    choice[steps.group[:taken]] = steps.to[:taken]  # a group's steps stand in order, and of repeated indices the last one stays
    return choice


def _relaxed(cost: NDArray, limit: float, steps: _Steps) -> tuple[int, float]:
    """How many steps fit under `limit`, and the loss that the next one would save per cost: the Lagrangian multiplier."""
    spent = total(cost, steps.start) + np.cumsum(cost[steps.group, steps.to] - cost[steps.group, steps.before])
    taken = int(np.searchsorted(spent, limit, side="right"))
    while total(cost, _walk(steps, taken)) > limit:  # float sums depend on their order
        taken -= 1
    return taken, -float(steps.slope[taken]) if taken < len(steps.slope) else 0.0


def _solve(loss: Floats, cost: NDArray, steps: _Steps, max_states: int, limit: float) -> Choice:
    _feasible_or_raise(total(cost, steps.start), limit)
    taken, price = _relaxed(cost, limit, steps)
    choice = _walk(steps, taken)
    if price == 0:
        return choice
    return _closed(_filled(choice, loss, cost, limit), loss, cost, limit, price, max_states)


def _closed(
    choice: Choice, loss: Floats, cost: NDArray, limit: float, price: float, max_states: int, order: Monotone | None = None
) -> Choice:
    """The optimum, from an allocation near it and the price at its limit; `choice` where there are too many states."""
    priced = loss + price * cost
    reduced = priced - priced.min(1)[:, None]
    # An allocation's distance to the Lagrangian bound is its reduced costs + price * slack. All those within `width` are
    # enumerated, so that what is found within it is the optimum; a narrow one is tried first.
    gap = total(reduced, choice) + price * (limit - total(cost, choice))
    if order:
        gap -= total(reduced, order.argmin(reduced))
    rounding = float(ROUNDING * np.abs(priced.min(1)).sum())
    if gap <= rounding or not max_states:
        return choice
    for width in (gap / 64, gap / 16, gap / 4, gap):
        found = _within(width + rounding, reduced, cost, limit, price, max_states, order)
        if found is None:
            return choice
        for better in found:
            if total(cost, better) <= limit:
                return better if total(loss, better) < total(loss, choice) else choice
    return choice


def _filled(choice: Choice, loss: Floats, cost: NDArray, limit: float) -> Choice:
    """While some single move fits into the slack and lowers the loss: take the one that lowers it most."""
    rows = np.arange(len(choice))
    choice = choice.copy()
    while True:
        slack = limit - total(cost, choice)
        added = np.where(cost - cost[rows, choice][:, None] <= slack, loss - loss[rows, choice][:, None], 0.0)
        group, to = divmod(int(added.argmin()), loss.shape[1])
        previous = choice[group]
        choice[group] = to
        if not (added[group, to] < 0 and total(cost, choice) <= limit):
            choice[group] = previous
            return choice


def _ends(loss: Floats, cost: NDArray, order: Monotone) -> tuple[Choice, Choice]:
    """Of the allocations in order the cheapest, and that of lowest loss; of equal ones the better by the other."""
    tables = np.stack([np.where(np.isfinite(loss), cost, np.inf), loss])
    ranges = np.ptp(np.where(np.isfinite(tables), tables, tables.min(2, keepdims=True)), axis=2).sum(1)
    shares = tables / np.where(ranges > 0, ranges, 1.0)[:, None, None]
    sure, tied = order.argmin(np.stack([tables, shares + TIE * shares[::-1]]))
    cheapest, best = (t if total(table, t) <= total(table, s) else s for table, s, t in zip(tables, sure, tied, strict=True))
    return cheapest, best


def _solve_in_order(
    loss: Floats, cost: NDArray, ends: tuple[Choice, Choice], order: Monotone, max_states: int, limit: float
) -> Choice:
    cheapest, best = ends
    _feasible_or_raise(total(cost, cheapest), limit)
    if total(cost, best) <= limit:
        return best
    low, price = _on_hull(loss, cost, cheapest, best, lambda choice: total(cost, choice) <= limit, order)
    choice = _filled_in_order(low, loss, cost[None], np.array([limit]), order)
    return _closed(choice, loss, cost, limit, price, max_states, order)


def _on_hull(
    loss: Floats, cost: NDArray, low: Choice, high: Choice, fits: Callable[[Choice], bool], order: Monotone
) -> tuple[Choice, float]:
    """The costliest optimum for any one price that fits, and that price; `low` fits, `high` does not.

    Each price is the slope between the two (Handler and Zang 1980, A dual algorithm for the constrained shortest path problem).
    """
    price = 0.0
    while (saved := total(cost, high) - total(cost, low)) > 0:
        price = max(total(loss, low) - total(loss, high), 0.0) / saved
        priced = loss + price * cost
        found = order.argmin(priced)
        best = total(priced, low)
        if not total(priced, found) < best - ROUNDING * abs(best):
            break
        low, high = (found, high) if fits(found) else (low, found)
    return low, price


def _filled_in_order(choice: Choice, loss: Floats, stack: NDArray, limits: Floats, order: Monotone) -> Choice:
    """As `_filled`; a move pushes those that stand in its way."""
    while True:
        added, *spent = order.pushing(choice, np.concatenate([loss[None], stack]))
        slack = limits - _totals(stack, choice)
        added = np.where((spent <= slack[:, None, None]).all(0), added, 0.0)
        if not added.min() < 0:
            return choice
        moved = order.pushed(choice, *divmod(int(added.argmin()), loss.shape[1]))
        if not (total(loss, moved) < total(loss, choice) and (_totals(stack, moved) <= limits).all()):
            return choice
        choice = moved


def _within(
    width: float, reduced: Floats, cost: NDArray, limit: float, price: float, max_states: int, order: Monotone | None = None
) -> Iterator[Choice] | None:
    """The Pareto-optimal allocations (cost, loss) within `width` of the bound, lowest loss first; None beyond `max_states`.

    A state is what the groups so far have used more than at their lowest reduced cost, and the sum of their reduced costs; along
    a chain also the level of the last of them, and only states of one level are compared.
    """
    through = reduced  # the least sum of reduced costs with that choice in it, of the group's whole chain
    if order:
        level, before, after = order.around(reduced)
        through = reduced + np.take_along_axis(before, level, axis=1) + np.take_along_axis(after, level, axis=1)
        least = through.min(1)
        through = through - least[:, None]
    kept = through <= width
    single = kept.sum(1) == 1
    lowest = np.where(single, kept.argmax(1), reduced.argmin(1))
    extra = cost - np.take_along_axis(cost, lowest[:, None], axis=1)
    room = limit - total(cost, lowest)
    if not np.issubdtype(cost.dtype, np.integer):
        room += ROUNDING * abs(limit)
    low, high = np.where(kept, extra, np.inf).min(1), np.where(kept, extra, -np.inf).max(1)
    core = np.flatnonzero(~single)
    core = core[np.argsort(low[core] - high[core], kind="stable")]  # widest first, so that the bounds bite early
    since: dict[int, tuple[float, int]] = {}  # of a group in a chain: what those of one choice just before it add, their level
    for chain in order.chains if order else []:
        added, bits = -least[chain[0]], 0
        for group in chain.tolist():
            if single[group]:
                added, bits = added + reduced[group, lowest[group]], level[group, lowest[group]]
            else:
                since[group] = added, bits
                added, bits = 0.0, -1
    if since:
        core = np.array([*since, *(group for group in core.tolist() if group not in since)])
    low_left, high_left = (np.append(column[core][::-1].cumsum()[::-1], 0) for column in (low, high))

    used, excess, trail = np.zeros(1), np.zeros(1), []
    last = np.zeros(1, dtype=np.intp)
    for position in range(len(core) + 1):
        expected = excess
        if position:
            group = core[position - 1]
            options = np.flatnonzero(kept[group])
            n_states = len(used)
            used = (extra[group, options][:, None] + used).ravel()
            expected = excess = (reduced[group, options][:, None] + excess).ravel()
            if order:
                added, bits = since.get(group, (0.0, 0))
                excess, here = excess + added, np.repeat(level[group, options], n_states)
                previous = np.tile(last, len(options)) if bits < 0 else bits
                expected = np.where(here >= previous, excess + after[group, here], np.inf)
                last = here
        slack = room - used  # at the end between this - high_left and this - low_left
        hopeful = (slack >= low_left[position]) & (expected + price * np.maximum(slack - high_left[position], 0) <= width)
        index = np.flatnonzero(hopeful)
        index = index[np.argsort(used[index], kind="stable")]
        added = excess[index] - price * used[index]
        if order and len(index):  # level by level, the lower ones beyond comparison
            by_level = np.argsort(last[index], kind="stable")
            index, added = index[by_level], added[by_level] - 2 * np.ptp(added) * last[index][by_level]
        best_before = np.concatenate(([np.inf], np.minimum.accumulate(added)[:-1]))
        index = index[added < best_before]
        max_states -= len(index)
        if max_states < 0:
            return None
        used, excess, last = used[index], excess[index], last[index] if order else last
        if position:
            trail.append((group, options[index // n_states], index % n_states))
    best_first = np.argsort(excess - price * used, kind="stable") if order else np.arange(len(used))[::-1]

    def allocations() -> Iterator[Choice]:
        for state in best_first:
            choice = lowest.copy()
            for group, option, parent in reversed(trail):
                choice[group], state = option[state], parent[state]
            yield choice

    return allocations()


def _scale(limits: Floats) -> Floats:
    return np.where((limits == 0) | np.isinf(limits), 1.0, np.abs(limits))


def _totals(stack: Floats, choice: Choice) -> Floats:
    return np.array([total(table, choice) for table in stack])  # one by one: a sum over an axis may round differently


def _beam(loss: Floats, costs: Floats, limits: Floats, order: Monotone | None = None) -> Choice:
    """A feasible allocation, of those found the one of lowest loss; kept are the partial ones farthest below the budgets."""
    order = order or Monotone([], loss)
    before = {b: a for chain in order.chains for a, b in itertools.pairwise(chain.tolist())}
    sequence = [g for chain in order.chains for g in chain.tolist()]
    sequence += sorted(set(range(len(loss))) - set(sequence))
    cheapest = np.where(np.isfinite(loss), costs, np.inf).min(2)  # [n_budgets, n_groups]
    left = cheapest.sum(1)
    spent, lost, picked = np.zeros((1, len(limits))), np.zeros(1), np.zeros((1, len(loss)), dtype=np.intp)
    for group in sequence:
        options = np.flatnonzero(np.isfinite(loss[group]))
        left = left - cheapest[:, group]
        parent = np.tile(np.arange(len(spent)), len(options))
        option = np.repeat(options, len(spent))
        spent, lost = spent[parent] + costs[:, group, option].T, lost[parent] + loss[group, option]
        fullest = ((spent + left - limits) / _scale(limits)).max(1)
        if group in before:
            previous = order.level[before[group], picked[parent, before[group]]]
            fullest = np.where(order.level[group, option] >= previous, fullest, np.inf)
        kept = np.lexsort((lost, fullest))[:BEAM]
        kept = kept[fullest[kept] <= ROUNDING]
        spent, lost, picked = spent[kept], lost[kept], picked[parent[kept]]
        picked[:, group] = option[kept]
    for choice in picked[np.argsort(lost, kind="stable")]:
        if (_totals(costs, choice) <= limits).all():
            return choice
    raise InputError(
        "No allocation was found that meets all the budgets together ("
        + ", ".join(f"{limit:,.12g}" for limit in limits)
        + "), though each alone can be met: raise one of them or add a cheaper scheme."
    )
