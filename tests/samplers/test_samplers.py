"""The contract of samplers (mpsearch/samplers/base.py), for every conf/sampler/*.yaml that is one of Optuna's."""

import itertools
import warnings
from pathlib import Path

import numpy as np
import optuna
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from optuna.trial import TrialState

from mpsearch.errors import InputError
from mpsearch.optimize import knapsack
from mpsearch.samplers.base import distributions, seeded
from mpsearch.samplers.repaired import Repaired

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

GROUPS = ["conv1", "layer1.0", "layer1.1", "pinned", "layer2.0", "fc"]
CHOICES = [("w2", "w4", "w8"), ("w2", "w4", "w8"), ("w2", "w4"), ("w8",), ("w2", "w3", "w4", "w8"), ("w4", "w8")]
BITS = {"w2": 2, "w3": 3, "w4": 4, "w8": 8}
NUMEL = [100, 400, 300, 50, 700, 200]
LOSS = np.full((6, 4), np.inf)
SIZE, LATENCY = np.full((6, 4), -1), np.full((6, 4), np.nan)  # what is padded is not read
for row, (names, numel) in enumerate(zip(CHOICES, NUMEL, strict=True)):
    for column, name in enumerate(names):
        LOSS[row, column] = (row + 1) * 4.0 ** -BITS[name]
        SIZE[row, column] = numel * BITS[name]
        LATENCY[row, column] = 1 + 0.1 * row + 0.2 * BITS[name]
COSTS, LIMITS = [SIZE, LATENCY], [7500, 15.0]


def make(name: str, seed: int = 0, costs=COSTS, limits=LIMITS) -> Repaired:
    return Repaired(seeded(instantiate(MAKERS[name]), seed), GROUPS, CHOICES, LOSS, costs, limits)


def new_study(sampler) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)


def to_choice(params):
    return np.array([names.index(params[group]) for group, names in zip(GROUPS, CHOICES, strict=True)])


def to_params(choice):
    return {group: names[index] for group, names, index in zip(GROUPS, CHOICES, choice, strict=True)}


def measure(params) -> tuple[float, float]:
    choice = to_choice(params)
    each = LOSS[np.arange(len(choice)), choice]
    return knapsack.total(SIZE, choice), float(each.sum() + each[1:] @ each[:-1])  # not additive


def allocations(limits=LIMITS):
    for indices in itertools.product(*(range(len(names)) for names in CHOICES)):
        choice = np.array(indices)
        if all(knapsack.total(cost, choice) <= limit for cost, limit in zip(COSTS, limits, strict=True)):
            yield to_params(choice)


SEEDS = [to_params(choice) for choice in knapsack.front(LOSS, np.where(np.isfinite(LOSS), SIZE, 0), 20)]


def search(sampler, n_trials: int, recorded=(), batch: int = 1):
    """[(params, values)] of `n_trials`; what is `recorded` is told instead of measured."""
    study = new_study(sampler)
    space = distributions(GROUPS, CHOICES)
    for params in SEEDS:
        study.enqueue_trial(params)
    done = []
    while len(done) < n_trials:
        asked = [study.ask(space) for _ in range(min(batch, n_trials - len(done)))]
        for trial in asked:
            params = trial.params
            values = recorded[len(done)][1] if len(done) < len(recorded) else measure(params)
            study.tell(trial, values)
            done.append((params, values))
    return done


@pytest.mark.parametrize("name", NAMES)
def test_proposals_are_in_the_space_and_within_the_budgets(name):
    done = search(make(name), 130)
    for params, _ in done:
        assert list(params) == GROUPS
        assert all(params[group] in names for group, names in zip(GROUPS, CHOICES, strict=True))
    for params, _ in done[len(SEEDS) :]:
        for cost, limit in zip(COSTS, LIMITS, strict=True):
            assert knapsack.total(cost, to_choice(params)) <= limit


@pytest.mark.parametrize("name", NAMES)
def test_what_was_enqueued_is_taken_as_it_is(name):
    done = search(make(name), len(SEEDS))
    assert [params for params, _ in done] == SEEDS
    assert any(knapsack.total(SIZE, to_choice(params)) > LIMITS[0] for params in SEEDS)  # also beyond a budget


