"""Which proposals of a search are better than the additive solution, shown on samples that took no part in proposing them.

A search measures many allocations on few samples, and the best of them is partly the luckiest: on other data such a front is no
better than the additive solution, which needs no trial. So samplers are told the loss of one half of the search samples
(`Evaluation.proposal_loss`). When all trials are done, proposals that are not dominated on that half are compared with the
additive solution of the same costs on the other half and on the calibration split, sample by sample, by one-sided paired tests
(`smaller_p_value`), whose results are combined (`combined_p_value`). Those that are better after Holm's correction for the number
of proposals are accepted, and the front consists of accepted evaluations alone: a point of it is the additive solution, a uniform
allocation, or better than the former.

The chance that anything is accepted that is not better on such data is about `LEVEL`, more for very skewed samples. The
sensitivities, of which reference and proposals are made, have seen both halves, and the quantizers the calibration split; neither
knows which of the two allocations is the proposal. A run that is resumed with more trials looks once more, and what was accepted
before stays. What holds on these data holds elsewhere only if they are like it: of samples that the network was trained on that
is not sure. Losses there are small, so that either split has a test of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from mpsearch.allocation import Allocation
from mpsearch.budget import Budget
from mpsearch.divergence import LOSS_FLOOR
from mpsearch.evaluation import REFINED, Evaluation
from mpsearch.intervals import combined_p_value, holm, random_half, smaller_p_value
from mpsearch.optimize.pareto import non_dominated
from mpsearch.pipeline.additive import solution
from mpsearch.pipeline.evaluators import SearchEvaluator
from mpsearch.progress import phase
from mpsearch.runs.deadline import Deadline
from mpsearch.samplers.base import Problem

LEVEL = 0.05
HOPELESS = 0.5  # p-value: what is no better on the search split is not accepted, whatever the calibration split says
MOST_TESTED = 20  # proposals: each needs an evaluation of its reference, and shares the level with the others


def accept(evaluate: SearchEvaluator, problem: Problem, deadline: Deadline | None = None) -> None:
    """Measure the references of the proposals on the front of the proposal half, and record those that are accepted.

    It depends on the trials alone, and not on what an interrupted run has measured after them; with a `deadline` also on how many
    references can be measured until then.
    """
    columns = [table.column for table in problem.objectives]
    trials = evaluate.log.trials()
    seeds = [e for e in trials if e.accepted]
    # A uniform allocation that is on the front by luck has the additive solution of its size next to it.
    additives = [_reference(problem, e) for e in seeds if e.origin == "uniform"]
    deadline, seconds = deadline or Deadline(), seconds_of(evaluate.log)
    for additive in evaluate.all(additives[: deadline.affordable(len(additives), seconds)], "knapsack"):
        evaluate.accept(additive, "knapsack")
    pairs = []
    for proposal in _front(trials, columns):
        if proposal not in seeds:
            reference = _reference(problem, proposal)
            if reference == proposal.allocation:
                evaluate.accept(proposal, "knapsack")
            else:
                pairs.append((proposal, reference))
    pairs.sort(key=lambda pair: pair[0].cost(columns[0]))
    gains = _gains([proposal for proposal, _ in pairs], seeds, columns[0])
    # Spread over the front: where the network is damaged least, relative gains are largest and matter least.
    n_tested = min(MOST_TESTED, len(pairs))
    if (n := deadline.affordable(n_tested, 3 * seconds)) < n_tested:  # the reference, and both on the calibration split
        deadline.leave_out(f"the test of {n_tested - n} of {n_tested} proposals")
    parts = np.array_split(np.arange(len(pairs)), n) if n else []
    best = [part[gains[part].argmax()] for part in parts]
    compare(evaluate, [pairs[i] for i in best])


def seconds_of(evaluations: Iterable[Evaluation]) -> float:
    """The median time of an evaluation on the search split."""
    seconds = [e.seconds for e in evaluations if e.split == "search" and e.origin != REFINED and e.seconds]
    return float(np.median(seconds)) if seconds else 0.0


def compare(evaluate: SearchEvaluator, pairs: Sequence[tuple[Evaluation, Allocation]]) -> None:
    """Measure the references and record them as accepted, and the proposals that are better than theirs by Holm's test."""
    if not pairs:
        return
    with phase("test proposals", 2 * len(pairs)) as advance:
        pending = []
        for _, allocation in pairs:
            pending.append(evaluate.submit(allocation, "knapsack"))  # which in this process measures it
            advance("")
        references = [evaluate.result(each) for each in pending]
        promising, p_values = [], []
        for (proposal, _), reference in zip(pairs, references, strict=True):
            evaluate.accept(reference, "knapsack")
            if proposal.told_loss < reference.told_loss:
                promising.append(proposal)
                p_values.append(_p_value(evaluate, proposal, reference))
            advance("")
    for proposal, is_better in zip(promising, holm(p_values, LEVEL), strict=True):
        if is_better:
            evaluate.accept(proposal, "sampler")


