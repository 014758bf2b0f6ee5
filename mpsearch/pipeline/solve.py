"""Solve a finished run again for budgets that it was not made for, from what it measured; then measure what comes out.

The sensitivities make it a knapsack, which takes milliseconds; everything else that was measured says where their sum is wrong,
so that the surrogate is solved too, which takes less than a second. Predictions are not to be trusted near a limit, so both
solutions are measured on the search split like any other, and the best accepted one within the budgets is the answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpsearch.allocation import Allocation, SearchSpace
from mpsearch.budget import Budget, feasible, restricted
from mpsearch.costs.base import CostTable
from mpsearch.divergence import LOSS_FLOOR
from mpsearch.errors import InfeasibleBudget, InputError
from mpsearch.evaluation import Evaluation, SensitivityTable
from mpsearch.optimize import knapsack
from mpsearch.optimize.surrogate import Surrogate
from mpsearch.pipeline.accept import compare
from mpsearch.pipeline.additive import solution, solved
from mpsearch.pipeline.evaluators import SearchEvaluator

FEWEST = 8  # evaluations that a surrogate is fitted to
N_STARTS = 5  # measured allocations that are solved from
MOST_SOLVED, FEW_STATES = 6, 5_000  # knapsacks from each, and the states of their dynamic programme
MOST_MOVES, MOST_PAIRED, MOST_PREDICTED = 20, 150, 500  # steps of the descent; moves that are paired, and pairs predicted
MOST_STEPS = 12  # of a bisection, each measured: the cost is known to 1 / 4096 of its range


def prediction(sensitivity: SensitivityTable, measured: Sequence[Evaluation], budgets: Sequence[Budget]) -> Allocation:
    """The allocation within `budgets` that the surrogate, fitted to what was `measured`, predicts the lowest loss of.

    Starting at the additive solution and at the best measured allocations within the budgets, the knapsack of the surrogate's
    table is solved repeatedly until a solution recurs; then single groups are moved and pairs exchanged while that lowers the
    predicted loss.
    """
    additive = solution(sensitivity.space, sensitivity.losses(), budgets)
    known = {e.allocation: e for e in measured if np.isfinite(e.told_loss) and e.told_loss > 0}
    if len(known) < FEWEST:
        return additive
    space, others = restricted(sensitivity.space, budgets)
    choices = np.stack([space.choice(allocation) for allocation in known])
    log_losses = np.log(np.maximum([e.told_loss for e in known.values()], LOSS_FLOOR))
    sizes = space.storage_bits[np.arange(choices.shape[1]), choices].sum(1)
    # Allocations that the budgets forbid inform the surrogate too: its table is that of the whole space.
    surrogate = Surrogate(sensitivity.losses(), sensitivity.exact, sensitivity.effects)
    surrogate.choose_variances(choices, log_losses, sizes)
    surrogate.fit(choices, log_losses, sizes)

    solutions = {row.tobytes(): row for row in (space.choice(additive), *_starts(choices, log_losses, budgets))}
    for choice in list(solutions.values()):
        for _ in range(MOST_SOLVED):
            table = np.where(space.allowed, surrogate.table(choice), np.inf)
            choice = solved(table, others, FEW_STATES)
            if choice.tobytes() in solutions:
                break
            solutions[choice.tobytes()] = choice
    pool = np.stack(list(solutions.values()))
    best = pool[surrogate.predict(pool)[0].argmin()]
    return space.allocation(_descended(best, surrogate, space, others))


def best_within(
    evaluate: SearchEvaluator,
    sensitivity: SensitivityTable,
    budgets: Sequence[Budget],
    objectives: Sequence[str] = ("size_bytes",),
) -> Evaluation:
    """Measure the additive solution for `budgets` and the predicted one; of the accepted within them, that of lowest loss.

    The prediction is accepted where it is shown to be better (`mpsearch.pipeline.accept`). No other accepted one within the
    budgets dominates the answer: of equal losses the cheapest by `objectives`, the columns of costs, counts.
    """
    space = sensitivity.space
    additive = solution(space, sensitivity.losses(), budgets)
    evaluate(additive, "knapsack")
    predicted = evaluate(prediction(sensitivity, evaluate.log.on("search"), budgets), "sampler")
    compare(evaluate, [(predicted, additive)])
    return min(_within(evaluate, space, budgets), key=lambda e: (e.loss, [e.cost(column) for column in objectives]))


def cheapest_within(
    evaluate: SearchEvaluator, sensitivity: SensitivityTable, budgets: Sequence[Budget], objective: CostTable, max_drop: float
) -> Evaluation:
    """The cheapest point within `budgets` that keeps to `max_drop`, of all that were measured and are not dominated there.

    Bisects the cost between the cheapest allocation that keeps to it so far and the costliest below that does not, and measures
    the solution at each limit. The drop is that on the search split, on which the point is chosen, so that it flatters: what it
    is worth, confirmation says.

    Raises `InputError` where no allocation that was measured keeps to it.
    """
    space, quality = sensitivity.space, evaluate.engine.quality
    baseline = next(e for e in evaluate.log if e.origin == "float" and e.split == "search")

    def cost(e: Evaluation) -> float:
        return objective.cost_of(space.choice(e.allocation))

    def drop(e: Evaluation) -> float:
        return e.drop_from(baseline, quality)[0]

    def keeps(e: Evaluation) -> bool:
        return bool(np.isfinite(e.loss)) and drop(e) <= max_drop + 1e-9

    def cheapest() -> Evaluation | None:
        lowest = np.inf
        for e in sorted(_within(evaluate, space, budgets), key=lambda e: (cost(e), e.loss)):
            if e.loss < lowest and keeps(e):  # else one that costs at most as much has at most this loss
                return e
            lowest = min(lowest, e.loss)
        return None

    best = cheapest()
    if best is None:
        best_within(evaluate, sensitivity, budgets)
        best = cheapest()
    if best is None:
        drops = [drop(e) for e in _within(evaluate, space, budgets)]
        raise InputError(
            f"No allocation within the budgets has a {quality.drop_word} of at most {quality.drop_text(max_drop)} on the search "
            f"split; the least is {quality.drop_text(min(drops, default=np.nan))}. Allow more, raise a budget, or search with "
            "larger schemes."
        )
    low = objective.cost_of(np.where(space.allowed, objective.values, np.inf).argmin(axis=1))
    for _ in range(MOST_STEPS):
        limit = Budget(objective, (low + cost(best)) / 2)
        try:
            best_within(evaluate, sensitivity, [*budgets, limit])
        except InfeasibleBudget:
            low = limit.limit
            continue
        best = cheapest() or best
        if not limit.allows(space.choice(best.allocation)):
            low = limit.limit
    return cheapest() or best


def _starts(choices: np.ndarray, log_losses: np.ndarray, budgets: Sequence[Budget]) -> np.ndarray:
    """The best of `choices` [n, n_groups] within the budgets."""
    within = np.array([feasible(budgets, choice) for choice in choices])
    order = np.argsort(log_losses[within], kind="stable")[:N_STARTS]
    return choices[within][order]


def _descended(choice: np.ndarray, surrogate: Surrogate, space: SearchSpace, budgets: Sequence[Budget]) -> np.ndarray:
    """`choice` after the moves that lower the predicted loss most: of one group, or of two of those that promise most."""
    rows = np.arange(len(choice))
    lowest = surrogate.predict(choice[None])[0][0]
    for _ in range(MOST_MOVES):
        table = surrogate.table(choice)
        groups, to = np.nonzero(space.allowed & (np.arange(len(space.schemes)) != choice[:, None]))
        change = np.stack([b.table.values[groups, to] - b.table.values[groups, choice[groups]] for b in budgets] or [0 * groups])
        added = table[groups, to] - table[groups, choice[groups]]
        slack = np.array([b.capacity - knapsack.total(b.table.values, choice) for b in budgets] or [0.0])
        # Pairs of all moves where they are few; else of those that lower the loss most, or free most of a budget for it.
        slope = added / np.maximum(np.abs(change / np.abs(change).max(1, keepdims=True).clip(1e-300)).max(0), 1e-9)
        some = np.argsort(slope, kind="stable")[:MOST_PAIRED]
        groups, to, change, added = groups[some], to[some], change[:, some], added[some]
        one, two = np.triu_indices(len(groups))
        fits = (change[:, one] + change[:, two] * (one != two) <= slack[:, None]).all(0)
        fits &= (one == two) | (groups[one] != groups[two])
        one, two = one[fits], two[fits]
        promise = np.argsort(added[one] + added[two] * (one != two), kind="stable")[:MOST_PREDICTED]
        one, two = one[promise], two[promise]
        if not len(one):
            return choice
        pool = np.repeat(choice[None], len(one), axis=0)
        pool[np.arange(len(one)), groups[one]] = to[one]
        pool[np.arange(len(one)), groups[two]] = to[two]
        pool = pool[[all(b.table.values[rows, c].sum() <= b.capacity for b in budgets) for c in pool]]
        if not len(pool):
            return choice
        losses = surrogate.predict(pool)[0]
        if not losses.min() < lowest - 1e-9:
            return choice
        choice, lowest = pool[losses.argmin()], losses.min()
    return choice


def _within(evaluate: SearchEvaluator, space: SearchSpace, budgets: Sequence[Budget]) -> list[Evaluation]:
    return [e for e in evaluate.log.accepted() if feasible(budgets, space.choice(e.allocation))]
