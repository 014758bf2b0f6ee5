"""The search on data that it did not use, against the additive solution; and its sampler against rivals, counted alike."""

import functools
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import optuna
from harness import Row, benchmark, ratio_row
from networks import choice
from rivals import RIVALS
from scipy.stats import t
from search_problems import Synthetic, folder, sensitivity, truth
from search_problems import problem as problem_of

from mpsearch.allocation import Allocation
from mpsearch.budget import Budget
from mpsearch.costs.size import AverageBits, Bytes
from mpsearch.evaluation import Evaluation, EvaluationLog
from mpsearch.intervals import smaller_p_value
from mpsearch.optimize.pareto import hypervolume
from mpsearch.pipeline.additive import solution
from mpsearch.pipeline.evaluators import SearchEvaluator
from mpsearch.pipeline.search import search
from mpsearch.pipeline.solve import best_within, prediction
from mpsearch.runs.run import Run, RunFolder
from mpsearch.samplers.base import Problem, build_sampler
from mpsearch.samplers.front import Front
from mpsearch.samplers.optuna_sampler import distributions
from mpsearch.samplers.proposer import History

NETWORKS = ("digits", "resnet20", "stories260k", "efficientnet_lite0", "minilm")
BUDGETS = (2.3, 2.4, 2.5, 2.75, 3.0, 3.5, 4.0, 5.0, 6.0)  # average bits
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
def searched(name: str, sampler: str, seed: int, total: int) -> tuple[int, EvaluationLog]:
    """Evaluations of the sensitivity, and the log of a search."""
    engine, entry = problem_of(name), SAMPLERS[sampler]
    table = sensitivity(name, entry.metric or "gauss_newton")
    n_before = int(engine.space.allowed.sum()) if entry.metric == "kl" else 0
    make = RIVALS.get(entry.sampler) or choice("sampler", entry.sampler)
    made, run = build_sampler(make, Problem(table, seed=seed)), RunFolder(folder(f"{name}-{sampler}-{seed}-{total}"))
    known = [] if isinstance(engine, Synthetic) else run.read_evaluations(engine.space, engine.quality)
    record = [] if isinstance(engine, Synthetic) else [run.recorder(engine.space, engine.quality.name, ())]
    evaluate = SearchEvaluator(engine, EvaluationLog(known, *record))
    log = search(evaluate, made, n_trials=total - n_before, n_seeds=entry.n_seeds, in_flight=4)
    return n_before, log


def front_of(name: str, log: EvaluationLog) -> tuple[Evaluation, ...]:
    """The front of a search, as `mpsearch.search` returns it."""
    return Run(problem_of(name).space, "", tuple(log), sensitivity(name, "gauss_newton")).front


@functools.lru_cache(maxsize=10_000)
def losses(name: str, allocation: Allocation) -> np.ndarray:
    """The loss of each sample of the confirm split."""
    engine = problem_of(name)
    engine.float_logits("confirm")
    with engine.applied(allocation) as model:
        return engine.score_of(model, "confirm").losses.astype(np.float64)


def volume(name: str, points: Sequence[tuple[float, float]], split: str = "search") -> float:
    """Hypervolume (bits x decades of the loss) that (average bits, loss) dominate."""
    engine = problem_of(name)
    space = engine.space
    worst = engine.score(space.uniform(space.scheme_names[0]), split).loss
    most = float(space.storage_bits.max(1).sum() / space.numel)
    return hypervolume(*np.array(points).T, most, worst) if points else 0.0


def confirmed_volume(name: str, allocations: Sequence[Allocation]) -> float:
    """Of some allocations, on the confirm split."""
    space = problem_of(name).space
    bits = [float(space.storage_bits[np.arange(len(space.names)), space.choice(a)].sum() / space.numel) for a in allocations]
    points = [(b, float(losses(name, a).mean())) for a, b in zip(allocations, bits, strict=True)]
    return volume(name, points, "confirm")


