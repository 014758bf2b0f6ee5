"""The search's own sampler against its rivals: same networks, same quantized weights, same evaluations, counted alike."""

import functools
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import optuna
from harness import Row, benchmark, ratio_row
from networks import choice, confirmed, quality_row
from rivals import RIVALS
from search_problems import Synthetic, sensitivity, truth
from search_problems import problem as problem_of

from mpsearch.budget import Budget
from mpsearch.costs.size import AverageBits
from mpsearch.evaluation import Evaluation, EvaluationLog
from mpsearch.intervals import paired_interval
from mpsearch.optimize.pareto import hypervolume, non_dominated
from mpsearch.pipeline.evaluators import SearchEvaluator
from mpsearch.pipeline.search import search
from mpsearch.pipeline.solve import best_within, prediction, solution
from mpsearch.samplers.base import Problem, build_sampler
from mpsearch.samplers.front import Front
from mpsearch.samplers.optuna_sampler import distributions
from mpsearch.samplers.proposer import History

NETWORKS = ("digits", "resnet20", "stories260k", "efficientnet_lite0", "minilm")
COUNTS = (50, 100, 150, 220, 300, 400)
ADDITIVE = "ILP"


class Entry(NamedTuple):
    """A sampler as it is compared; `kl` sensitivities cost an evaluation for each group and scheme, `None`: it uses none."""

    sampler: str
    metric: str | None = None
    n_seeds: int = 0


SAMPLERS = {
    "front": Entry("front", "gauss_newton", 20),
    "front on kl": Entry("front", "kl", 20),
    "front on fisher": Entry("front", "fisher", 20),
    ADDITIVE: Entry("ilp", "gauss_newton"),
    "ILP on kl": Entry("ilp", "kl"),
    "ILP on fisher": Entry("ilp", "fisher"),
    "ILP on hawq": Entry("ilp", "hawq"),
    "ILP on weight_mse": Entry("ilp", "weight_mse"),
    "greedy_accuracy": Entry("greedy_accuracy", "kl"),
    "greedy_gain": Entry("greedy_gain", "kl"),
    "evopress": Entry("evopress"),
    "amq": Entry("amq"),
    "nsga2 seeded": Entry("nsga2", "kl", 50),
    "tpe seeded": Entry("tpe", "kl", 50),
    **{name: Entry(name) for name in ("nsga2", "nsga3", "tpe", "random")},
}


@functools.lru_cache(maxsize=4)
def searched(name: str, sampler: str, seed: int, total: int, bits: float | None = None) -> tuple[int, list[Evaluation], float]:
    """Evaluations of the sensitivity, the trials, and the seconds that are not spent on scoring."""
    engine, entry = problem_of(name), SAMPLERS[sampler]
    table = sensitivity(name, entry.metric or "gauss_newton")
    n_before = int(engine.space.allowed.sum()) if entry.metric == "kl" else 0
    budgets = [] if bits is None else [Budget(AverageBits().table(engine.space), bits)]
    make = RIVALS.get(entry.sampler) or choice("sampler", entry.sampler)
    made = build_sampler(make, Problem(table, budgets=budgets, seed=seed))
    start = time.perf_counter()
    log = search(SearchEvaluator(engine, budgets=budgets), made, n_trials=total - n_before, n_seeds=entry.n_seeds)
    return n_before, log.trials(), time.perf_counter() - start - sum(e.seconds for e in log)


def volume(name: str, points: Sequence[tuple[float, float]], split: str = "search") -> float:
    """Hypervolume (bits x decades of the loss) that (average bits, loss) dominate."""
    engine = problem_of(name)
    space = engine.space
    worst = engine.score(space.uniform(space.scheme_names[0]), split).loss
    most = float(space.storage_bits.max(1).sum() / space.numel)
    return hypervolume(*np.array(points).T, most, worst) if points else 0.0


