"""The front and the uniform allocations on data that the search never saw: nothing filtered, what is dominated marked."""

import dataclasses
import re

import numpy as np
import optuna
import pytest

from mpsearch.allocation import Allocation
from mpsearch.budget import Budget, read_budgets
from mpsearch.costs.base import CostTable
from mpsearch.costs.size import AverageBits
from mpsearch.engine.engine import FLOAT
from mpsearch.evaluation import EvaluationLog, SensitivityTable, Timing
from mpsearch.intervals import paired_interval
from mpsearch.metrics.kl import KL
from mpsearch.pipeline.confirm import confirm, selected
from mpsearch.pipeline.evaluators import ConfirmEvaluator, SearchEvaluator
from mpsearch.pipeline.search import search
from mpsearch.pipeline.sensitivity import measure_sensitivity
from mpsearch.runs.run import Run
from mpsearch.runs.samples import SampleFiles
from mpsearch.samplers.base import Problem, build_sampler


@pytest.fixture(scope="module")
def searched(tiny):
    """A search within 5 bits, so that the uniform 8 bits are beyond it, and what was confirmed of it."""
    engine = tiny.engine(tiny.net(), tiny.task())
    table = measure_sensitivity(engine, KL())
    budgets = read_budgets({"bits": 5}, {"bits": AverageBits()}, engine.space)
    sampler = build_sampler(optuna.samplers.RandomSampler, Problem(table, (), budgets))
    log = search(SearchEvaluator(engine, budgets=budgets), sampler, n_trials=12, n_seeds=4)
    result = Run(engine.space, "accuracy", log, table)
    before = list(log)
    evaluate = ConfirmEvaluator(engine, log, budgets)
    confirmed = confirm(evaluate, result)
    return evaluate, result, confirmed, before


def test_every_point_of_the_front_and_every_uniform_allocation_is_there(searched):
    _, result, confirmed, _ = searched
    front = [c.evaluation.allocation for c in confirmed if c.scheme is None]
    assert front == [e.allocation for e in result.front], "smallest first, none left out"
    assert len(front) > 2
    assert [c.scheme for c in confirmed if c.scheme] == ["w2", "w4", "w8"]
    assert all(c.evaluation.split == "confirm" for c in confirmed)


def test_confirming_changes_no_front(searched):
    evaluate, result, _, before = searched
    after = Run(result.space, "accuracy", evaluate.log, result.sensitivity)
    assert [e for e in evaluate.log if e.split == "search"] == before
    assert after.front == result.front


def test_drops_are_paired_with_the_float_model(searched):
    evaluate, _, confirmed, _ = searched
    baseline, _ = evaluate.run_packed(FLOAT)
    for c in confirmed:
        assert c.evaluation.packed
        e = c.evaluation
        assert 0 < e.measured_ms_low <= e.measured_ms <= e.measured_ms_high
        assert re.fullmatch(r".+, \d+ threads?, batch of 1", e.measured_on)
        score, _ = evaluate.run_packed(c.evaluation.allocation)
        low, high = paired_interval(score.qualities, baseline.qualities)
        assert c.drop == pytest.approx(baseline.quality - score.quality)
        assert c.drop_low == pytest.approx(-high)
        assert c.drop_high == pytest.approx(-low)


def test_what_is_dominated_is_marked(searched):
    evaluate, _, confirmed, _ = searched
    points = [c.evaluation for c in confirmed]
    for c in confirmed:
        mine = c.evaluation
        rivals = [e for e in points if e.size_bytes <= mine.size_bytes and e.loss < mine.loss and e.feasible]
        assert (c.dominated_by is None) == (not rivals)
        if rivals:
            assert c.dominated_by.size_bytes == min(e.size_bytes for e in rivals)
            theirs = evaluate.engine.score(c.dominated_by.allocation, "confirm").qualities
            ours = evaluate.engine.score(mine.allocation, "confirm").qualities
            assert c.significantly_dominated == (paired_interval(theirs, ours)[0] > 0)
        else:
            assert not c.significantly_dominated


