"""The peak of the activations: its table, and budgets on it in every sampler, alone and beside one on bytes."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from mpsearch.allocation import SearchSpace
from mpsearch.budget import read_budgets, restricted
from mpsearch.costs.activation_bytes import ActivationBytes
from mpsearch.costs.size import Bytes
from mpsearch.errors import InputError
from mpsearch.evaluation import EvaluationLog, Score, SensitivityTable
from mpsearch.layer import Activations, LayerSpec
from mpsearch.pipeline.evaluators import SearchEvaluator
from mpsearch.pipeline.search import search
from mpsearch.pipeline.solve import best_within, solution
from mpsearch.samplers.base import Problem, build_sampler, check_sampler
from mpsearch.schemes.input import IntegerInput
from mpsearch.schemes.integer import Integer

SAMPLERS = [path for path in sorted((Path(__file__).parents[2] / "conf" / "sampler").glob("*.yaml")) if path.stem != "custom"]
COSTS = {"bytes": Bytes(), "activation_bytes": ActivationBytes()}
SCHEMES = {
    "w2": Integer(2),
    "w4": Integer(4),
    "w4a8": Integer(4, input=IntegerInput(8)),
    "w8a4": Integer(8, input=IntegerInput(4, "static")),
}
PEAKS = [(100, 60, 10, 2, 70), (200, 100, 25, 1, 80), (180, 180, 20, 1, 0), (90, 50, 11, 1, 0), (150, 90, 15, 1, 75)]


def layer(i):
    return LayerSpec(f"g{i}", "linear", (8, 20 + 7 * i), 10, f"g{i}", (f"g{i}",), Activations(*PEAKS[i]))


SPACE = SearchSpace.build([layer(i) for i in range(5)], SCHEMES)
VALUES = np.random.default_rng(0).lognormal(size=(5, 1)) * np.array([16, 2, 3, 1.0])
TABLE = SensitivityTable("kl", "nats", VALUES, SPACE)
BUDGETS = [{"activation_bytes": 180}, {"activation_bytes": 180, "bytes": 700}, {"activation_bytes": 185, "bytes": 580}]


def score(allocation, split="search"):
    choice = SPACE.choice(allocation) if allocation else None
    loss = 0.0 if choice is None else float(VALUES[np.arange(5), choice].sum() ** 1.3)
    return Score(loss, loss, 0.5, 0.4, 0.6, 0.0, 1, np.empty(0))


def test_the_table_is_what_lies_beside_and_the_codes_and_the_largest_counts():
    table = ActivationBytes().table(SPACE)
    assert table.peak
    assert table.constant == 80
    assert table.values[0].tolist() == [100, 100, 60 + 10 + 8, 60 + 5]
    assert table.values[2].tolist() == [180, 180, 180 + 20 + 4, 180 + 10], "a float input that stays: the codes come on top"
    assert table.cost_of([0, 3, 1, 3, 3]) == 180
    assert table.cost_of([0, 1, 1, 3, 3]) == 200
    embedding = replace(SPACE.layers[0], kind="embedding")
    assert (ActivationBytes().table(SearchSpace.build([embedding], SCHEMES)).values == 100).all()
    tied = [replace(SPACE.layers[i], group="tied") for i in range(2)]
    assert ActivationBytes().table(SearchSpace.build(tied, SCHEMES)).values.tolist() == [[200, 200, 129, 113]]


def test_a_limit_below_the_least_is_said_and_so_is_a_run_that_did_not_look():
    with pytest.raises(InputError, match="activation_bytes <= 179 is below the least there is, 180: "):
        read_budgets({"activation_bytes": 179}, COSTS, SPACE)
    with pytest.raises(InputError, match="'1 stone' is not a size"):
        read_budgets({"activation_bytes": "1 stone"}, COSTS, SPACE)
    blind = SearchSpace.build([replace(layer(0), activations=None)], SCHEMES)
    with pytest.raises(InputError, match=r"were not measured.*cost=\[bytes,activation_bytes\]"):
        read_budgets({"activation_bytes": 1000}, COSTS, blind)


@pytest.mark.parametrize("limits", BUDGETS, ids=str)
def test_narrowed_is_the_same_set_of_allocations(limits):
    budgets = read_budgets(limits, COSTS, SPACE)
    space, others = restricted(SPACE, budgets)
    assert space.scheme_names == SPACE.scheme_names
    assert len(others) == len(budgets) - 1
    for choice in np.ndindex(4, 4, 4, 4, 4):
        inside = space.allowed[np.arange(5), choice].all() and all(b.allows(choice) for b in others)
        assert inside == all(b.allows(choice) for b in budgets)


@pytest.mark.parametrize("limits", BUDGETS, ids=str)
@pytest.mark.parametrize("path", SAMPLERS, ids=lambda path: path.stem)
@pytest.mark.thin(3)
def test_every_sampler_keeps_it(path, limits):
    engine, budgets = SimpleNamespace(space=SPACE, score=score), read_budgets(limits, COSTS, SPACE)
    tables = [ActivationBytes().table(SPACE)]
    make = instantiate(OmegaConf.load(path))
    check_sampler(make, SPACE, (), budgets)

    def run(n_trials, known=()):
        evaluate = SearchEvaluator(engine, EvaluationLog(known), budgets, tables)
        return search(evaluate, build_sampler(make, Problem(TABLE, (), budgets)), n_trials=n_trials, n_seeds=6)

    found = run(25)
    asked = [e for e in found if e.trial is not None]
    n_within = sum(all(b.allows(choice) for b in budgets) for choice in np.ndindex(4, 4, 4, 4, 4))
    assert len(asked) == 25 or len({e.allocation for e in asked}) == n_within >= 8
    for e in asked:
        assert e.feasible
        assert e.costs["activation_bytes"] == tables[0].cost_of(SPACE.choice(e.allocation)) <= limits["activation_bytes"]
    assert any(not e.feasible for e in found if e.origin == "uniform")
    again = run(25, found[:12])
    assert [(e.allocation, e.trial) for e in again] == [(e.allocation, e.trial) for e in found]


def test_two_budgets_that_no_allocation_meets_are_refused():
    budgets = read_budgets({"activation_bytes": 180, "bytes": 450}, COSTS, SPACE)
    ours, theirs = (instantiate(OmegaConf.load(SAMPLERS[0].parent / f"{name}.yaml")) for name in ("front", "nsga2"))
    with pytest.raises(InputError, match="limit of 450 is below the cost of the cheapest allocation, 474"):
        build_sampler(ours, Problem(TABLE, (), budgets))
    with pytest.raises(InputError, match="limit of 450 is below the cost of the cheapest allocation, 474"):
        check_sampler(theirs, SPACE, (), budgets)


@pytest.mark.parametrize("limits", BUDGETS, ids=str)
def test_solve_finds_the_best_within(limits):
    budgets = read_budgets(limits, COSTS, SPACE)
    every = [c for c in np.ndindex(4, 4, 4, 4, 4) if all(b.allows(c) for b in budgets)]
    least = min(VALUES[np.arange(5), c].sum() for c in every)
    found = SPACE.choice(solution(SPACE, TABLE.losses(), budgets))
    assert VALUES[np.arange(5), found].sum() == pytest.approx(least)
    evaluate = SearchEvaluator(SimpleNamespace(space=SPACE, score=score))
    for scheme in SPACE.scheme_names:
        evaluate(SPACE.uniform(scheme), "uniform")
    assert best_within(evaluate, TABLE, budgets).loss == pytest.approx(least**1.3)


@pytest.mark.slow
def test_from_the_front_door(mpsearch):
    """A run under a limit, gone on with, and solved for another limit; and as an objective it is refused."""
    first = ["scheme=[w2,w4,w4a8]", "cost=[bytes,activation_bytes]", "n_seeds=3", "hydra.run.dir=run"]
    assert mpsearch("search", *first, "n_trials=5", "budget.activation_bytes=6kB")[0] == 0
    assert mpsearch("search", "run=run", "n_trials=8")[0] == 0
    n_searched = len(pd.read_csv("run/evaluations.csv"))
    assert mpsearch("solve", "run=run", "budget.activation_bytes=5kB", "budget.bytes=4kB")[0] == 0
    rows = pd.read_csv("run/evaluations.csv")
    trials, float_input = rows[rows.trial.notna()], rows[rows.origin == "uniform"].activation_bytes.max()
    assert len(trials) == 8
    assert trials.activation_bytes.max() <= 6_000 < float_input == 6_144
    solved = rows[n_searched:][lambda new: (new.origin == "knapsack") & (new.split == "search")]
    assert len(solved) > 0
    assert (solved.activation_bytes <= 5_000).all()
    assert (solved.size_bytes <= 4_000).all()
    assert pd.read_csv("run/front.csv").activation_bytes.max() <= 6_000
    code, said = mpsearch("search", *first[:2], "objective=activation_bytes", "hydra.run.dir=other")
    assert code
    assert "activation_bytes is a peak and takes few values" in said
