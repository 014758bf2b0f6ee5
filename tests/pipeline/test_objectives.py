"""Fronts of two costs and the loss: the search covers them, goes on as if nothing was, and what cannot be is said at the door."""

import dataclasses
import functools
from types import SimpleNamespace

import numpy as np
import optuna
import pandas as pd
import pytest

from mpsearch.allocation import SearchSpace
from mpsearch.costs.base import CostTable, mixed
from mpsearch.costs.size import Bytes
from mpsearch.errors import InputError
from mpsearch.evaluation import EvaluationLog, Score, SensitivityTable
from mpsearch.layer import LayerSpec
from mpsearch.optimize.pareto import non_dominated
from mpsearch.pipeline.evaluators import SearchEvaluator
from mpsearch.pipeline.search import search
from mpsearch.runs.run import Run
from mpsearch.samplers.base import Problem, build_sampler
from mpsearch.samplers.front import Front
from mpsearch.samplers.path import ILP
from mpsearch.schemes.integer import Integer

N = 12
RNG = np.random.default_rng(0)
SPACE = SearchSpace.build(
    [LayerSpec(f"g{i}", "linear", (16, int(k)), 0, f"g{i}", (f"g{i}",)) for i, k in enumerate(RNG.integers(10, 200, N))],
    {f"w{b}": Integer(b) for b in (2, 3, 4, 6, 8)},
    (),
)
ERRORS = RNG.normal(size=(N, 1, 6)) * 2.0 ** -(np.array([2, 3, 4, 6, 8])[:, None] - 2.0) / np.sqrt(N)
TABLE = SensitivityTable("kl", "nats", -2 * np.expm1(-np.square(ERRORS).sum(2) / 2), SPACE)
SIZE = Bytes().table(SPACE)
# Milliseconds that have little to do with the size: kernels of 4 bits are the fastest.
TIME = CostTable("latency_ms", "latency_ms", np.array([1.5, 1.7, 1.0, 2.0, 1.2]) * RNG.uniform(0.1, 5, (N, 1)), 0.5)


def score(allocation, split="search"):
    choice = SPACE.choice(allocation) if allocation else np.full(N, 4)
    error = ERRORS[np.arange(N), choice].sum(0) * bool(allocation)
    loss = float(-2 * np.expm1(-error @ error / 2))
    return Score(loss, loss, 0.5, 0.4, 0.6, 0.0, 1, np.empty(0))


def run(objectives, make=Front, n_trials=80, known=(), seed=0):
    sampler = build_sampler(make, Problem(TABLE, objectives, seed=seed))
    evaluate = SearchEvaluator(SimpleNamespace(space=SPACE, score=score), EvaluationLog(known), costs=[TIME])  # type: ignore[arg-type]
    search(evaluate, sampler, n_trials=n_trials, n_seeds=12)
    return [dataclasses.replace(e, seconds=0.0) for e in evaluate.log]


def covered(evaluations):
    """The share of a box (size, time, log loss) that lies above what was measured."""
    found = np.array([(e.size_bytes, e.costs["latency_ms"], np.log(e.loss)) for e in evaluations if e.trial is not None])
    low = [SIZE.values.min(1).sum(), TIME.values.min(1).sum() + 0.5, np.log(1e-4)]
    high = [SIZE.values.max(1).sum(), TIME.values.max(1).sum() + 0.5, np.log(1.0)]
    points = np.random.default_rng(1).uniform(low, high, (4000, 3))
    return np.mean((found[None] <= points[:, None]).all(2).any(1))


@pytest.mark.slow
def test_both_costs_are_searched_and_the_front_is_that_of_all_three():
    both = run([SIZE, TIME])
    assert covered(both) > 1.02 * max(covered(run([SIZE])), covered(run([TIME])))
    result = Run(SPACE, "accuracy", both, TABLE, objectives=["size_bytes", "latency_ms"], costs=["latency_ms"])
    accepted = {e.allocation for e in both if e.accepted}
    measured = [e for e in result.on("search").values() if e.allocation in accepted]
    keep = non_dominated([(e.size_bytes, e.costs["latency_ms"], e.loss) for e in measured])
    assert {e.allocation for e in result.front} == {e.allocation for e, kept in zip(measured, keep, strict=True) if kept}
    one = dataclasses.replace(result, objectives=["size_bytes"])
    assert {e.allocation for e in one.front} < {e.allocation for e in result.front}


def test_a_killed_search_of_two_costs_goes_on_as_if_nothing_was():
    whole = run([SIZE, TIME], n_trials=40)
    for k in (1, 17, 33):
        assert run([SIZE, TIME], n_trials=40, known=whole[:k]) == whole


def test_optunas_samplers_take_two_costs():
    found = run([SIZE, TIME], functools.partial(optuna.samplers.NSGAIISampler, population_size=10), 40)
    assert sum(e.origin == "sampler" for e in found) > 10


def test_a_sampler_for_one_cost_says_so():
    with pytest.raises(InputError, match=r"\(ILP\) weighs one cost against the loss; got 2: bytes, latency_ms"):
        ILP(Problem(TABLE, [SIZE, TIME]))


def test_a_mixture_is_in_shares_of_each_costs_range():
    allowed = SPACE.allowed.copy()
    allowed[0, 0] = False
    found = mixed([SIZE.values, TIME.values], [0.25, 0.75], allowed)
    rows = np.arange(N)
    assert found[0, 0] == 0
    for table, weight in ((SIZE.values, 0.25), (TIME.values, 0.75)):
        alone = mixed([table], [1.0], allowed)
        least, most = np.where(allowed, table, np.inf).argmin(1), np.where(allowed, table, -np.inf).argmax(1)
        assert alone[rows, most].sum() - alone[rows, least].sum() == pytest.approx(1)
        found = found - weight * alone
    assert np.abs(found).max() < 1e-12


@pytest.mark.slow
def test_by_commands(mpsearch):
    """A run, gone on with, drawn, solved and exported; and what makes no sense is refused."""
    costs = ["scheme=[w2a8,w8,w8a8]", "cost=[bytes,bits,bit_operations]"]
    first = [
        *costs,
        "objective=[bytes,bit_operations]",
        "quantizer=clip_search",
        "n_seeds=6",
        "confirm.n_points=3",
        "hydra.run.dir=run",
    ]
    assert mpsearch("search", *first, "n_trials=12")[0] == 0
    assert mpsearch("search", "run=run", "n_trials=16")[0] == 0
    assert mpsearch("report", "run=run")[0] == 0
    assert mpsearch("solve", "run=run", "budget.bytes=30kB", "budget.bit_operations=4e7")[0] == 0
    assert mpsearch("export", "run=run", "pick=non_inferior")[0] == 0
    front = pd.read_csv("run/front.csv").query("split == 'search'")
    assert non_dominated(front[["size_bytes", "bit_operations", "loss"]].to_numpy()).all()
    for words, sentence in (
        (["objective=[bytes,bits]"], "bytes and bits are the same cost in two units"),
        (["objective=[bytes,bit_operations,fraction]"], "or two in brackets"),
        (["objective=null"], "or two in brackets"),
        (["objective=[bytes,latency_ms]"], "or two in brackets: bytes, bits, bit_operations; "),
        (["objective=[bytes,bit_operations]", "sampler=ilp"], "weighs one cost against the loss"),
    ):
        code, said = mpsearch("search", *costs, *words, "hydra.run.dir=other")
        assert code == 2
        assert sentence in said