def test_significant_is_only_what_is_more_than_chance(tiny):
    """A front whose costly point is spoilt on the confirm split alone: dominated, and significantly where many samples say so."""
    engine = tiny.engine(tiny.net(), tiny.task())
    space = engine.space
    small, large = Allocation({"first": "w2", "second": "w4", "last": "w4"}), space.uniform("w8")
    wrong = {2: False, 25: True}
    for n_wrong, sure in wrong.items():

        def spoilt(allocation, n_wrong=n_wrong):
            qualities = np.ones(30, dtype=np.float32)
            qualities[: n_wrong if allocation == large else 0] = 0
            loss = {FLOAT: 0.0, large: 0.9}.get(allocation, 0.5)
            found = engine.score(allocation)
            return dataclasses.replace(found, loss=loss, quality=float(qualities.mean()), qualities=qualities), Timing(
                1.0, 1.0, 1.0, "here"
            )

        measure, evaluate = SearchEvaluator(engine), ConfirmEvaluator(engine)
        evaluate.run_packed = spoilt
        rows = [measure(small, "knapsack", trial=0), measure(large, "uniform", trial=1)]
        table = measure_sensitivity(engine, KL())
        confirmed = confirm(evaluate, Run(space, "accuracy", rows, table))
        by_allocation = {c.evaluation.allocation: c for c in confirmed if c.scheme is None}
        assert by_allocation[large].dominated_by.allocation == small
        assert by_allocation[large].significantly_dominated is sure
        assert by_allocation[small].dominated_by is None


def test_what_is_beyond_the_budget_dominates_nothing(tiny):
    """Uniform 2 bits, too slow for the budget, have by chance the lower loss on the confirm split."""
    engine = tiny.engine(tiny.net(), tiny.task())
    slow = Budget(CostTable("latency", "milliseconds", np.array([[9.0, 1, 1]] * 3), 0.0), 3.0)
    small, large = engine.space.uniform("w2"), engine.space.uniform("w8")
    losses = {FLOAT: 0.0, small: 0.1, large: 0.9}
    measure, evaluate = SearchEvaluator(engine, budgets=[slow]), ConfirmEvaluator(engine, budgets=[slow])
    run = evaluate.run_packed
    evaluate.run_packed = lambda allocation: (
        dataclasses.replace(run(allocation)[0], loss=losses[allocation]),
        Timing(1.0, 1.0, 1.0, "here"),
    )
    rows = [measure(small, "uniform"), measure(large, "uniform", trial=0)]
    table = SensitivityTable("kl", "nats", np.ones((3, 3)), engine.space)
    confirmed = confirm(evaluate, Run(engine.space, "accuracy", rows, table))
    assert [(c.scheme, c.evaluation.feasible) for c in confirmed] == [(None, True), ("w2", False), ("w8", True)]
    assert not any(c.dominated_by for c in confirmed)


@pytest.mark.parametrize("better", [True, False])
def test_dominance_by_another_cost_and_by_a_quality_where_lower_is_better(tiny, better):
    """Quick is larger than slow, so that only by milliseconds it dominates; its errors on 30 samples are smaller, or larger."""
    engine = tiny.engine(tiny.net(), tiny.task())
    slow, quick = engine.space.uniform("w2"), engine.space.uniform("w8")
    milliseconds = CostTable("latency", "milliseconds", np.array([[5.0, 3, 1]] * 3), 0.0)
    on_search = {FLOAT: 0.0, slow: 0.1, quick: 0.5}
    on_confirm = {FLOAT: 0.0, slow: 0.6, quick: 0.2}
    errors = {FLOAT: 0.5, slow: 2.0, quick: 1.0 if better else 3.0}
    spread = np.linspace(-0.1, 0.1, 30, dtype=np.float32)

    def score(allocation, losses):
        found = engine.score(allocation)
        return dataclasses.replace(
            found, loss=losses[allocation], quality=errors[allocation], qualities=errors[allocation] + spread
        )

    measure, evaluate = SearchEvaluator(engine, costs=[milliseconds]), ConfirmEvaluator(engine, costs=[milliseconds])
    evaluate.run_packed = lambda allocation: (score(allocation, on_confirm), Timing(1.0, 1.0, 1.0, "here"))
    rows = [dataclasses.replace(measure(a, "uniform", trial=i), loss=on_search[a]) for i, a in enumerate((slow, quick))]
    table = SensitivityTable("kl", "nats", np.ones((3, 3)), engine.space)
    identity = {"quality_kind": "error"}
    result = Run(engine.space, "error", rows, table, {}, identity, ["milliseconds"], ["milliseconds"])
    by_allocation = {c.evaluation.allocation: c for c in confirm(evaluate, result) if c.scheme is None}
    assert by_allocation[slow].dominated_by.allocation == quick
    assert by_allocation[slow].significantly_dominated is better
    assert by_allocation[quick].dominated_by is None
    assert by_allocation[slow].drop == pytest.approx(2.0 / 0.5 - 1), "relative to the float model's error"


