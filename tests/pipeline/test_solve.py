"""A finished run under other budgets: solved, measured, the best of all that is known; and the cheapest within a drop."""

import itertools
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from mpsearch.allocation import SearchSpace
from mpsearch.budget import Budget, read_budgets
from mpsearch.costs.bit_operations import BitOperations
from mpsearch.costs.size import AverageBits, Bytes
from mpsearch.engine.engine import FLOAT
from mpsearch.errors import InputError
from mpsearch.evaluation import FINETUNED, EvaluationLog, Score, SensitivityTable
from mpsearch.layer import LayerSpec
from mpsearch.metrics.kl import KL
from mpsearch.optimize import knapsack
from mpsearch.pipeline.evaluators import SearchEvaluator
from mpsearch.pipeline.sensitivity import measure_sensitivity
from mpsearch.pipeline.solve import MOST_STEPS, best_within, cheapest_within, prediction, solution
from mpsearch.schemes.integer import Integer

COSTS = {"bytes": Bytes(), "bits": AverageBits(), "bit_operations": BitOperations()}


@pytest.fixture(scope="module")
def table(trained):
    return measure_sensitivity(trained, KL())


def started(engine):
    """An evaluator that knows the float model and the uniform allocations."""
    evaluate = SearchEvaluator(engine)
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
    both = [*read_budgets({"bits": 7}, COSTS, space), Budget(work, 1.2 * work.cost_of([0, 0, 0]))]
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
    n = len(evaluate.log)
    budgets = read_budgets({"bits": 3.5}, COSTS, trained.space)
    found = best_within(evaluate, table, budgets)
    assert n < len(evaluate.log) <= n + 2
    assert found.average_bits <= 3.5
    uniform = next(e for e in evaluate.log if e.allocation == trained.space.uniform("w3"))
    assert found.loss < uniform.loss, "between two uniform allocations there is a better one than the smaller"
    assert best_within(evaluate, table, budgets).loss <= found.loss


@pytest.mark.parametrize("max_drop", [0.0, 0.02, 0.1])
def test_the_cheapest_within_a_drop(trained, table, max_drop):
    evaluate = started(trained)
    n, objective = len(evaluate.log), Bytes().table(trained.space)
    found = cheapest_within(evaluate, table, (), objective, max_drop)
    baseline = evaluate.log[0]
    assert baseline.quality - found.quality <= max_drop + 1e-9
    assert len(evaluate.log) <= n + 2 * (MOST_STEPS + 1)
    kept = [e for e in evaluate.log[1:n] if baseline.quality - e.quality <= max_drop]
    cheapest = min(e.size_bytes for e in kept)
    assert found.size_bytes <= cheapest
    assert found.size_bytes < cheapest or max_drop == 0, "cheaper than every uniform allocation that keeps to it"
    limited = cheapest_within(evaluate, table, read_budgets({"bits": 8.5}, COSTS, trained.space), objective, max_drop)
    assert limited.size_bytes <= found.size_bytes


def interacting(n_groups=20, bits=(2, 3, 4, 6, 8), seed=0):
    """An engine of a network whose groups' errors add up as vectors in 4 dimensions; and its table."""
    rng = np.random.default_rng(seed)
    layers = [LayerSpec(f"g{i}", "linear", (16, 20 + 9 * i), 0, f"g{i}", (f"g{i}",)) for i in range(n_groups)]
    space = SearchSpace.build(layers, {f"w{b}": Integer(b) for b in bits})
    errors = rng.normal(size=(n_groups, 1, 4)) * 2.0 ** -(np.array(bits)[:, None] - 2.0) / np.sqrt(n_groups)

    def score(allocation, split="search"):
        error = errors[np.arange(n_groups), space.choice(allocation)].sum(0) if allocation else np.zeros(4)
        loss = float(-2 * np.expm1(-error @ error / 2))
        return Score(loss, loss, 0.5, 0.4, 0.6, 0.0, 1, np.empty(0))

    values = -2 * np.expm1(-np.square(errors).sum(2) / 2)
    return SimpleNamespace(space=space, score=score), SensitivityTable("kl", "nats", values, space)


