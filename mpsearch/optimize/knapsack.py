"""The multiple-choice knapsack: the best allocations if the losses of the groups were additive.

    minimize    sum_g loss[g, x_g]
    over        x_g in {j : loss[g, j] < inf}, one choice for each group g
    subject to  sum_g cost[g, x_g] <= limit

`solve` solves it exactly (Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, chapter 11). With a multiplier lambda >=
0 of the constraint, the Lagrangian

    L(lambda) = sum_g min_j (loss[g, j] + lambda cost[g, j]) - lambda limit

is a lower bound of the optimum. Its maximum lies where the moves along the lower convex hulls of the groups' (cost, loss)
points, in the order of their slopes, exceed the limit. The reduced cost of a choice is loss + lambda cost less the minimum of
its group. An allocation's distance to the bound is the sum of its reduced costs and lambda times its slack, so a choice whose
reduced cost exceeds the gap of a known allocation is in no better one. A dynamic programme over the groups that have several
choices left closes the gap.

`front` solves it for several limits, `vertices` for some at which the bound is exact; `repair` keeps several constraints.

Everywhere: `loss` float64 `[n_groups, n_choices]`, infinite where a choice is not allowed; `cost` int64 or float64 of the
same shape (sums are exact below 2^53); an allocation is `choice`, intp `[n_groups]`. No argument is modified.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mpsearch.errors import InfeasibleBudget, InputError

Floats = NDArray[np.float64]
Choice = NDArray[np.intp]

MAX_STATES = 1_000_000  # of the dynamic programme, all groups together: a second at worst; 224 x 7 ask for some 10,000
ROUNDING = 1e-12  # relative: sums of a few thousand float64 in another order differ by less
HUGE = 1e100  # a loss beyond all others that still can be divided by a cost
BEAM = 512  # partial allocations kept when several budgets pull against one another


class _Steps(NamedTuple):
    """Moves of one group each, in the order to take them, that of their slope; and the allocation that they start from."""

    start: Choice  # [n_groups]
    group: Choice  # [n_steps], like the rest
    before: Choice
    to: Choice
    slope: Floats  # loss added per price moved, ascending


def solve(loss: ArrayLike, cost: ArrayLike, limit: float, max_states: int = MAX_STATES) -> Choice:
    """The allocation of least total loss whose total cost is at most `limit`; of equal losses, a cheap one.

    Exact (to a relative 1e-12 of the losses), unless the dynamic programme outgrows `max_states`: then the greedily filled
    allocation.

    Raises:
        InputError: even the cheapest allocation costs more than `limit`.
    """
    loss, cost = _checked(loss, cost)
    return _solve(loss, cost, limit, _upward(loss, cost), max_states)


def front(loss: ArrayLike, cost: ArrayLike, n: int, limit: float = np.inf) -> list[Choice]:
    """At most `n` (2 or more) optimal allocations within `limit`, distinct, ascending in cost, strictly falling in loss.

    Their limits are evenly spread in cost and, if positive, ln loss (a front is steep at its cheap end), from the cheapest
    allocation to the one of lowest loss.
    """
    if n < 2:
        raise ValueError(f"A front has two ends: n must be 2 or more, not {n}.")
    loss, cost = _checked(loss, cost)
    steps = _upward(loss, cost)
    cheapest, best = steps.start, _walk(steps, len(steps.group))
    if total(cost, best) > limit:
        best = _solve(loss, cost, limit, steps, MAX_STATES)
    limits = _spread(loss, cost, steps, total(cost, best), n)[1:-1]
    solutions = [_solve(loss, cost, limit, steps, MAX_STATES) for limit in limits]
    solutions.sort(key=lambda choice: (total(cost, choice), total(loss, choice)))
    distinct = [cheapest]
    for choice in solutions:
        if total(loss, best) < total(loss, choice) < total(loss, distinct[-1]):
            distinct.append(choice)
    return distinct if (best == cheapest).all() else [*distinct, best]


def vertices(loss: ArrayLike, cost: ArrayLike, n: int) -> list[Choice]:
    """At most `n` (2 or more) optimal allocations, each for its own cost as the limit, distinct, ascending in cost.

    They are evenly drawn from the points on the lower convex hull of all allocations' (cost, loss), and take one sort.
    """
    steps = _upward(*_checked(loss, cost))
    return [_walk(steps, taken) for taken in np.unique(np.linspace(0, len(steps.group), n).round().astype(int))]


def repair(choice: ArrayLike, loss: ArrayLike, costs: Sequence[ArrayLike], limits: Sequence[float]) -> Choice:
    """The allocation, brought back under every budget by the moves that add least loss per cost saved; unchanged if it is under.

    `costs` is one [n_groups, n_choices] array per budget, `limits` as many numbers. No move raises any of the costs; of equal
    slopes the move that saves most goes first; the slack that the last move leaves is not filled. Where budgets pull against
    one another so that no such way exists, a feasible allocation is sought from scratch (exactly in small spaces, by a beam of
    partial allocations in large ones).

    Raises:
        InputError: a limit is below its cheapest allocation, or no allocation was found that meets them all.
    """
    choice = np.array(choice, dtype=np.intp)
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
        raise InfeasibleBudget(
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
        own, current = loss[group], (np.arange(len(group)), at)
        gain = price[group] - price[group, at][:, None]
        usable = (gain > 0) & np.isfinite(own)
        if falling is not None:
            usable &= (falling[:, group] <= falling[:, group, at][:, :, None]).all(0)
        slopes = np.full(own.shape, np.inf)
        lost = np.minimum(own[current], HUGE)[:, None]  # a start that is not allowed is left first, to the next choice that is
        np.divide(own - lost, gain, out=slopes, where=usable)
        steepest = slopes.min(1)
        to = np.where(slopes == steepest[:, None], gain, -np.inf).argmax(1)  # of equal slopes the farthest
        moves = steepest < np.inf
        gained = gain[current[0], to][moves]
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


def _spread(loss: Floats, cost: NDArray, steps: _Steps, end: float, n: int) -> Floats:
    """`n` costs from that of the cheapest allocation to `end`; see `front`."""
    moved = (np.append(total(t, steps.start), t[steps.group, steps.to] - t[steps.group, steps.before]) for t in (cost, loss))
    spent, lost = (np.cumsum(each) for each in moved)
    progress = np.minimum(spent, end) - spent[0]
    if lost.min() > 0 and progress[-1] > 0:
        fallen = -np.log(lost / lost[0]) * (spent <= end)
        progress = progress / progress[-1] + np.maximum.accumulate(fallen) / max(fallen.max(), 1e-300)
    return np.interp(np.linspace(0, progress[-1], n), progress, np.minimum(spent, end))


def _relaxed(cost: NDArray, limit: float, steps: _Steps) -> tuple[int, float]:
    """How many steps fit under `limit`, and the loss that the next one would save per cost: the Lagrangian multiplier."""
    spent = total(cost, steps.start) + np.cumsum(cost[steps.group, steps.to] - cost[steps.group, steps.before])
    taken = int(np.searchsorted(spent, limit, side="right"))
    while total(cost, _walk(steps, taken)) > limit:  # float sums depend on their order
        taken -= 1
    return taken, -float(steps.slope[taken]) if taken < len(steps.slope) else 0.0


def _solve(loss: Floats, cost: NDArray, limit: float, steps: _Steps, max_states: int) -> Choice:
    _feasible_or_raise(total(cost, steps.start), limit)
    taken, price = _relaxed(cost, limit, steps)
    choice = _walk(steps, taken)
    if price == 0:
        return choice
    choice = _filled(choice, loss, cost, limit)
    priced = loss + price * cost
    reduced = priced - priced.min(1)[:, None]
    # An allocation's distance to the Lagrangian bound is its reduced costs + price * slack. All those within `width` are
    # enumerated, so that what is found within it is the optimum; a narrow one is tried first.
    gap = total(reduced, choice) + price * (limit - total(cost, choice))
    rounding = float(ROUNDING * np.abs(priced.min(1)).sum())
    if gap <= rounding:
        return choice
    for width in (gap / 64, gap / 16, gap / 4, gap):
        candidates = _within(width + rounding, reduced, cost, limit, price, max_states)
        if candidates is None:
            return choice
        for better in candidates:
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


def _within(width: float, reduced: Floats, cost: NDArray, limit: float, price: float, max_states: int) -> Iterator[Choice] | None:
    """The Pareto-optimal allocations (cost, loss) within `width` of the bound, lowest loss first; None beyond `max_states`.

    A state is what the groups so far have used more than at their lowest reduced cost, and the sum of their reduced costs.
    """
    lowest = reduced.argmin(1)
    extra = cost - np.take_along_axis(cost, lowest[:, None], axis=1)
    capacity = limit - total(cost, lowest)
    if not np.issubdtype(cost.dtype, np.integer):
        capacity += ROUNDING * abs(limit)
    kept = reduced <= width
    low, high = np.where(kept, extra, 0).min(1), np.where(kept, extra, 0).max(1)
    core = np.flatnonzero(kept.sum(1) > 1)
    core = core[np.argsort(low[core] - high[core], kind="stable")]  # widest first, so that the bounds bite early
    low_left, high_left = (np.append(column[core][::-1].cumsum()[::-1], 0) for column in (low, high))

    used, excess, trail = np.zeros(1), np.zeros(1), []
    for position in range(len(core) + 1):
        if position:
            group = core[position - 1]
            options = np.flatnonzero(kept[group])
            n_states = len(used)
            used = (extra[group, options][:, None] + used).ravel()
            excess = (reduced[group, options][:, None] + excess).ravel()
        slack = capacity - used  # at the end between this - high_left and this - low_left
        hopeful = (slack >= low_left[position]) & (excess + price * np.maximum(slack - high_left[position], 0) <= width)
        order = np.flatnonzero(hopeful)
        order = order[np.argsort(used[order], kind="stable")]
        added = excess[order] - price * used[order]
        best_before = np.concatenate(([np.inf], np.minimum.accumulate(added)[:-1]))
        order = order[added < best_before]
        max_states -= len(order)
        if max_states < 0:
            return None
        used, excess = used[order], excess[order]
        if position:
            trail.append((group, options[order // n_states], order % n_states))

    def allocations() -> Iterator[Choice]:
        for state in reversed(range(len(used))):
            choice = lowest.copy()
            for group, option, parent in reversed(trail):
                choice[group], state = option[state], parent[state]
            yield choice

    return allocations()


def _scale(limits: Floats) -> Floats:
    return np.where((limits == 0) | np.isinf(limits), 1.0, np.abs(limits))


def _totals(stack: Floats, choice: Choice) -> Floats:
    return np.array([total(table, choice) for table in stack])  # one by one: a sum over an axis may round differently


def _beam(loss: Floats, costs: Floats, limits: Floats) -> Choice:
    """A feasible allocation, of those found the one of lowest loss; kept are the partial ones farthest below the budgets."""
    cheapest = np.where(np.isfinite(loss), costs, np.inf).min(2)  # [n_budgets, n_groups]
    left = cheapest.sum(1)
    spent, lost, picked = np.zeros((1, len(limits))), np.zeros(1), np.empty((1, 0), dtype=np.intp)
    for group in range(len(loss)):
        options = np.flatnonzero(np.isfinite(loss[group]))
        left = left - cheapest[:, group]
        parent = np.tile(np.arange(len(spent)), len(options))
        option = np.repeat(options, len(spent))
        spent, lost = spent[parent] + costs[:, group, option].T, lost[parent] + loss[group, option]
        fullest = ((spent + left - limits) / _scale(limits)).max(1)
        order = np.lexsort((lost, fullest))[:BEAM]
        order = order[fullest[order] <= ROUNDING]
        spent, lost, picked = spent[order], lost[order], np.column_stack((picked[parent[order]], option[order]))
    for choice in picked[np.argsort(lost, kind="stable")]:
        if (_totals(costs, choice) <= limits).all():
            return choice
    raise InfeasibleBudget(
        "No allocation was found that meets all the budgets together ("
        + ", ".join(f"{limit:,.12g}" for limit in limits)
        + "), though each alone can be met: raise one of them or add a cheaper scheme."
    )
