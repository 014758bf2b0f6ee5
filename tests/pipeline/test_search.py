"""The search on a space small enough to know all of it: budgets hold, seeds repeat, a killed run goes on as if nothing was."""

import dataclasses
import functools
import itertools

import numpy as np
import optuna
import pytest

from mpsearch.allocation import Allocation
from mpsearch.budget import Budget, read_budgets
from mpsearch.costs.base import CostTable
from mpsearch.costs.bit_operations import BitOperations
from mpsearch.costs.millijoules import Millijoules
from mpsearch.costs.size import AverageBits, Bytes, Fraction
from mpsearch.errors import InputError
from mpsearch.evaluation import EvaluationLog
from mpsearch.metrics.kl import KL
from mpsearch.optimize.pareto import non_dominated
from mpsearch.pipeline.evaluators import SearchEvaluator
from mpsearch.pipeline.search import search
from mpsearch.pipeline.seeds import knapsack_seeds
from mpsearch.pipeline.sensitivity import measure_sensitivity
from mpsearch.runs.deadline import Deadline
from mpsearch.runs.run import Run
from mpsearch.samplers.base import Problem, build_sampler

COSTS = {"bytes": Bytes(), "bits": AverageBits(), "fraction": Fraction()}
WORK = {"bit_operations": BitOperations(), "millijoules": Millijoules()}
SAMPLERS = {
    "nsga2": functools.partial(optuna.samplers.NSGAIISampler, population_size=4),
    "tpe": functools.partial(optuna.samplers.TPESampler, multivariate=True, n_startup_trials=3),
    "random": optuna.samplers.RandomSampler,
    "brute_force": optuna.samplers.BruteForceSampler,
}


@pytest.fixture(scope="module")
def engine(tiny):
    """27 allocations, each measured once for all tests of this file."""
    return tiny.engine(tiny.net(), tiny.task())


@pytest.fixture(scope="module")
def table(engine):
    return measure_sensitivity(engine, KL())


def run(engine, table, sampler="nsga2", *, n_trials=15, n_seeds=4, seed=0, known=(), limits=None, max_seconds=None):
    """The evaluator after a search; `budgets` from `limits`."""
    budgets = read_budgets(limits or {}, COSTS | WORK, engine.space)
    evaluate = SearchEvaluator(engine, EvaluationLog(known), budgets)
    search(
        evaluate,
        build_sampler(SAMPLERS[sampler], Problem(table, (), budgets, seed)),
        n_trials=n_trials,
        n_seeds=n_seeds,
        deadline=Deadline(max_seconds),
    )
    return evaluate


def trials(evaluations):
    return [e for e in evaluations if e.trial is not None]


def without_seconds(evaluations):
    return [dataclasses.replace(e, seconds=0.0) for e in evaluations]


def result_of(evaluate, table):
    return Run(evaluate.engine.space, "accuracy", evaluate.log, table)


def test_it_begins_with_the_float_model_then_the_uniform_allocations_then_the_knapsack(engine, table):
    evaluations = run(engine, table).log
    assert (evaluations[0].origin, evaluations[0].trial, evaluations[0].allocation) == ("float", None, Allocation())
    assert evaluations[0].average_bits == 32
    assert evaluations[0].fraction == 1
    asked = trials(evaluations)
    assert [e.trial for e in asked] == list(range(15))
    assert [e.allocation for e in asked[:3]] == [engine.space.uniform(s) for s in ("w2", "w4", "w8")]
    assert [e.origin for e in asked[:3]] == ["uniform"] * 3
    n_knapsack = len({e.allocation for e in asked if e.origin == "knapsack"})
    assert 1 <= n_knapsack <= 4
    assert all(e.origin == "knapsack" for e in asked[3 : 3 + n_knapsack])
    after = evaluations[1 + len(asked) :]
    assert all(e.trial is None and e.accepted for e in after), "references of the proposals, and what was accepted"


def test_costs_are_those_of_the_tables(engine, table):
    tables = [cost.table(engine.space) for cost in COSTS.values()]
    for e in trials(run(engine, table).log):
        choice = engine.space.choice(e.allocation)
        found = (e.size_bytes, e.average_bits, e.fraction)
        assert found == pytest.approx([cost.cost_of(choice) for cost in tables], rel=1e-12)


def test_seeds_lie_on_the_additive_front(engine, table):
    losses, bits = table.losses(), engine.space.storage_bits
    rows = np.arange(3)
    every = [(bits[rows, c].sum(), losses[rows, c].sum()) for c in map(list, itertools.product(range(3), repeat=3))]
    seeds = knapsack_seeds(Problem(table), 20)
    assert len(seeds) == len(set(seeds)) > 3
    for seed in seeds:
        choice = engine.space.choice(seed)
        size, loss = bits[rows, choice].sum(), losses[rows, choice].sum()
        assert not any(s <= size and other < loss * (1 - 1e-12) for s, other in every)
    sizes = sorted(bits[rows, engine.space.choice(seed)].sum() for seed in seeds)
    assert sizes[0] == bits[:, 0].sum()
    assert knapsack_seeds(Problem(table), 0) == []
    for few in (1, 2, 3):
        assert len(knapsack_seeds(Problem(table), few)) <= few


