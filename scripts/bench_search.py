"""The search's own sampler against its rivals: same problems, same quantized weights, same evaluations, counted alike.

    python scripts/bench_search.py run digits        every sampler on one problem; goes on where it was stopped
    python scripts/bench_search.py check digits      the surrogate on held-out allocations; our front on data that no search saw
    python scripts/bench_search.py cost              what a proposal costs at 200 and at 10,000 groups
    python scripts/bench_search.py page              tables, figures and the page, from whatever was run: reports/bench_search/

Problems: digits (all 59,049 allocations known), resnet20 and stories260k (need $MPSEARCH_DATA), synthetic1000, synthetic10000.
What was scored is kept in `--cache DIR` (default build/bench_search), for all samplers together.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from search_page import write_page
from search_problems import Network, Problem, Synthetic, digits_problem, enumerate_digits, resnet20_problem, stories_problem

from mpsearch import knapsack
from mpsearch.budget import read_budgets
from mpsearch.costs.size import AverageBits, Bytes
from mpsearch.engine import paired_interval
from mpsearch.evaluation import Evaluation, Score, SensitivityTable
from mpsearch.metrics.base import SensitivityMetric
from mpsearch.metrics.fisher import Fisher
from mpsearch.metrics.hawq import HAWQ
from mpsearch.metrics.kl import KL
from mpsearch.metrics.weight_mse import WeightMSE
from mpsearch.pareto import non_dominated
from mpsearch.samplers.base import complete, distributions
from mpsearch.samplers.front import Front
from mpsearch.samplers.proposer import History
from mpsearch.search import Evaluator, search
from mpsearch.sensitivity import measure_sensitivity
from mpsearch.surrogate import Surrogate

ROOT = Path(__file__).parent.parent
METRICS: dict[str, Callable[[], SensitivityMetric]] = {"kl": KL, "fisher": Fisher, "hawq": HAWQ, "weight_mse": WeightMSE}
PROBLEMS: dict[str, Callable[[Path], Problem]] = {
    "digits": digits_problem,
    "resnet20": resnet20_problem,
    "stories260k": stories_problem,
    "synthetic1000": lambda cache: Synthetic(1000),
    "synthetic10000": lambda cache: Synthetic(10_000),
}
OURS = "front (ours)"
LONG = "NSGA-II, seeded, long"
ON = "front (ours), going on"
AT_3_BITS = "front (ours), budget.bits=3"


class Run(NamedTuple):
    """A sampler as it is compared: `total` evaluations, the sensitivity's counted where it is used (`metric` kl)."""

    sampler: str
    metric: str | None
    n_seeds: int
    total: int
    bits: float | None = None


RUNS = {
    OURS: Run("front", "kl", 20, 0),
    ON: Run("front", "kl", 20, 400),
    AT_3_BITS: Run("front", "kl", 20, 0, 3.0),
    "NSGA-II, seeded": Run("nsga2", "kl", 50, 400),
    "TPE, seeded": Run("tpe", "kl", 50, 400),
    "NSGA-II": Run("nsga2", None, 0, 400),
    "NSGA-III": Run("nsga3", None, 0, 400),
    "TPE": Run("tpe", None, 0, 400),
    "GP": Run("gp", None, 0, 100),
    "random": Run("random", None, 0, 400),
    "EvoPress": Run("evopress", None, 0, 400),
    "AMQ": Run("amq", None, 0, 400),
    "ILP on KL": Run("ilp", "kl", 0, 400),
    "ILP on Fisher (ModelOpt)": Run("ilp", "fisher", 0, 150),
    "ILP on tr(H)·‖ΔW‖² (HAWQ)": Run("ilp", "hawq", 0, 150),
    "ILP on weight MSE": Run("ilp", "weight_mse", 0, 150),
    "greedy, AIMET's order": Run("greedy_accuracy", "kl", 0, 400),
    "greedy, gain per bit (exllamav3)": Run("greedy_gain", "kl", 0, 400),
    LONG: Run("nsga2", "kl", 50, 5000),
}


def sensitivity(problem: Problem, metric: str, cache: Path) -> tuple[SensitivityTable, int, float]:
    """The table, the evaluations that it cost, and the seconds."""
    if metric == "kl":
        before = problem.seconds
        table = measure_sensitivity(problem, KL())  # type: ignore[arg-type]
        return table, int(problem.space.allowed.sum()), problem.seconds - before
    file = cache / f"{problem.name}-{metric}.json"
    if not file.exists():
        assert isinstance(problem, Network)
        for layer in problem.space.layers:  # quantizing is no part of what a metric costs
            for scheme in problem.space.schemes:
                problem.engine.swaps(layer.name, scheme)
        start = time.perf_counter()
        values = measure_sensitivity(problem.engine, METRICS[metric]()).values
        file.write_text(json.dumps({"values": values.tolist(), "seconds": time.perf_counter() - start}))
    found = json.loads(file.read_text())
    return SensitivityTable(metric, "", np.array(found["values"]), problem.space), 0, found["seconds"]