def _p_value(evaluate: SearchEvaluator, proposal: Evaluation, reference: Evaluation) -> float:
    """That the proposal is not better; what an interrupted run has tested is not tested again."""
    pair = proposal.allocation, reference.allocation
    p_value = evaluate.tests.find(*pair)
    if p_value is None:
        p_value = _tested(evaluate, proposal, reference)
        evaluate.tests.add(*pair, p_value)
    return p_value


def _tested(evaluate: SearchEvaluator, proposal: Evaluation, reference: Evaluation) -> float:
    """The p-value, on samples of which no sampler was told; a score without samples has no noise."""
    ours, theirs = (evaluate.losses(e.allocation) for e in (proposal, reference))
    if not len(ours):
        return float(not proposal.loss < reference.loss)
    fresh = ~random_half(len(ours))
    p_value = smaller_p_value(ours[fresh], theirs[fresh])
    if p_value > HOPELESS:
        return p_value
    calibration = [evaluate.losses(e.allocation, "calibration") for e in (proposal, reference)]
    return combined_p_value([p_value, smaller_p_value(*calibration)], [fresh.sum(), len(calibration[0])])


def _reference(problem: Problem, proposal: Evaluation) -> Allocation:
    """The additive solution that costs at most what the proposal does, by every objective."""
    choice = problem.space.choice(proposal.allocation)
    budgets = [Budget(table, table.cost_of(choice)) for table in problem.objectives]
    return solution(problem.full_space, problem.sensitivity.losses(), [*problem.all_budgets, *budgets])


def _front(evaluations: Iterable[Evaluation], columns: Sequence[str]) -> list[Evaluation]:
    """Of the feasible evaluations the non-dominated ones by the loss that samplers are told, one for each allocation."""
    first: dict[Allocation, Evaluation] = {}
    for e in evaluations:
        if e.feasible and np.isfinite(e.told_loss):
            first.setdefault(e.allocation, e)
    measured = list(first.values())
    points = np.array([[*(e.cost(column) for column in columns), e.told_loss] for e in measured])
    return [e for e, kept in zip(measured, non_dominated(points.reshape(-1, 1 + len(columns))), strict=True) if kept]


def _gains(proposals: Sequence[Evaluation], seeds: Sequence[Evaluation], column: str) -> NDArray[np.float64]:
    """By how much ln loss is below the line through the front of the seeds, over a cost; float64 `[n]`, of what is told."""

    def points(evaluations: Sequence[Evaluation]) -> NDArray[np.float64]:
        return np.array([[e.cost(column), np.log(max(e.told_loss, LOSS_FLOOR))] for e in evaluations]).reshape(-1, 2).T

    costs, levels = points(sorted(seeds, key=lambda e: e.cost(column)))
    at, told = points(proposals)
    if not len(costs):
        return -told
    return np.interp(at, costs, np.minimum.accumulate(levels)) - told
