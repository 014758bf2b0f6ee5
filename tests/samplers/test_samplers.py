"""The contract of samplers (mpsearch/samplers/base.py), for every conf/sampler/*.yaml that is one of Optuna's."""

import dataclasses
import itertools
import warnings
from pathlib import Path

import numpy as np
import optuna
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from optuna.trial import TrialState

from mpsearch.allocation import SearchSpace
from mpsearch.budget import Budget
from mpsearch.costs.base import CostTable
from mpsearch.errors import InputError
from mpsearch.evaluation import SensitivityTable
from mpsearch.layer import LayerSpec
from mpsearch.optimize import knapsack
from mpsearch.samplers.base import Problem, build_sampler, check_sampler
from mpsearch.samplers.optuna_sampler import distributions
from mpsearch.schemes.integer import Integer

CONF = Path(__file__).parents[2] / "conf" / "sampler"
MAKERS = {path.stem: OmegaConf.load(path) for path in sorted(CONF.glob("*.yaml"))}
NAMES = [
    name
    for name, conf in MAKERS.items()
    if str(
        conf.get(
            "_target_",
            "",
        )
    ).startswith("optuna.")
]

SCHEMES = ("w2", "w3", "w4", "w8")
GROUPS = ["conv1", "layer1.0", "layer1.1", "pinned", "layer2.0", "fc"]
CHOICES = [("w2", "w4", "w8"), ("w2", "w4", "w8"), ("w2", "w4"), ("w8",), ("w2", "w3", "w4", "w8"), ("w4", "w8")]
BITS = {"w2": 2, "w3": 3, "w4": 4, "w8": 8}
NUMEL = [100, 400, 300, 50, 700, 200]
LOSS = np.full((6, 4), np.inf)
SIZE, LATENCY = np.full((6, 4), -1), np.full((6, 4), np.nan)  # what is not allowed is not read
for row, (names, numel) in enumerate(zip(CHOICES, NUMEL, strict=True)):
    for column, name in ((SCHEMES.index(name), name) for name in names):
        LOSS[row, column] = (row + 1) * 4.0 ** -BITS[name]
        SIZE[row, column] = numel * BITS[name]
        LATENCY[row, column] = 1 + 0.1 * row + 0.2 * BITS[name]
COSTS, LIMITS = [SIZE, LATENCY], [7500, 15.0]


def problem(groups, choices, losses, costs=(), limits=(), seed=0):
    """With one layer of 1 x 64 weights a group."""
    layers = [LayerSpec(name, "linear", (1, 64), 0, name, (name,)) for name in groups]
    schemes = list(dict.fromkeys(name for names in choices for name in names))
    space = SearchSpace.build(layers, {name: Integer(int(name[1:])) for name in sorted(schemes)})
    space = dataclasses.replace(space, choices=tuple(map(tuple, choices)))
    budgets = [Budget(CostTable("cost", "cost", cost, 0.0), limit) for cost, limit in zip(costs, limits, strict=True)]
    return Problem(SensitivityTable("kl", "nats", losses, space), (), budgets, seed)


def make(name: str, seed: int = 0, costs=COSTS, limits=LIMITS):
    return build_sampler(instantiate(MAKERS[name]), problem(GROUPS, CHOICES, LOSS, costs, limits, seed))


def measure(choice) -> tuple[float, float]:
    each = LOSS[np.arange(len(choice)), choice]
    return knapsack.total(SIZE, choice), float(each.sum() + each[1:] @ each[:-1])  # not additive


def allocations(limits=LIMITS):
    for names in itertools.product(*CHOICES):
        choice = np.array([SCHEMES.index(name) for name in names])
        if all(knapsack.total(cost, choice) <= limit for cost, limit in zip(COSTS, limits, strict=True)):
            yield choice


SEEDS = [tuple(choice.tolist()) for choice in knapsack.front(LOSS, np.where(np.isfinite(LOSS), SIZE, 0), 20)]