def test_the_samples_of_confirmed_points_are_kept(searched, tmp_path):
    evaluate, result, confirmed, _ = searched
    files = SampleFiles(tmp_path)
    again = ConfirmEvaluator(evaluate.engine, EvaluationLog(), evaluate.budgets, samples=files)
    points = [again(c.evaluation.allocation, c.evaluation.origin) for c in confirmed[:2]]
    again(FLOAT, "float")
    assert len(list((tmp_path / "confirmed").iterdir())) == len(points)
    baseline = evaluate.qualities(FLOAT)
    for e in points:
        qualities, losses = files.read(e, result.quality)
        assert (len(qualities), qualities.dtype, losses.dtype) == (e.n_samples, np.float32, np.float32)
        assert qualities.tolist() == evaluate.qualities(e.allocation).tolist()
        assert losses.mean() == pytest.approx(e.loss, rel=1e-5)
        low, high = paired_interval(qualities, baseline)
        assert (e.quality_low, e.quality_high) == pytest.approx((baseline.mean() + low, baseline.mean() + high), abs=1e-6)
    assert files.read(dataclasses.replace(points[0], origin="refined"), result.quality) is None, "other weights"


def test_confirming_again_measures_nothing(searched):
    evaluate, result, confirmed, _ = searched
    again = ConfirmEvaluator(evaluate.engine, EvaluationLog(evaluate.log), evaluate.budgets)
    assert confirm(again, result) == confirmed
    assert list(again.log) == list(evaluate.log)


def front_of(engine, n=40):
    """A run whose front has `n` points of different sizes and falling loss; no quality changes."""
    space = engine.space
    choices = [c for c in np.ndindex(*[len(space.scheme_names)] * len(space.names)) if space.allowed[range(len(c)), c].all()]
    choices = {space.size_bits(np.array(c)): c for c in choices}
    sizes = sorted(choices)[:n]
    evaluate = SearchEvaluator(engine)
    score = evaluate(FLOAT, "float")
    for i, bits in enumerate(sizes):
        allocation = space.allocation(np.array(choices[bits]))
        evaluate.add(allocation, "knapsack", i, dataclasses.replace(score, loss=float(np.exp(-(i**1.5) / 20))))
    return Run(space, "accuracy", evaluate.log, SensitivityTable("kl", "nats", np.ones(space.allowed.shape), space))


def test_the_confirmed_points_are_spread_over_the_front_with_the_expected_pick(tiny):
    run = front_of(tiny.engine(tiny.net(), tiny.task()))
    n = len(run.front)
    assert n > 9
    chosen = selected(run, 4)
    indices = [run.front.index(e) for e in chosen]
    assert indices == sorted(set(indices))
    assert {0, 1, 2, n - 1} <= set(indices), "the ends, and the expected pick, here the smallest point, with its neighbours"
    assert 4 <= len(indices) <= 4 + 3
    gaps = np.diff([i for i in indices if i not in (1, 2)])
    assert gaps.max() < n - 1, "some points between the ends"
    assert selected(run, None) == run.front
    assert selected(run, n) == run.front
    assert selected(run, 0) == ()


def test_more_points_are_confirmed_on_request_and_none_twice(tiny):
    engine = tiny.engine(tiny.net(), tiny.task())
    run = front_of(engine)
    log = EvaluationLog(run.evaluations)
    evaluate = ConfirmEvaluator(engine, log)
    looks = []
    first = confirm(evaluate, run, 2, lambda compared: looks.append(len(compared())))
    assert looks == sorted(looks), "whatever is scored can be looked at"
    assert looks[-1] == len(first)
    before, known = len(log), {c.evaluation.allocation for c in first}
    more = confirm(evaluate, dataclasses.replace(run, evaluations=tuple(log)), 6)
    assert known < {c.evaluation.allocation for c in more}
    assert len(log) - before == len({c.evaluation.allocation for c in more} - known)
    kept = confirm(evaluate, dataclasses.replace(run, evaluations=tuple(log)), 0)
    assert [c.evaluation for c in kept] == [c.evaluation for c in more], "what is confirmed already stays"