def test_seeds_keep_a_budget_that_has_nothing_to_do_with_size(engine, table):
    """Milliseconds, say: a scheme that is small may be slow."""
    milliseconds = CostTable("latency", "milliseconds", np.array([[9.0, 1, 5], [2, 7, 1], [5, 3, 8]]), 1.0)
    budget = Budget(milliseconds, 11.0)
    seeds = knapsack_seeds(Problem(table, (), [budget]), 20)
    assert len(seeds) > 1
    assert all(budget.allows(engine.space.choice(seed)) for seed in seeds)
    assert not all(budget.allows(engine.space.choice(seed)) for seed in knapsack_seeds(Problem(table), 20))


@pytest.mark.parametrize("sampler", ["nsga2", "tpe", "random"])
@pytest.mark.parametrize("n_trials", [1, 15])
def test_no_uniform_allocation_dominates_the_front(engine, table, sampler, n_trials):
    evaluate = run(engine, table, sampler, n_trials=n_trials)
    result = result_of(evaluate, table)
    assert [scheme for scheme, _ in result.uniform] == ["w2", "w4", "w8"], "always measured, also where there are fewer trials"
    points = [*result.front, *(e for _, e in result.uniform)]
    for point in result.front:
        for other in points:
            assert not (
                other.size_bytes <= point.size_bytes
                and other.loss <= point.loss
                and (other.size_bytes, other.loss) != (point.size_bytes, point.loss)
            )
    measured = np.array([(e.size_bytes, e.loss) for e in evaluate.log.accepted()])
    assert len(result.front) == non_dominated(measured).sum()


@pytest.mark.parametrize(
    "limits", [{"bytes": 350}, {"bits": 4.5}, {"fraction": 0.3}, {"bits": 5.0, "bytes": 330, "fraction": None}], ids=str
)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_budgets_limit_every_trial_and_the_front(engine, table, sampler, limits):
    evaluate = run(engine, table, sampler, limits=limits, n_trials=12)
    asked = trials(evaluate.log)
    assert asked
    for e in asked:
        assert e.feasible
        assert all(
            value <= limits[name]
            for name, value in (("bytes", e.size_bytes), ("bits", e.average_bits), ("fraction", e.fraction))
            if limits.get(name)
        )
    beyond = [e for e in evaluate.log if not e.feasible]
    assert engine.space.uniform("w8") in [e.allocation for e in beyond], "measured as references"
    assert all(e.origin == "uniform" and e.trial is None for e in beyond)
    result = result_of(evaluate, table)
    assert all(e.feasible for e in result.front)
    assert len(result.uniform) == 3


def test_without_a_budget_everything_is_feasible(engine, table):
    assert all(e.feasible for e in run(engine, table).log)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_same_seed_gives_the_same_trials(engine, table, sampler):
    one, two, other = (without_seconds(run(engine, table, sampler, seed=seed).log) for seed in (5, 5, 6))
    assert one == two
    assert one != other


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("limits", [None, {"bits": 5.0}], ids=["no budget", "budget"])
def test_a_killed_run_goes_on_wherever_it_stopped(engine, table, sampler, limits):
    """With the first k rows known, for every k: the same rows follow, each of the missing ones recorded exactly once."""
    whole = run(engine, table, sampler, limits=limits, seed=2).log
    budgets = read_budgets(limits or {}, COSTS | WORK, engine.space)
    for k in range(len(whole) + 1):
        recorded = []
        evaluate = SearchEvaluator(engine, EvaluationLog(whole[:k], recorded.append), budgets)
        search(evaluate, build_sampler(SAMPLERS[sampler], Problem(table, (), budgets, 2)), n_trials=15, n_seeds=4)
        assert without_seconds(evaluate.log) == without_seconds(whole), k
        assert len(recorded) == len(whole) - k


def test_more_trials_go_on_from_the_old_ones(engine, table):
    short, long = (run(engine, table, "tpe", n_trials=n).log for n in (8, 15))
    resumed = run(engine, table, "tpe", n_trials=15, known=short).log
    assert without_seconds(trials(resumed)) == without_seconds(trials(long))


def test_rows_of_another_run_are_refused(engine, table):
    whole = run(engine, table, seed=2).log
    last = trials(whole)[-1]
    changed = dataclasses.replace(last, allocation=next(e.allocation for e in whole if e.allocation not in ({}, last.allocation)))
    with pytest.raises(InputError, match=f"Trial {last.trial} of this run was another allocation than the sampler proposes now"):
        run(engine, table, seed=2, known=[*whole[:-1], changed])