def search(sampler, n_trials: int, recorded=(), batch: int = 1):
    """[(choice, values)] of `n_trials`; what is `recorded` is told instead of measured."""
    done = []
    while len(done) < n_trials:
        numbers = range(len(done), min(len(done) + batch, n_trials))
        for choice in [sampler.ask(SEEDS[number] if number < len(SEEDS) else None) for number in numbers]:
            values = recorded[len(done)][1] if len(done) < len(recorded) else measure(choice)
            sampler.tell(len(done), values)
            done.append((tuple(choice.tolist()), values))
    return done


@pytest.mark.parametrize("name", NAMES)
def test_proposals_are_in_the_space_and_within_the_budgets(name):
    done = search(make(name), 130)
    for choice, _ in done:
        assert len(choice) == len(GROUPS)
        assert all(SCHEMES[i] in names for i, names in zip(choice, CHOICES, strict=True))
    for choice, _ in done[len(SEEDS) :]:
        for cost, limit in zip(COSTS, LIMITS, strict=True):
            assert knapsack.total(cost, np.array(choice)) <= limit


@pytest.mark.parametrize("name", NAMES)
def test_what_was_enqueued_is_taken_as_it_is(name):
    done = search(make(name), len(SEEDS))
    assert [choice for choice, _ in done] == SEEDS
    assert any(knapsack.total(SIZE, np.array(choice)) > LIMITS[0] for choice in SEEDS)  # also beyond a budget


@pytest.mark.parametrize("name", [name for name in NAMES if name != "brute_force"])  # by itself it raises outside of optimize
def test_without_budgets_the_sampler_is_left_alone(name):
    """What is proposed is what the inner sampler itself proposes."""
    ours, alone = make(name, costs=(), limits=()), instantiate(MAKERS[name])(seed=0)
    study = optuna.create_study(directions=["minimize"] * 2, sampler=alone)
    for number in range(9):
        trial = study.ask(distributions(GROUPS, CHOICES))
        choice = np.array([SCHEMES.index(name) for name in trial.params.values()])
        study.tell(trial, measure(choice))
        assert (ours.ask() == choice).all()
        ours.tell(number, measure(choice))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.thin(3)
def test_the_seed_decides_and_a_replay_goes_on_where_the_run_was_killed(name, batch):
    n_trials = 120  # into the third generation
    whole = search(make(name), n_trials, batch=batch)
    for killed_after in (3, len(SEEDS), 50, 77):
        assert search(make(name), n_trials, recorded=whole[:killed_after], batch=batch) == whole
    assert search(make(name, seed=1), n_trials, batch=batch) != whole


@pytest.mark.parametrize("name", NAMES)
def test_failed_trials_do_no_harm(name):
    sampler = make(name)
    for number in range(70):
        values = measure(sampler.ask())
        sampler.tell(number, (np.nan, values[1]) if number % 3 == 0 else values)
    states = [trial.state for trial in sampler.study.trials]
    assert states == [TrialState.COMPLETE if number % 3 else TrialState.FAIL for number in range(70)]


