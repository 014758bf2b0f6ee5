"""A finished run under other budgets: solved, measured, the best of all that is known; and the cheapest within a drop."""

import itertools
import time

import numpy as np
import pytest

from mpsearch import knapsack
from mpsearch.allocation import SearchSpace
from mpsearch.budget import Budget, read_budgets
from mpsearch.costs.bit_operations import BitOperations
from mpsearch.costs.size import AverageBits, Bytes
from mpsearch.engine import FLOAT
from mpsearch.errors import InputError
from mpsearch.layer import LayerSpec
from mpsearch.metrics.kl import KL
from mpsearch.schemes.integer import Integer
from mpsearch.search import Evaluator
from mpsearch.sensitivity import measure_sensitivity
from mpsearch.solve import MOST_STEPS, best_within, cheapest_within, solution

COSTS = {"bytes": Bytes(), "bits": AverageBits(), "bit_operations": BitOperations()}


@pytest.fixture(scope="module")
def table(trained):
    return measure_sensitivity(trained, KL())


def started(engine):
    """An evaluator that knows the float model and the uniform allocations."""
    evaluate = Evaluator(engine, ())
    evaluate(FLOAT, "float")
    for scheme in engine.space.scheme_names:
        evaluate(engine.space.uniform(scheme), "uniform")
    return evaluate


def test_one_budget_is_solved_exactly_and_several_are_kept(tiny):
    space = tiny.engine(tiny.net(), tiny.task()).space
    losses = np.random.default_rng(0).random((3, 3)) * [[9, 3, 1]]
    every = list(itertools.product(range(3), repeat=3))
    for limit in np.linspace(3.3, 8.8, 7):
        budgets = read_budgets({"bits": limit}, COSTS, space)
        found = space.choice(solution(space, losses, budgets))
        allowed = [c for c in every if budgets[0].allows(c)]
        assert knapsack.total(losses, found) == pytest.approx(min(knapsack.total(losses, np.array(c)) for c in allowed))
    work = BitOperations().table(space)
    both = [*read_budgets({"bits": 7}, COSTS, space), Budget(work, 1.2 * work.of([0, 0, 0]))]
    assert all(budget.allows(space.choice(solution(space, losses, both))) for budget in both)


def test_a_thousand_groups_take_less_than_a_second():
    layers = [LayerSpec(f"l{i}", "linear", (64, 64 + i), 64, f"l{i}", (f"l{i}",)) for i in range(1000)]
    space = SearchSpace.build(layers, {f"w{b}": Integer(b) for b in range(1, 9)})
    losses = np.random.default_rng(1).lognormal(size=(1000, 1)) * 4.0 ** -np.arange(8)
    budgets = read_budgets({"bits": 3.3, "bit_operations": 3.2 * 32 * 64 * 1000}, COSTS, space)
    start = time.perf_counter()
    found = space.choice(solution(space, losses, budgets))
    assert time.perf_counter() - start < 1
    assert all(budget.allows(found) for budget in budgets)


def test_the_best_of_what_is_known_and_what_is_solved(trained, table):
    evaluate = started(trained)
    n = len(evaluate.evaluations)
    budgets = read_budgets({"bits": 3.5}, COSTS, trained.space)
    found = best_within(evaluate, table, budgets)
    assert len(evaluate.evaluations) == n + 1
    assert found.average_bits <= 3.5
    uniform = next(e for e in evaluate.evaluations if e.allocation == trained.space.uniform("w3"))
    assert found.loss < uniform.loss, "between two uniform allocations there is a better one than the smaller"
    assert best_within(evaluate, table, budgets) == found
    assert len(evaluate.evaluations) == n + 1, "what is known is not measured again"


@pytest.mark.parametrize("max_drop", [0.0, 0.02, 0.1])
def test_the_cheapest_within_a_drop(trained, table, max_drop):
    evaluate = started(trained)
    n, objective = len(evaluate.evaluations), Bytes().table(trained.space)
    found = cheapest_within(evaluate, table, (), objective, max_drop)
    baseline = evaluate.evaluations[0]
    assert baseline.quality - found.quality <= max_drop + 1e-9
    assert len(evaluate.evaluations) <= n + MOST_STEPS + 1
    kept = [e for e in evaluate.evaluations[1:n] if baseline.quality - e.quality <= max_drop]
    cheapest = min(e.size_bytes for e in kept)
    assert found.size_bytes <= cheapest
    assert found.size_bytes < cheapest or max_drop == 0, "cheaper than every uniform allocation that keeps to it"
    limited = cheapest_within(evaluate, table, read_budgets({"bits": 8.5}, COSTS, trained.space), objective, max_drop)
    assert limited.size_bytes <= found.size_bytes


def test_a_drop_that_nothing_keeps_to_is_said(trained, table):
    evaluate, budgets = started(trained), read_budgets({"bits": 2.1}, COSTS, trained.space)
    with pytest.raises(InputError, match="No allocation within the budgets has a drop of at most 0; the least is"):
        cheapest_within(evaluate, table, budgets, Bytes().table(trained.space), 0.0)