def confirmed_volume(name: str, trials: Sequence[Evaluation]) -> float:
    """Of the front of the trials, on the confirm split."""
    points = np.array([(e.average_bits, e.loss) for e in trials])
    front = [trials[i] for i in np.flatnonzero(non_dominated(points))]
    return volume(name, [(e.average_bits, problem_of(name).score(e.allocation, "confirm").loss) for e in front], "confirm")


@benchmark(
    "search",
    problem=(*NETWORKS, "synthetic1000"),
    sampler=tuple(SAMPLERS),
    seed=(0, 1, 2),
    total=(400,),
    quick={"problem": ("digits",), "sampler": ("front", "evopress", "tpe"), "seed": (0,), "total": (14,)},
    chart={"x": "evaluations", "y": "value", "line": "sampler", "panel": "problem", "log": ""},
)
def compare(problem: str, sampler: str, seed: int, total: int) -> Iterator[Row]:
    """Hypervolume against the number of evaluations, and that of the final front on the confirm split, which decides.

    Axes: average bits (scales counted) and log10 of the loss; reference: the largest allocation and the loss of the smallest.
    Every sampler is asked by `mpsearch.pipeline.search`, with the same quantized weights; the measured sensitivities (`kl`)
    count as evaluations. The rival is the additive solution at many sizes (ILP) on the Gauss-Newton sensitivities, after as
    many evaluations. `seeded`: Optuna's samplers that start from points of the additive front, as ours does.
    """
    n_before, trials, seconds = searched(problem, sampler, seed, total)
    _, additive, _ = searched(problem, ADDITIVE, 0, total)
    for n in (n for n in (*COUNTS, total) if n_before < n <= total):
        ours, theirs = (
            volume(problem, [(e.average_bits, e.loss) for e in some]) for some in (trials[: n - n_before], additive[:n])
        )
        row = {"case": f"{n} evaluations", "evaluations": n, "value": ours, "unit": "bits x decades"}
        yield row | {"rival": ADDITIVE, "rival_value": theirs, "ratio": ours / theirs}
    if not problem.startswith("synthetic"):
        ours, theirs = (confirmed_volume(problem, some) for some in (trials, additive))
        row = {"what": "confirm split", "value": ours, "unit": "bits x decades", "seconds_proposing": seconds}
        yield row | {"rival": ADDITIVE, "rival_value": theirs, "ratio": ours / theirs}


@benchmark(
    "search_at_budget",
    problem=NETWORKS,
    bits=(2.25, 2.5, 3.0),
    seed=(0, 1, 2),
    total=(220,),
    quick={"problem": ("digits",), "bits": (3.0,), "seed": (0,), "total": (30,)},
)
def at_budget(problem: str, bits: float, seed: int, total: int) -> Iterator[Row]:
    """At equal bits, on the confirm split: a search under the budget, and a search of the whole front, solved for the budget.

    The rival is the additive solution on the measured sensitivities; the ratio is that of the losses. The interval is that of
    the paired difference of the samples' qualities.
    """
    engine = problem_of(problem)
    budget = Budget(AverageBits().table(engine.space), bits)
    rival = solution(engine.space, sensitivity(problem, "kl").losses(), [budget])
    theirs = confirmed(engine, rival)
    _, trials, _ = searched(problem, "front", seed, total, bits)
    _, whole, _ = searched(problem, "front", seed, total)
    table = sensitivity(problem, "gauss_newton")
    solved = best_within(SearchEvaluator(engine, EvaluationLog(whole)), table, [budget])
    within = min((e for e in trials if e.feasible), key=lambda e: e.loss)
    for way, allocation in (("search", within.allocation), ("solve", solved.allocation)):
        ours = confirmed(engine, allocation)
        low, high = (engine.quality.scale * end for end in paired_interval(ours.qualities, theirs.qualities))
        row = quality_row(engine, allocation, ours) | {"case": way, "rival": "additive solution"}
        row |= {"rival_value": engine.quality.scale * theirs.quality, "rival_kl": theirs.loss, "ratio": theirs.loss / ours.loss}
        yield row | {"low": low, "high": high, "search_loss_ratio": engine.score(rival).loss / engine.score(allocation).loss}