def run_one(problem: Problem, name: str, seed: int, total: int, cache: Path) -> None:
    """One sampler, one seed; `<problem>-<name>-<seed>.json` holds per trial: bits, loss, seconds so far."""
    file = cache / f"{problem.name}-{name.replace('/', ' ')}-{seed}.json"
    if file.exists():
        return
    run = RUNS[name]
    table, n_before, seconds = sensitivity(problem, run.metric or "kl", cache)
    if run.metric is None:
        n_before, seconds = 0, 0.0
    rows: list[dict[str, float | str]] = []
    start, evaluated, spent = time.perf_counter(), problem.seconds, problem.spent

    def record(evaluation: Evaluation) -> None:
        own = time.perf_counter() - start - (problem.spent - spent)
        if evaluation.trial is not None:
            code = "" if isinstance(problem, Synthetic) else problem.encode(evaluation.allocation)
            now = seconds + own + problem.seconds - evaluated
            rows.append({"code": code, "bits": evaluation.average_bits, "loss": evaluation.loss, "seconds": now, "own": own})

    if run.sampler == "gp":
        make: Any = optuna.samplers.GPSampler
    else:
        make = instantiate(OmegaConf.load(ROOT / "conf" / "sampler" / f"{run.sampler}.yaml"))
    budgets = read_budgets({"bits": run.bits}, {"bits": AverageBits()}, problem.space)
    sampler = complete(make, table, [Bytes().table(problem.space)], budgets, seed)
    evaluate = Evaluator(problem, budgets, record)  # type: ignore[arg-type]
    search(evaluate, table, sampler, n_trials=total - n_before, n_seeds=run.n_seeds)
    row = {"problem": problem.name, "run": name, "seed": seed, "before": n_before, "before_seconds": seconds, "trials": rows}
    file.write_text(json.dumps(row))
    print(f"{problem.name}: {name}, seed {seed}: {len(rows)} trials", flush=True)


def reference(problem: Problem) -> tuple[float, float]:
    """The worst corner: of all allocations where they are known, else (bits of the largest uniform, loss of the smallest)."""
    space = problem.space
    bits = space.storage_bits / space.numel
    if problem.name == "digits":
        whole = [code for code in problem.known if "-" not in code]
        return float(bits[:, -1].sum()), max(problem.known[code][0] for code in whole)
    return float(bits[:, -1].sum()), problem.score(space.uniform(space.scheme_names[0])).loss


def near_front(table: SensitivityTable, n: int, seed: int = 99) -> list[np.ndarray]:
    """Random mixed allocations: points of the additive front, 5 to 60 % of whose groups are moved by one or two levels."""
    rng = np.random.default_rng(seed)
    points = knapsack.front(table.losses(), table.space.storage_bits, 60)
    found = []
    for _ in range(n):
        choice = points[rng.integers(len(points))].copy()
        share = rng.uniform(0.05, 0.6)
        for group in range(len(choice)):
            if rng.random() < share:
                choice[group] = np.clip(choice[group] + rng.choice([-2, -1, -1, 1, 1, 2]), 0, table.values.shape[1] - 1)
        found.append(choice)
    return found


def check(problem: Network, cache: Path) -> None:
    """Held-out allocations, the tightest third of budgets, and 3 bits on the confirm split; `<problem>-check.json`."""
    space = problem.space
    table, n_before, _ = sensitivity(problem, "kl", cache)
    bits = space.storage_bits / space.numel
    rows = np.arange(len(bits))
    runs = [json.loads(file.read_text()) for file in sorted(cache.glob(f"{problem.name}-*-?.json"))]
    everything = np.array([(t["bits"], t["loss"]) for run in runs for t in run["trials"]])
    front = everything[non_dominated(everything)]
    ours = next(run for run in runs if run["run"] == OURS and run["seed"] == 0)["trials"][
        : 220 - n_before if n_before < 180 else 100
    ]
    trained = np.array([[int(c, 36) for c in t["code"]] for t in ours])
    surrogate = Surrogate(table.losses())
    log_losses = np.log(np.maximum([t["loss"] for t in ours], 1e-9))
    surrogate.choose_variances(trained, log_losses)
    surrogate.fit(trained, log_losses)

    held = {c.tobytes(): c for c in near_front(table, 400)}
    for choice in trained:
        held.pop(choice.tobytes(), None)
    held_out = np.array(list(held.values()))
    losses = np.array([problem.score(space.allocation(c)).loss for c in held_out])
    least = np.array([front[front[:, 1] <= loss, 0].min(initial=np.inf) for loss in losses])
    keep = bits[rows, held_out].sum(1) <= least + 1
    held_out, losses = held_out[keep], losses[keep]
    halves = np.array([split_half(problem, c) for c in held_out[: 40 if problem.name == "resnet20" else 200]])

    limits = np.linspace(bits.min(1).sum(), bits.max(1).sum(), 31)[1:]
    budgets = []
    for limit in limits:
        additive = problem.score(space.allocation(knapsack.solve(table.losses(), bits, limit * (1 + 1e-12)))).loss
        budgets.append((limit, min(t["loss"] for t in ours if t["bits"] <= limit * (1 + 1e-12)), additive))
    theirs = confirm_score(problem, knapsack.solve(table.losses(), bits, 3.0))
    confirmed, quality = [], problem.engine.quality
    for run in runs:
        if run["run"] in (OURS, AT_3_BITS) and run["seed"] == 0:
            best = min((t for t in run["trials"] if t["bits"] <= 3.0), key=lambda t: t["loss"])
            mine = confirm_score(problem, np.array([int(c, 36) for c in best["code"]]))
            ends = paired_interval(mine.qualities - theirs.qualities)
            low, high = (quality.score(theirs.qualities.mean() + end) - theirs.quality for end in ends)
            values = {"bits": best["bits"], "quality": mine.quality, "loss": mine.loss, "low": low, "high": high}
            confirmed.append({"run": run["run"], "search_loss": best["loss"], **values})
    result = {
        "trained_on": n_before + len(ours),
        "variances": surrogate.variances.tolist(),
        "measured": np.log(losses).tolist(),
        "additive": surrogate.additive(held_out).tolist(),
        "predicted": surrogate.predict(held_out)[0].tolist(),
        "deviation": surrogate.predict(held_out)[1].tolist(),
        "halves": halves.tolist(),
        "budgets": budgets,
        "confirm": {
            "quality": quality.name,
            "kind": quality.kind,
            "n": theirs.n_samples,
            "additive": theirs.quality,
            "additive_loss": theirs.loss,
            "ours": confirmed,
        },
    }
    (cache / f"{problem.name}-check.json").write_text(json.dumps(result))
    print(f"{problem.name}: {len(losses)} held out, confirm {result['confirm']}", flush=True)


