"""The contract of our own samplers (mpsearch/samplers/proposer.py), for every conf/sampler/*.yaml of one and for the rivals."""

import dataclasses
import importlib.util
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from mpsearch.allocation import SearchSpace
from mpsearch.budget import read_budgets
from mpsearch.costs.size import AverageBits, Bytes
from mpsearch.errors import InputError
from mpsearch.evaluation import EvaluationLog, Score, SensitivityTable
from mpsearch.layer import LayerSpec
from mpsearch.optimize.pareto import hypervolume
from mpsearch.pipeline.evaluators import SearchEvaluator
from mpsearch.pipeline.search import search
from mpsearch.samplers.base import Problem, build_sampler, check_sampler
from mpsearch.samplers.front import TPE_EVERY
from mpsearch.samplers.optuna_sampler import TPEProposals
from mpsearch.samplers.proposer import History
from mpsearch.schemes.integer import Integer

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf" / "sampler"


def load_rivals():
    """The samplers of other tools, from scripts/rivals.py."""
    spec = importlib.util.spec_from_file_location("rivals", ROOT / "scripts" / "rivals.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.RIVALS


MAKERS = {path.stem: OmegaConf.load(path) for path in sorted(CONF.glob("*.yaml"))}
OURS = [name for name, conf in MAKERS.items() if str(OmegaConf.to_container(conf)["_target_"]).startswith("mpsearch.")]
RIVALS = load_rivals()
NAMES = [*OURS, *RIVALS]
COSTS = {"bytes": Bytes(), "bits": AverageBits()}


def made_up(n_groups=12, bits=(2, 3, 4, 6, 8), pin=(), seed=0):
    """An engine of a network whose groups' errors add up as vectors in 6 dimensions, so that they interact; and its table."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(10, 200, n_groups)
    layers = [LayerSpec(f"g{i}", "linear", (16, int(k)), 0, f"g{i}", (f"g{i}",)) for i, k in enumerate(sizes)]
    space = SearchSpace.build(layers, {f"w{b}": Integer(b) for b in bits}, pin)
    errors = rng.normal(size=(n_groups, 1, 6)) * 2.0 ** -(np.array(bits)[:, None] - 2.0) / np.sqrt(n_groups)

    def score(allocation, split="search"):
        index = {name: i for i, name in enumerate(space.scheme_names)}
        rows = {name: i for i, name in enumerate(space.names)}
        error = sum((errors[rows[g], index[s]] for g, s in allocation.items()), np.zeros(6))
        loss = float(-2 * np.expm1(-error @ error / 2))
        return Score(loss, loss, 0.5, 0.4, 0.6, 0.0, 1, np.empty(0))

    values = -2 * np.expm1(-np.square(errors).sum(2) / 2)
    return SimpleNamespace(space=space, score=score), SensitivityTable("kl", "nats", values, space)


@pytest.fixture(scope="module")
def problem():
    return made_up()


def make(name, table, budgets=(), seed=0):
    """The sampler, as a search builds it."""
    return build_sampler(RIVALS[name] if name in RIVALS else instantiate(MAKERS[name]), Problem(table, (), budgets, seed))


def run(problem, name, n_trials=40, *, seed=0, limits=None, n_seeds=8, known=(), record=lambda evaluation: None):
    """The evaluations of a search."""
    engine, table = problem
    budgets = read_budgets(limits or {}, COSTS, engine.space)
    evaluate = SearchEvaluator(engine, EvaluationLog(known, record), budgets)
    return search(evaluate, make(name, table, budgets, seed), n_trials=n_trials, n_seeds=n_seeds)


def trials(evaluations):
    return [e for e in evaluations if e.trial is not None]


def without_seconds(evaluations):
    return [dataclasses.replace(e, seconds=0.0) for e in evaluations]


@pytest.mark.parametrize("name", OURS)
def test_every_yaml_opens_with_the_command_that_uses_it(name):
    assert (CONF / f"{name}.yaml").read_text().startswith(f"# mpsearch search sampler={name}\n")
    assert MAKERS[name]._partial_ is True


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("limits", [None, {"bits": 3.5}, {"bits": 2.6, "bytes": 10_000}], ids=str)
def test_it_keeps_the_budgets_and_repeats_nothing(problem, name, limits):
    asked = trials(run(problem, name, limits=limits))
    assert len(asked) == len({e.allocation for e in asked}) == 40
    assert all(e.feasible for e in asked)


@pytest.mark.parametrize("name", NAMES)
def test_the_knapsack_comes_first(problem, name):
    origins = [e.origin for e in trials(run(problem, name))]
    n_seeds = origins.count("knapsack") + origins.count("uniform")
    assert origins.count("knapsack") >= 5
    assert set(origins[:n_seeds]) == {"uniform", "knapsack"}
    assert set(origins[n_seeds:]) == {"sampler"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("limits", [None, {"bits": 3.0}], ids=str)
@pytest.mark.thin(3)
def test_a_run_goes_on_from_its_recorded_trials_as_if_nothing_was(problem, name, limits):
    whole = run(problem, name, 30, limits=limits, seed=3)
    for k in (1, 20, len(whole)):
        recorded = []
        again = run(problem, name, 30, limits=limits, seed=3, known=whole[:k], record=recorded.append)
        assert without_seconds(again) == without_seconds(whole), k
        assert len(recorded) == len(whole) - k


def test_rows_of_another_run_are_refused(problem):
    whole = run(problem, "front", 10)
    changed = dataclasses.replace(whole[3], allocation=whole[-1].allocation)
    with pytest.raises(InputError, match="was another allocation than the sampler proposes now"):
        run(problem, "front", 20, known=[*whole[:3], changed])


@pytest.mark.parametrize("name", ["front", "evopress", "amq"])
def test_the_seed_decides(problem, name):
    one, two, other = (without_seconds(run(problem, name, 30, seed=seed)) for seed in (5, 5, 6))
    assert one == two
    assert one != other


@pytest.mark.parametrize("name", NAMES)
def test_workers_that_wait_for_one_another_ask_for_different_trials(problem, name):
    """A batch of trials is asked for before any is told; then some fail."""
    engine, table = problem
    sampler, asked = make(name, table), []
    for _ in range(4):
        asked += [sampler.ask() for _ in range(5)]
        for i, choice in enumerate(asked[-5:]):
            loss = np.nan if i == 2 else engine.score(engine.space.allocation(choice)).loss
            sampler.tell(len(asked) - 5 + i, (float(np.log10(loss)), Bytes().table(engine.space).cost_of(choice)))
    assert len({tuple(choice) for choice in asked}) == 20


@pytest.mark.parametrize("name", NAMES)
def test_a_tiny_space_is_asked_for_to_its_end_and_no_further(name):
    problem = made_up(4, bits=(2, 4, 8), pin=("g1:w8", "g3:w2|w4"))
    asked = trials(run(problem, name, 100, n_seeds=2))
    assert len(asked) == len({e.allocation for e in asked}) == 18
    within = trials(run(problem, name, 100, n_seeds=0, limits={"bits": 5.0}))
    assert 1 < len(within) < 18
    assert all(e.average_bits <= 5 and e.allocation["g1"] == "w8" and e.allocation["g3"] != "w8" for e in within)


def test_a_budget_that_nothing_meets_is_refused_at_the_door(problem):
    """Two budgets that each can be met, but not together."""
    engine, _ = problem
    (budget,) = read_budgets({"bits": 2.5}, COSTS, engine.space)
    turned = dataclasses.replace(budget.table, values=budget.table.values.max(1, keepdims=True) - budget.table.values)
    other = dataclasses.replace(budget, table=turned, limit=float(turned.values.min(1).sum() * 1.01))
    with pytest.raises(InputError, match="meets all the budgets together"):
        check_sampler(instantiate(MAKERS["front"]), engine.space, (), [budget, other])


def volume(evaluations):
    points = np.array([(e.average_bits, e.loss) for e in trials(evaluations)])
    return hypervolume(points[:, 0], points[:, 1], 8.5, 2.0)


@pytest.mark.slow
def test_ours_finds_more_than_the_additive_optimum_and_than_evolution(problem):
    ours = np.median([volume(run(problem, "front", 60, seed=seed)) for seed in range(2)])
    for name in ("ilp", "greedy_gain", "greedy_accuracy", "evopress", "nsga2"):
        assert ours > volume(run(problem, name, 120, n_seeds=0 if name != "nsga2" else 50)), name


def test_broken_networks_are_no_obstacle(problem):
    """Allocations with a scheme that makes the output infinite."""
    engine, table = problem

    def score(allocation, split="search"):
        found = engine.score(allocation)
        return dataclasses.replace(found, loss=float("inf")) if "w2" in allocation.values() else found

    broken = SimpleNamespace(space=engine.space, score=score)
    values = np.where(np.arange(5) == 0, np.inf, table.values)
    asked = trials(run((broken, SensitivityTable("kl", "nats", values, engine.space)), "front", 50))
    assert len(asked) == 50
    assert sum(np.isfinite(e.loss) for e in asked) >= 30


@pytest.mark.parametrize(("n_groups", "seconds"), [(200, 2), pytest.param(10_000, 20, marks=pytest.mark.slow)])
def test_a_proposal_stays_cheap(n_groups, seconds):
    """Processor time, the mean over the most expensive proposals. Machines differ: 200 groups take 0.05 to 0.6 s."""
    _, table = made_up(n_groups, bits=range(1, 9))
    sampler = make("front", table)
    rng = np.random.default_rng(0)
    choices = np.clip(rng.normal(rng.uniform(1, 7, (300, 1)), 1.0, (300, n_groups)).round(), 0, 7).astype(np.intp)
    amplitude = np.sqrt(table.values[np.arange(n_groups), choices])
    losses = np.log(np.square(amplitude).sum(1) + 0.2 * (amplitude @ np.sin(np.arange(n_groups))) ** 2)
    history = History(choices, losses, sampler.sizes(choices), np.zeros(300, dtype=bool))
    sampler.choose(history, rng)
    start = time.process_time()
    for _ in range(2):
        sampler.choose(history, rng)
    assert (time.process_time() - start) / 2 < seconds


def test_a_broken_network_counts_as_the_worst_that_was_measured(problem):
    """Its infinite loss teaches the surrogate the largest finite one, whichever trial had it."""
    engine, table = problem
    seen = []
    sampler = make("front", table)
    for trial, loss in enumerate((0.5, np.inf, 40.0, 0.01)):
        sampler.ask(np.zeros(len(engine.space.names)))
        sampler.tell(trial, (float(np.log10(loss)), 1.0))
    sampler.choose = lambda history, rng: seen.append(history) or sampler.smallest()
    sampler.ask()
    assert np.exp(seen[0].log_losses[:4]) == pytest.approx([0.5, 40.0, 40.0, 0.01])


def test_every_eighth_trial_is_proposed_by_optuna(problem, monkeypatch):
    """And without hidden state: a new object says the same of the same trials."""
    calls, propose = [], TPEProposals.propose

    def spy(self, params, values, seed):
        proposed = propose(self, params, values, seed)
        calls.append((len(params), proposed))
        assert propose(TPEProposals(problem[0].space.names, problem[0].space.choices), params, values, seed) == proposed
        return proposed

    monkeypatch.setattr(TPEProposals, "propose", spy)
    asked = trials(run(problem, "front"))
    n_seeds = sum(e.origin != "sampler" for e in asked)
    assert [n for n, _ in calls] == [n for n in range(TPE_EVERY, 40, TPE_EVERY) if n >= n_seeds]
    assert [dict(asked[n].allocation) for n, _ in calls] == [proposed for _, proposed in calls]