@pytest.mark.parametrize("name", [name for name in NAMES if name != "brute_force"])  # by itself it raises outside of optimize
def test_without_budgets_the_sampler_is_left_alone(name):
    """What is proposed is what the inner sampler itself proposes."""
    space = distributions(GROUPS, CHOICES)
    proposals = []
    for sampler in (make(name, costs=(), limits=()), seeded(instantiate(MAKERS[name]), 0)):
        study = new_study(sampler)
        for _ in range(9):
            trial = study.ask(space)
            study.tell(trial, measure(trial.params))
        proposals.append([trial.params for trial in study.trials])
    assert proposals[0] == proposals[1]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [1, 4])
def test_the_seed_decides_and_a_replay_goes_on_where_the_run_was_killed(name, batch):
    n_trials = 120  # into the third generation
    whole = search(make(name), n_trials, batch=batch)
    for killed_after in (3, len(SEEDS), 50, 77):
        assert search(make(name), n_trials, recorded=whole[:killed_after], batch=batch) == whole
    assert search(make(name, seed=1), n_trials, batch=batch) != whole


@pytest.mark.parametrize("name", NAMES)
def test_failed_trials_do_no_harm(name):
    study = new_study(make(name))
    space = distributions(GROUPS, CHOICES)
    for number in range(70):
        trial = study.ask(space)
        if number % 3 == 0:
            study.tell(trial, state=TrialState.FAIL)
        else:
            study.tell(trial, measure(trial.params))
    assert len(study.trials) == 70


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
    study = new_study(Repaired(seeded(instantiate(MAKERS[name]), 0), groups, choices, np.zeros((40, 5))))
    for _ in range(50):
        study.enqueue_trial({group: str(rng.choice(["w3", "w6"])) for group in groups})
    for _ in range(120):
        trial = study.ask(distributions(groups, choices))
        bits = np.array([int(scheme[1:]) for scheme in trial.params.values()])
        study.tell(trial, (float(bits.sum()), float((4.0**-bits * np.arange(1, 41)).sum())))
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
    study = new_study(sampler)
    feasible = list(allocations(limits))
    beyond = {group: names[-1] for group, names in zip(GROUPS, CHOICES, strict=True)}
    study.enqueue_trial(feasible[len(feasible) // 2])
    study.enqueue_trial(beyond)
    seeds = 2
    running = []
    while seeds or not sampler.exhausted(study):
        running.append(study.ask(distributions(GROUPS, CHOICES)))
        seeds = max(0, seeds - 1)
        if len(running) == batch:
            for trial in running:
                study.tell(trial, measure(trial.params))
            running = []
    measured = [tuple(trial.params.values()) for trial in study.trials]
    assert len(measured) == len(set(measured))
    assert set(measured) == {tuple(params.values()) for params in feasible} | {tuple(beyond.values())}


def test_other_samplers_tell_when_a_tiny_space_is_exhausted():
    sampler = make("random", limits=[5300, 14.6])
    study = new_study(sampler)
    n_feasible = len(list(allocations([5300, 14.6])))
    assert 1 < n_feasible < 60
    while not sampler.exhausted(study):
        trial = study.ask(distributions(GROUPS, CHOICES))
        study.tell(trial, measure(trial.params))
    assert len({tuple(trial.params.values()) for trial in study.trials}) == n_feasible


def test_an_impossible_task_is_refused_at_the_door():
    with pytest.raises(InputError, match="cheapest allocation"):
        make("nsga2", limits=[100, 15])
    groups, choices = [f"layer{i}" for i in range(100)], [("w4", "w8")] * 100
    brute_force = seeded(instantiate(MAKERS["brute_force"]), 0)
    with pytest.raises(InputError, match=r"10\^30\.1"):
        Repaired(brute_force, groups, choices, np.zeros((100, 2)))
    random = Repaired(seeded(instantiate(MAKERS["random"]), 0), groups, choices, np.zeros((100, 2)))
    assert not random.exhausted(new_study(random))


def test_brute_force_of_a_pinned_network():
    """Many groups of one choice: more than numpy has axes."""
    groups, choices = [f"layer{i}" for i in range(100)], [("w4", "w8") if i in (3, 50) else ("w4",) for i in range(100)]
    sampler = Repaired(seeded(instantiate(MAKERS["brute_force"]), 0), groups, choices, np.zeros((100, 2)))
    study = new_study(sampler)
    while not sampler.exhausted(study):
        study.tell(study.ask(distributions(groups, choices)), (0.0, 0.0))
    assert len(study.trials) == 4


@pytest.mark.parametrize("name", NAMES)
def test_every_yaml_opens_with_the_command_that_uses_it(name):
    assert (CONF / f"{name}.yaml").read_text().startswith(f"# mpsearch search sampler={name}\n")
    assert MAKERS[name]._partial_ is True