def test_a_repeated_trial_gets_its_row_and_costs_nothing(tiny, table):
    engine = tiny.engine(tiny.net(), tiny.task())
    evaluate = SearchEvaluator(engine)
    allocation = engine.space.uniform("w2")
    first = evaluate(allocation, "sampler", trial=0)
    engine.score = None
    second = evaluate(allocation, "sampler", trial=1)
    assert (second.trial, second.loss, second.quality) == (1, first.loss, first.quality)
    assert evaluate(allocation, "uniform") is first
    assert len(evaluate.log) == 2


def test_each_evaluation_is_recorded_before_the_next(engine, table):
    recorded = []
    evaluate = SearchEvaluator(engine, EvaluationLog(record=recorded.append))
    search(evaluate, build_sampler(SAMPLERS["random"], Problem(table)), n_trials=6, n_seeds=2)
    assert recorded == list(evaluate.log)


def test_fewer_trials_than_seeds(engine, table):
    evaluations = run(engine, table, n_trials=2, n_seeds=50).log
    assert len(trials(evaluations)) == 2
    assert trials(run(engine, table, n_trials=0).log) == []


def test_without_seeds_the_sampler_begins_after_the_uniform_allocations(engine, table):
    origins = [e.origin for e in trials(run(engine, table, n_seeds=0).log)]
    assert origins[:3] == ["uniform"] * 3
    assert "knapsack" not in origins


def test_brute_force_measures_everything_once_and_stops(engine, table):
    evaluations = trials(run(engine, table, "brute_force", n_trials=1000).log)
    assert len(evaluations) == len({e.allocation for e in evaluations}) == 27
    within = trials(run(engine, table, "brute_force", n_trials=1000, limits={"bits": 4.5}).log)
    cost = AverageBits().table(engine.space)
    expected = {c for c in itertools.product(range(3), repeat=3) if cost.cost_of(c) <= 4.5}
    assert {tuple(engine.space.choice(e.allocation)) for e in within} == expected
    assert len(within) == len(expected)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_space_of_one_allocation(tiny, sampler):
    engine = tiny.engine(tiny.net(), tiny.task(), pin=["*:w4"])
    table = measure_sensitivity(engine, KL())
    asked = trials(run(engine, table, sampler, n_trials=10).log)
    assert [dict(e.allocation) for e in asked] == [{"first": "w4", "second": "w4", "last": "w4"}]


def test_pins_hold_for_every_trial(tiny):
    engine = tiny.engine(tiny.net(), tiny.task(), pin=["last:w8", "first:w2|w4"])
    table = measure_sensitivity(engine, KL())
    for sampler in SAMPLERS:
        evaluate = run(engine, table, sampler, n_trials=10)
        for e in trials(evaluate.log):
            assert e.allocation["last"] == "w8"
            assert e.allocation["first"] in ("w2", "w4")


def test_time_ends_the_search_but_not_what_is_known(engine, table):
    late = trials(run(engine, table, max_seconds=1e-9, n_trials=15).log)
    assert len(late) <= 1
    whole = run(engine, table).log
    again = run(engine, table, max_seconds=1e-9, known=whole)
    assert without_seconds(again.log) == without_seconds(whole), "what is known is kept whatever the time"


@pytest.mark.parametrize("sampler", ["nsga2", "random"])
def test_several_budgets_hold_together(engine, table, sampler):
    space = engine.space
    middle = space.choice(space.uniform("w4"))
    limits = {name: (COSTS | WORK)[name].table(space).cost_of(middle) for name in ("bytes", "millijoules")}
    limits["bit_operations"] = 0.9 * WORK["bit_operations"].table(space).cost_of(middle)
    found = run(engine, table, sampler, n_trials=12, limits=limits)
    asked = trials(found.log)
    assert len(asked) > 3
    for e in asked:
        assert e.feasible
        for name, limit in limits.items():
            assert (COSTS | WORK)[name].table(space).cost_of(space.choice(e.allocation)) <= limit * (1 + 1e-9)
    assert not next(e for e in found.log if e.allocation == space.uniform("w4")).feasible


def test_a_front_of_work_where_a_layer_has_none(engine, table):
    """As an embedding: it costs nothing on the axis of the objective, whatever its scheme."""
    space = engine.space
    values = BitOperations().table(space).values.copy()
    values[0] = 0
    budget = Budget(CostTable("work", "work", values, 0.0), values[:, 1].sum())
    seeds = knapsack_seeds(Problem(table, (), [budget]), 9, values)
    assert seeds
    assert all(values[range(len(values)), space.choice(a)].sum() <= values[:, 1].sum() for a in seeds)