@benchmark(
    "search",
    problem=(*NETWORKS, "smollm2"),
    seed=(0, 1, 2),
    n_trials=(100,),
    quick={"problem": ("digits",), "seed": (0,), "n_trials": (30,)},
)
def unseen(problem: str, seed: int, n_trials: int) -> Iterator[Row]:
    """The default search on data that it did not use: the loss on the confirm split at equal bytes, sample by sample.

    The point of the front of lowest loss (on the search split) within each budget is compared with the additive solution (ILP) on
    the same `gauss_newton` table of at most as many bytes, which costs no trial, and with the best uniform allocation of at most
    as many bytes. A ratio above 1 says that ours has the lower loss; the interval is that of our loss over the ILP's. `p_worse`
    is the one-sided p-value of the paired t test that ours is worse: significant at 5 %, by Holm's first step over both
    comparisons of n rows, where it is below 0.05 / 2n. `same`: the point is the additive solution itself. The ratio on the search
    split, which the search has seen, is a diagnosis. Summaries: the median of our loss over the ILP's, its geometric mean over
    the tightest third of the budgets, and the hypervolumes of the points on the confirm split.
    """
    _, log = searched(problem, "front", seed, n_trials)
    front, rows, pairs = front_of(problem, log), [], []
    for bits in BUDGETS:
        within = [e for e in front if e.average_bits <= bits]
        if within:
            row, pair = at_equal_bytes(problem, min(within, key=lambda e: e.loss))
            rows.append({"case": f"{bits} bits"} | row)
            pairs.append(pair)
    yield from rows
    ratios = np.array([1 / row["ratio"] for row in rows])
    row = {"what": "summary", "unit": "of the ILP's loss", "rival": "additive ILP", "rival_value": 1.0}
    median, tight = float(np.median(ratios)), float(np.exp(np.log(ratios[: len(BUDGETS) // 3]).mean()))
    yield row | {"case": "median", "value": median, "ratio": 1 / median}
    yield row | {"case": "tightest third", "value": tight, "ratio": 1 / tight}
    ours, theirs = (confirmed_volume(problem, some) for some in zip(*pairs, strict=True))
    row |= {"case": "hypervolume", "value": ours, "unit": "bits x decades", "rival_value": theirs}
    yield row | {"ratio": ours / theirs}


def at_equal_bytes(problem: str, point: Evaluation) -> tuple[Row, tuple[Allocation, Allocation]]:
    """The row of a point of a front, and its allocation with the additive solution of at most as many bytes."""
    space, table = problem_of(problem).space, sensitivity(problem, "gauss_newton")
    cost = Bytes().table(space)
    additive = solution(space, table.losses(), [Budget(cost, cost.cost_of(space.choice(point.allocation)))])
    ours, theirs = losses(problem, point.allocation), losses(problem, additive)
    half = float(t.ppf(0.975, len(ours) - 1) * (ours - theirs).std(ddof=1) / np.sqrt(len(ours)))
    low, high = (float((ours.mean() + end) / theirs.mean()) for end in (-half, half))
    uniform = [space.uniform(scheme) for scheme in space.scheme_names]
    fitting = [a for a in uniform if cost.cost_of(space.choice(a)) <= point.size_bytes]
    plain = min((losses(problem, a) for a in fitting), key=lambda values: float(values.mean()))
    same = point.allocation == additive
    seen = 1.0 if same else problem_of(problem).score(additive).loss / point.loss
    row = {"value": float(ours.mean()), "unit": problem_of(problem).divergence.unit, "rival": "additive ILP"}
    row |= {"rival_value": float(theirs.mean()), "ratio": float(theirs.mean() / ours.mean()), "low": low, "high": high}
    row |= {"p_worse": smaller_p_value(theirs, ours), "same": same}
    row |= {"ratio_to_uniform": float(plain.mean() / ours.mean()), "p_worse_than_uniform": smaller_p_value(plain, ours)}
    return row | {"ratio_on_search_split": float(seen)}, (point.allocation, additive)


@benchmark(
    "search_samplers",
    problem=NETWORKS,
    sampler=tuple(SAMPLERS),
    seed=(0,),
    total=(220,),
    quick={"problem": ("digits",), "sampler": ("front", "evopress", "tpe"), "total": (14,)},
)
def compare(problem: str, sampler: str, seed: int, total: int) -> Iterator[Row]:
    """Fronts of all samplers after as many evaluations: hypervolume on the confirm split, which decides, and on the search split.

    Axes: average bits (scales counted) and log10 of the loss; reference: the largest allocation and the loss of the smallest.
    Every sampler is asked by `mpsearch.pipeline.search`, with the same quantized weights, and only what is accepted
    (`mpsearch.pipeline.accept`) makes a front; the measured sensitivities (`kl`) count as evaluations. The rival is the additive
    solution at many sizes (ILP) on the Gauss-Newton sensitivities. `seeded`: Optuna's samplers that start from points of the
    additive front, as ours does. The hypervolume of all that was measured on the search split is a diagnosis: what a search fits.
    """
    _, log = searched(problem, sampler, seed, total)
    _, additive = searched(problem, ADDITIVE, 0, total)
    ours, theirs = (confirmed_volume(problem, [e.allocation for e in front_of(problem, some)]) for some in (log, additive))
    row = {"case": "front, confirm split", "value": ours, "unit": "bits x decades"}
    yield row | {"rival": ADDITIVE, "rival_value": theirs, "ratio": ours / theirs}
    ours, theirs = (volume(problem, [(e.average_bits, e.loss) for e in some.on("search")]) for some in (log, additive))
    row = {"case": "all measured, search split", "value": ours, "unit": "bits x decades"}
    yield row | {"rival": ADDITIVE, "rival_value": theirs, "ratio": ours / theirs}


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
    engine, table = problem_of("digits_truth"), sensitivity("digits_truth", "gauss_newton")
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