@pytest.mark.parametrize("name", NAMES)
def test_the_user_sees_no_warning(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search(make(name), 60)


@pytest.mark.parametrize("name", ["nsga2", "nsga3"])
def test_genetic_samplers_evolve_from_what_was_enqueued(name):
    """The enqueued trials are the first generation; its children take their groups from them, but for few mutations."""
    groups, choices = [f"layer{i}" for i in range(40)], [("w2", "w3", "w4", "w6", "w8")] * 40
    rng = np.random.default_rng(0)
    sampler = build_sampler(instantiate(MAKERS[name]), problem(groups, choices, np.zeros((40, 5))))
    study, w3_w6 = sampler.study, [1, 3]
    for number in range(120):
        choice = sampler.ask(rng.choice(w3_w6, 40) if number < 50 else None)
        bits = np.array([2, 3, 4, 6, 8])[choice]
        sampler.tell(number, (float(bits.sum()), float((4.0**-bits * np.arange(1, 41)).sum())))
    generations = [trial.system_attrs[f"{type(study.sampler.inner).__name__}:generation"] for trial in study.trials]
    assert generations == [0] * 50 + [1] * 50 + [2] * 20
    children = [tuple(trial.params.values()) for trial in study.trials[50:100]]
    mutated = np.mean([scheme not in ("w3", "w6") for child in children for scheme in child])
    assert 0 < mutated < 0.05
    assert len({*children} - {tuple(trial.params.values()) for trial in study.trials[:50]}) > 40


@pytest.mark.parametrize("limits", [[1e9, 1e9], LIMITS, [5300, 14.6]])
@pytest.mark.parametrize("batch", [1, 3])
def test_brute_force_measures_every_allocation_within_the_budgets_once(limits, batch):
    sampler = make("brute_force", limits=limits)
    feasible = list(allocations(limits))
    beyond = np.array([SCHEMES.index(names[-1]) for names in CHOICES])
    seeds = [feasible[len(feasible) // 2], beyond]
    asked, n_told = [], 0
    while seeds or not sampler.exhausted():
        asked.append(sampler.ask(seeds.pop(0) if seeds else None))
        if len(asked) - n_told == batch:
            for number in range(n_told, len(asked)):
                sampler.tell(number, measure(asked[number]))
            n_told = len(asked)
    measured = [tuple(choice) for choice in asked]
    assert len(measured) == len(set(measured))
    assert set(measured) == {tuple(choice) for choice in feasible} | {tuple(beyond)}


def test_other_samplers_tell_when_a_tiny_space_is_exhausted():
    sampler, asked = make("random", limits=[5300, 14.6]), []
    n_feasible = len(list(allocations([5300, 14.6])))
    assert 1 < n_feasible < 60
    while not sampler.exhausted():
        asked.append(sampler.ask())
        sampler.tell(len(asked) - 1, measure(asked[-1]))
    assert len({tuple(choice) for choice in asked}) == n_feasible


def test_an_impossible_task_is_refused_at_the_door():
    with pytest.raises(InputError, match="cheapest allocation"):
        make("nsga2", limits=[100, 15])
    groups, choices = [f"layer{i}" for i in range(100)], [("w4", "w8")] * 100
    large = problem(groups, choices, np.zeros((100, 2)))
    with pytest.raises(InputError, match=r"10\^30\.1"):
        build_sampler(instantiate(MAKERS["brute_force"]), large)
    assert not build_sampler(instantiate(MAKERS["random"]), large).exhausted()


def test_a_sampler_of_one_objective_is_refused_before_any_work():
    space = problem(GROUPS, CHOICES, LOSS).space
    with pytest.raises(
        InputError, match=r"^CmaEsSampler cannot search 2 objectives, the loss and the cost \(.*\)\. Take sampler="
    ):
        check_sampler(optuna.samplers.CmaEsSampler, space)
    with pytest.raises(InputError, match=r"^The sampler cannot be made: .*search_space.*\. Give its arguments as \+sampler\."):
        check_sampler(optuna.samplers.GridSampler, space)
    with pytest.raises(InputError, match=r"^sampler must be one of mpsearch's or Optuna's; got int\.$"):
        check_sampler(lambda seed: seed, space)


def test_brute_force_of_a_pinned_network():
    """Many groups of one choice: more than numpy has axes."""
    groups, choices = [f"layer{i}" for i in range(100)], [("w4", "w8") if i in (3, 50) else ("w4",) for i in range(100)]
    sampler = build_sampler(instantiate(MAKERS["brute_force"]), problem(groups, choices, np.zeros((100, 2))))
    n = 0
    while not sampler.exhausted():
        sampler.ask()
        sampler.tell(n, (0.0, 0.0))
        n += 1
    assert n == 4


@pytest.mark.parametrize("name", NAMES)
def test_every_yaml_opens_with_the_command_that_uses_it(name):
    assert (CONF / f"{name}.yaml").read_text().startswith(f"# mpsearch search sampler={name}\n")
    assert MAKERS[name]._partial_ is True