def test_what_was_measured_makes_it_better_and_never_worse():
    gains = []
    for seed in range(3):
        engine, sensitivity = interacting(seed=seed)
        space, rng = engine.space, np.random.default_rng(seed)
        recorded = SearchEvaluator(engine)
        for point in knapsack.front(sensitivity.losses(), space.storage_bits, 40):
            moved = np.clip(point + rng.integers(-1, 2, len(point)) * (rng.random(len(point)) < 0.3), 0, 4)
            recorded(space.allocation(point), "sampler")
            recorded(space.allocation(moved), "sampler")
        for bits in (2.7, 3.2, 3.9, 5.0):
            budgets = read_budgets({"bits": bits}, COSTS, space)
            within = [e.loss for e in recorded.log if budgets[0].allows(space.choice(e.allocation))]
            additive = engine.score(solution(space, sensitivity.losses(), budgets)).loss
            evaluate = SearchEvaluator(engine, EvaluationLog(recorded.log))
            found = best_within(evaluate, sensitivity, budgets)
            assert found.loss <= additive
            assert budgets[0].allows(space.choice(found.allocation))
            gains.append(found.loss / min([additive, *within]))
    assert np.median(gains) < 0.8


@pytest.mark.parametrize(("n_groups", "bits"), [(20, (2, 3, 4, 5, 6, 8)), (200, range(1, 9))])
def test_a_prediction_takes_less_than_a_second(n_groups, bits):
    engine, sensitivity = interacting(n_groups, bits)
    space, rng, top = engine.space, np.random.default_rng(0), len(bits) - 1
    evaluate = SearchEvaluator(engine)
    for choice in np.clip(rng.normal(rng.uniform(0, top, (200, 1)), 1.0, (200, n_groups)).round(), 0, top).astype(np.intp):
        evaluate(space.allocation(choice), "sampler")
    budgets = read_budgets({"bits": 3.4, "bytes": 10**7}, COSTS, space)
    for _ in range(3):  # other processes share the caches
        start = time.process_time()
        found = prediction(sensitivity, evaluate.log, budgets)
        seconds = time.process_time() - start
        if seconds < 1:
            break
    assert seconds < 1
    assert all(budget.allows(space.choice(found)) for budget in budgets)


def test_a_drop_that_nothing_keeps_to_is_said(trained, table):
    evaluate = started(trained)
    least = min(e.average_bits for e in evaluate.log if e.allocation)
    budgets = read_budgets({"bits": least + 0.05}, COSTS, trained.space)
    with pytest.raises(InputError, match=r"drop of at most 0\.00 points on the search split; the least is"):
        cheapest_within(evaluate, table, budgets, Bytes().table(trained.space), 0.0)


def test_rows_of_the_confirm_split_and_of_training_answer_nothing():
    """Their losses are far below all that the search measured: neither are they the answer, nor do they teach the surrogate."""
    engine, sensitivity = interacting()
    rng, space = np.random.default_rng(0), engine.space
    clean, mixed = SearchEvaluator(engine), SearchEvaluator(engine)
    for choice in np.clip(rng.normal(rng.uniform(0, 4, (40, 1)), 1.0, (40, 20)).round(), 0, 4).astype(np.intp):
        e = clean(space.allocation(choice), "sampler")
        mixed(e.allocation, "sampler")
        mixed.log.append(replace(e, split="confirm", loss=1e-6 * e.loss, packed=True))
        mixed.log.append(replace(e, origin=FINETUNED, loss=1e-7 * e.loss))
    budgets = read_budgets({"bits": 4.0}, COSTS, space)
    found = best_within(mixed, sensitivity, budgets)
    assert (found.split, found.origin != FINETUNED) == ("search", True)
    within = [e.loss for e in mixed.log if e.split == "search" and e.origin != FINETUNED and e.average_bits <= 4.0]
    assert found.loss == min(within)
    assert replace(found, seconds=0.0) == replace(best_within(clean, sensitivity, budgets), seconds=0.0)
