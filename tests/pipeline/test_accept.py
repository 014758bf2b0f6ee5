"""What is accepted, on simulated networks whose loss on unlimited data is known: a search sees a few samples of it."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import norm, ttest_1samp

from mpsearch.allocation import Allocation, SearchSpace
from mpsearch.budget import Budget
from mpsearch.errors import InputError
from mpsearch.evaluation import EvaluationLog, Score, SensitivityTable
from mpsearch.intervals import combined_p_value, holm, random_half, smaller_p_value
from mpsearch.layer import LayerGroup, LayerSpec
from mpsearch.optimize.pareto import non_dominated
from mpsearch.pipeline.accept import accept, compare
from mpsearch.pipeline.additive import solution
from mpsearch.pipeline.evaluators import SearchEvaluator
from mpsearch.pipeline.seeds import Seeds
from mpsearch.runs.proposal_tests import ProposalTests
from mpsearch.runs.run import Run, RunFolder
from mpsearch.samplers.base import Problem
from mpsearch.schemes.integer import Integer

N_GROUPS, BITS = 8, (2, 3, 4, 6)


class Network:
    """Sample i loses sum_g w_ig a_g(x_g), w_ig drawn with mean 1; `gain` of it is saved where the first two groups agree."""

    def __init__(self, seed, n_samples=24, gain=0.0):
        rng = np.random.default_rng(seed)
        layers = [LayerSpec(f"g{i}", "linear", (8, 8), 64, f"g{i}", (f"g{i}",)) for i in range(N_GROUPS)]
        schemes = {f"w{b}": Integer(b) for b in BITS}
        self.space = SearchSpace(tuple(LayerGroup(x.name, (x,)) for x in layers), schemes, (tuple(schemes),) * N_GROUPS, 0)
        self.sensitivities = rng.lognormal(0, 1, (N_GROUPS, 1)) * 4.0 ** -np.array(BITS)
        drawn = rng.lognormal(-0.5, 1, (2, n_samples, N_GROUPS))
        self.weights = dict(zip(("search", "calibration"), drawn, strict=True))
        self.gain = gain

    def true_loss(self, choice):
        saved = 1 - self.gain * (choice[0] == choice[1])
        return saved * self.sensitivities[np.arange(N_GROUPS), choice].sum()

    def score(self, allocation, split="search"):
        choice = self.space.choice(allocation) if allocation else None
        losses = np.zeros(len(self.weights[split]))
        if choice is not None:
            saved = 1 - self.gain * (choice[0] == choice[1])
            losses = saved * self.weights[split] @ self.sensitivities[np.arange(N_GROUPS), choice]
        half = losses[random_half(len(losses))].mean()
        return Score(losses.mean(), 0, 1, 1, 1, 0, len(losses), np.empty(0), proposal_loss=half, losses=losses)

    def searched(self, seed, n_proposals=300):
        """The evaluator after the seeds and random moves from them, and the problem."""
        table = SensitivityTable("gauss_newton", "nats", self.sensitivities, self.space)
        problem, rng = Problem(table), np.random.default_rng(seed)
        evaluate = SearchEvaluator(SimpleNamespace(space=self.space, score=self.score))
        seeds = Seeds(problem, 12)
        for trial, allocation in enumerate(seeds.allocations):
            evaluate(allocation, seeds.origin(allocation), trial)
        choices = [self.space.choice(a) for a in seeds.allocations]
        for trial in range(len(choices), len(choices) + n_proposals):
            choice = choices[rng.integers(len(choices))].copy()
            for group in rng.choice(N_GROUPS, rng.integers(2, 4), replace=False):
                choice[group] = rng.integers(len(BITS))
            evaluate(self.space.allocation(choice), "sampler", trial)
        return evaluate, problem

    def true_ratio(self, problem, evaluation):
        """The true loss over that of the additive solution of the same size."""
        ours = self.space.choice(evaluation.allocation)
        limit = Budget(problem.objectives[0], evaluation.size_bytes)
        theirs = self.space.choice(solution(self.space, self.sensitivities, [limit]))
        return self.true_loss(ours) / self.true_loss(theirs)


def fronts(evaluate, network):
    """(the non-dominated of all that was measured, the run's front)"""
    measured = evaluate.log.on("search")
    lowest = non_dominated([(e.size_bytes, e.loss) for e in measured])
    run = Run(network.space, "accuracy", evaluate.log, None)
    return [e for e, kept in zip(measured, lowest, strict=True) if kept], run.front


@pytest.fixture(scope="module")
def additive():
    """(network, problem, fronts) of searches where the additive solution is the best there is."""
    found = []
    for seed in range(20):
        network = Network(seed)
        evaluate, problem = network.searched(seed)
        accept(evaluate, problem)
        found.append((network, problem, *fronts(evaluate, network)))
    return found


def test_the_lowest_measured_losses_are_worse_than_the_additive_solution(additive):
    found = [(network, problem, e) for network, problem, lowest, _ in additive for e in lowest if e.origin == "sampler"]
    ratios = np.array([network.true_ratio(problem, e) for network, problem, e in found])
    assert np.mean(ratios) > 1.02, "else this simulation shows nothing"


def test_no_point_of_the_front_is_worse_than_the_additive_solution(additive):
    worse = [
        any(network.true_ratio(problem, e) > 1 + 1e-9 for e in front if e.origin != "uniform")
        for network, problem, _, front in additive
    ]
    assert np.mean(worse) <= 0.05, "searches in which anything false was accepted"


def test_what_is_better_is_accepted():
    found = []
    for seed in range(5):
        network = Network(seed, gain=0.5)
        evaluate, problem = network.searched(seed)
        accept(evaluate, problem)
        proposals = [e for e in fronts(evaluate, network)[1] if e.origin == "sampler"]
        found += [network.true_ratio(problem, e) for e in proposals]
    assert len(found) >= 5
    assert np.median(found) < 0.9


def test_acceptance_depends_on_the_trials_alone():
    network = Network(0, gain=0.5)
    evaluate, problem = network.searched(0)
    accept(evaluate, problem)
    rows = list(evaluate.log)
    accept(evaluate, problem)
    assert list(evaluate.log) == rows


def test_a_resumed_run_does_not_test_its_proposals_again(tmp_path):
    network = Network(0, gain=0.5)
    evaluate, problem = network.searched(0)
    evaluate.tests = ProposalTests(RunFolder(tmp_path))
    accept(evaluate, problem)
    rows, tests = list(evaluate.log), (tmp_path / "proposal_tests.csv").read_bytes()
    assert any(e.accepted and e.origin == "sampler" for e in rows)

    def measured(allocation, split="search"):
        raise AssertionError("measured again")

    engine = SimpleNamespace(space=network.space, score=measured)
    resumed = SearchEvaluator(engine, EvaluationLog(rows), tests=ProposalTests(RunFolder(tmp_path)))
    accept(resumed, problem)
    assert list(resumed.log) == rows
    assert (tmp_path / "proposal_tests.csv").read_bytes() == tests

    (tmp_path / "proposal_tests.csv").write_bytes(tests.replace(b"e-", b"e-1", 1))
    with pytest.raises(InputError, match=r"proposal_tests.csv is damaged.*the proposals are tested again"):
        ProposalTests(RunFolder(tmp_path))


def test_a_proposal_that_is_an_additive_solution_is_accepted_without_a_test():
    network = Network(0)
    evaluate, problem = network.searched(0, n_proposals=0)
    size = network.space.storage_bits[:, 1].sum() + 64
    best = solution(network.space, network.sensitivities, [Budget(problem.objectives[0], (size + 7) // 8)])
    evaluate(best, "sampler", len(evaluate.log))
    assert best not in {e.allocation for e in evaluate.log.accepted()}
    accept(evaluate, problem)
    assert best in {e.allocation for e in evaluate.log.accepted()}


def test_the_test_is_as_wrong_as_it_says():
    rng = np.random.default_rng(0)
    p_values = [smaller_p_value(rng.normal(size=12), rng.normal(size=12)) for _ in range(2000)]
    assert np.mean(np.array(p_values) < 0.05) == pytest.approx(0.05, abs=0.015)
    skewed = rng.lognormal(0, 1, (2000, 100)) - np.exp(0.5)  # of mean 0, and most sample means are below it
    corrected = [smaller_p_value(values, np.zeros(100)) for values in skewed]
    assert np.mean(np.array(corrected) < 0.0025) < 0.01 < np.mean(ttest_1samp(skewed, 0, 1, alternative="less").pvalue < 0.0025)
    assert smaller_p_value([1.0], [2.0]) == 1
    assert smaller_p_value([1.0, np.inf], [2.0, 3.0]) == 1
    assert (smaller_p_value([1.0, 1.0], [2.0, 2.0]), smaller_p_value([2.0, 2.0], [2.0, 2.0])) == (0, 1)


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005], 0.05).tolist() == [True, False, False, True]
    assert holm([0.5, 0.01], 0.05).tolist() == [False, True]
    assert holm([], 0.05).tolist() == []


def test_combined_p_values():
    assert combined_p_value([0.05, 0.05], [100, 100]) == pytest.approx(norm.sf(np.sqrt(2) * norm.isf(0.05)))
    assert combined_p_value([0.05, 0.5], [300, 100]) == pytest.approx(norm.sf(norm.isf(0.05) * np.sqrt(0.75)))
    assert 0 <= combined_p_value([0.0, 1.0], [1, 1]) <= 1
    rng = np.random.default_rng(0)
    combined = [combined_p_value(rng.random(2), [200, 500]) for _ in range(4000)]
    assert np.mean(np.array(combined) < 0.05) == pytest.approx(0.05, abs=0.01)


@pytest.mark.parametrize(("on_search", "accepted"), [(-0.02, True), (0.01, False)])
def test_the_calibration_split_decides_with_the_search_split_and_not_against_it(on_search, accepted):
    rng = np.random.default_rng(0)
    noise = {split: rng.normal(0, 0.1, 200) for split in ("search", "calibration")}
    noise = {split: values - values[~random_half(200)].mean() for split, values in noise.items()}
    changes = {"search": on_search, "calibration": -0.05}

    def losses(allocation, split="search"):
        return 1 + noise[split] + changes[split] if allocation["g0"] == "w2" else np.ones(200)

    proposal, reference = (
        SimpleNamespace(allocation=Allocation({"g0": name}), told_loss=t) for name, t in (("w2", 0.9), ("w3", 1))
    )
    kept = []
    evaluate = SimpleNamespace(losses=losses, submit=lambda *_: None, result=lambda _: reference, tests=ProposalTests())
    evaluate.accept = lambda e, origin: kept.append((e, origin))
    compare(evaluate, [(proposal, reference.allocation)])
    assert smaller_p_value(losses(proposal.allocation)[~random_half(200)], np.ones(100)) > 0.01, (
        "else the other split decides nothing"
    )
    assert kept == [(reference, "knapsack"), (proposal, "sampler")][: 1 + accepted]


@pytest.mark.parametrize("n", [0, 1, 2, 5, 100])
def test_half(n):
    assert random_half(n).sum() == (n + 1) // 2
    assert np.array_equal(random_half(n), random_half(n))