@benchmark(
    "solve",
    trials=(25, 40, 60, 120),
    seed=(0, 1, 2),
    budgets=(30,),
    quick={"trials": (25,), "seed": (0,), "budgets": (3,)},
)
def solve(trials: int, seed: int, budgets: int) -> Iterator[Row]:
    """`mpsearch solve` after runs of different lengths, on the digits network, of which every allocation's loss is known.

    Mean over the budgets of the loss over the least possible one within the budget: of the additive solution, of the best of it
    and all that was measured, of what the surrogate predicts, and of what `solve` finds; the rival is the additive solution.
    """
    engine, table = problem_of("digits"), sensitivity("digits", "gauss_newton")
    space = engine.space
    choices, losses = truth()
    bits = space.storage_bits / space.numel
    sizes = bits[np.arange(choices.shape[1]), choices].sum(1)
    log = search(SearchEvaluator(engine), Front(Problem(table, seed=seed)), n_trials=trials)
    ratios: dict[str, list[float]] = {"additive": [], "measured or additive": [], "predicted": [], "solve": []}
    for limit in np.linspace(sizes.min(), sizes.max(), budgets + 1)[1:]:
        budget = [Budget(AverageBits().table(space), limit)]
        within = [e.loss for e in log.on("search") if budget[0].allows(space.choice(e.allocation))]
        additive = engine.score(solution(space, table.losses(), budget)).loss
        solved = best_within(SearchEvaluator(engine, EvaluationLog(log)), table, budget).loss
        predicted = engine.score(prediction(table, log.on("search"), budget)).loss
        least = losses[sizes <= limit * (1 + 1e-12)].min()
        for way, loss in zip(ratios, (additive, min([additive, *within]), predicted, solved), strict=True):
            ratios[way].append(loss / least)
    means = {way: float(np.mean(values)) for way, values in ratios.items()}
    for way in list(means)[1:]:
        row = {"case": way, "value": means[way], "unit": "of the least loss", "rival": "additive"}
        yield row | {"rival_value": means["additive"], "ratio": means["additive"] / means[way]}


@benchmark(
    "search_cost",
    groups=(20, 200, 10_000),
    evaluations=(300,),
    quick={"groups": (20,), "evaluations": (12,)},
)
def cost(groups: int, evaluations: int) -> Iterator[Row]:
    """Processor time of one proposal of our sampler, at 8 schemes a group, against Optuna's own bookkeeping of one trial.

    The first proposal chooses the surrogate's variances too, as happens every so often.
    """
    synthetic = Synthetic(groups, bits=(1, 2, 3, 4, 5, 6, 7, 8))
    space, rng = synthetic.space, np.random.default_rng(0)
    sampler = Front(Problem(synthetic.sensitivity()))
    choices = np.clip(rng.normal(rng.uniform(1, 7, (evaluations, 1)), 1.0, (evaluations, groups)).round(), 0, 7).astype(np.intp)
    log_losses = np.log([synthetic.score(space.allocation(choice)).loss for choice in choices])
    history = History(choices, log_losses, sampler.sizes(choices), np.zeros(evaluations, dtype=bool))
    proposing, keeping = [], []
    for _ in range(4):
        start = time.process_time()
        chosen = space.allocation(sampler.choose(history, rng))
        proposing.append(time.process_time() - start)
        study = optuna.create_study(directions=["minimize"] * 2)
        study.enqueue_trial(dict(chosen))
        start = time.process_time()
        study.tell(study.ask(distributions(space.names, space.choices)), (0.0, 0.0))
        keeping.append(time.process_time() - start)
    optuna_seconds = float(np.median(keeping))
    yield {"case": "with variances"} | ratio_row(proposing[0], "Optuna's bookkeeping", optuna_seconds)
    yield {"case": "proposal"} | ratio_row(float(np.median(proposing[1:])), "Optuna's bookkeeping", optuna_seconds)