def confirm_score(problem: Network, choice: np.ndarray) -> Score:
    """On the confirm split, with the quality of each sample."""
    with problem.engine.applied(problem.space.allocation(choice)) as model:
        return problem.engine.score_of(model, "confirm")


@torch.no_grad()
def split_half(problem: Network, choice: np.ndarray) -> tuple[float, float]:
    """The loss on the even and on the odd samples of the search split."""
    engine = problem.engine
    log_p = engine.float_logits("search").log_softmax(-1)
    with engine.applied(engine.space.allocation(choice)) as model:
        log_q = engine._logits(model, "search").log_softmax(-1)
    each = (log_p.exp() * (log_p - log_q)).sum(-1).double()
    return each[::2].mean().item(), each[1::2].mean().item()


def cost(n_groups: int) -> dict[str, float]:
    """Milliseconds of processor time that one proposal takes after 300 evaluations, and that Optuna takes to keep one trial."""
    problem = Synthetic(n_groups, bits=(1, 2, 3, 4, 5, 6, 7, 8))
    space, rng = problem.space, np.random.default_rng(0)
    table = SensitivityTable("kl", "nats", np.square(problem.amplitudes), space)
    sampler = Front(space, table, [Bytes().table(space)], [], 0)
    choices = np.clip(rng.normal(rng.uniform(1, 7, (300, 1)), 1.0, (300, n_groups)).round(), 0, 7).astype(np.intp)
    log_losses = np.log([problem.score(space.allocation(choice)).loss for choice in choices])
    history = History(choices, log_losses, sampler.sizes(choices), *np.zeros((2, 300), dtype=bool))
    proposing, keeping = [], []
    for _ in range(6):
        start = time.process_time()
        choice = sampler.propose(history, rng)
        proposing.append(1e3 * (time.process_time() - start))
        study = optuna.create_study(directions=["minimize"] * 2)
        study.enqueue_trial(dict(space.allocation(choice)))
        start = time.process_time()
        study.tell(study.ask(distributions(space.names, space.choices)), (0.0, 0.0))
        keeping.append(1e3 * (time.process_time() - start))
    medians = {"ms": float(np.median(proposing[1:])), "optuna_ms": float(np.median(keeping))}
    return {"groups": n_groups, "first_ms": proposing[0], **medians}


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "check", "cost", "page"])
    parser.add_argument("problem", nargs="?", choices=PROBLEMS)
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "bench_search")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--runs", nargs="*", default=list(RUNS))
    parser.add_argument("--total", type=int, help="evaluations, in place of what a run's own line says")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cache = arguments.cache
    if arguments.what == "page":
        write_page(cache, ROOT / "reports" / "bench_search", PROBLEMS, reference)
        return
    if arguments.what == "cost":
        (cache / "cost.json").write_text(json.dumps([cost(n) for n in (200, 10_000)]))
        return
    problem = PROBLEMS[arguments.problem](cache)
    if arguments.problem == "digits" and sum("-" not in code for code in problem.known) < 3**10:
        enumerate_digits(problem)  # type: ignore[arg-type]
    if arguments.what == "check":
        check(problem, cache)  # type: ignore[arg-type]
        return
    n_pairs = int(problem.space.allowed.sum())
    for seed in range(arguments.seeds):
        for name in arguments.runs:
            own = max(150, n_pairs + 100) if name in (OURS, AT_3_BITS) else RUNS[name].total
            run_one(problem, name, seed, arguments.total or own, cache)


if __name__ == "__main__":
    main()
