"""The samplers that `bench_search.py` compares, what each is given, and the file that each run leaves."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
from hydra.utils import instantiate
from omegaconf import OmegaConf
from rivals import RIVALS
from search_problems import Network, Problem, Synthetic

from mpsearch.budget import read_budgets
from mpsearch.costs.size import AverageBits
from mpsearch.evaluation import Evaluation, EvaluationLog, SensitivityTable
from mpsearch.metrics.base import SensitivityMetric
from mpsearch.metrics.fisher import Fisher
from mpsearch.metrics.gauss_newton import GaussNewton
from mpsearch.metrics.hawq import HAWQ
from mpsearch.metrics.kl import KL
from mpsearch.metrics.weight_mse import WeightMSE
from mpsearch.pipeline.evaluators import SearchEvaluator
from mpsearch.pipeline.search import search
from mpsearch.pipeline.sensitivity import measure_sensitivity
from mpsearch.samplers.base import Problem as SamplerProblem
from mpsearch.samplers.base import build_sampler

ROOT = Path(__file__).parent.parent
METRICS: dict[str, Callable[[], SensitivityMetric]] = {
    "gauss_newton": GaussNewton,
    "fisher": Fisher,
    "hawq": HAWQ,
    "weight_mse": WeightMSE,
}
OURS, ON_KL, ON_FISHER = "front (ours)", "front (ours) on KL", "front (ours) on Fisher"
METRIC_OF = {OURS: "gauss_newton", ON_KL: "kl", ON_FISHER: "fisher"}  # the first as it comes
AT_BITS = {bits: f"{OURS}, budget.bits={bits:g}" for bits in (2.25, 2.5, 3.0)}


class Run(NamedTuple):
    """A sampler as it is compared: `total` evaluations, the sensitivity's counted where it is used (`metric` kl)."""

    sampler: str
    metric: str | None
    n_seeds: int
    total: int
    bits: float | None = None


RUNS = {
    **{name: Run("front", metric, 20, 400) for name, metric in METRIC_OF.items()},
    **{name: Run("front", METRIC_OF[OURS], 20, 0, bits) for bits, name in AT_BITS.items()},
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
    "ILP on gauss_newton (values alone)": Run("ilp", "gauss_newton", 0, 400),
    "ILP on Fisher (ModelOpt)": Run("ilp", "fisher", 0, 400),
    "ILP on tr(H)·‖ΔW‖² (HAWQ)": Run("ilp", "hawq", 0, 400),
    "ILP on weight MSE": Run("ilp", "weight_mse", 0, 400),
    "greedy, AIMET's order": Run("greedy_accuracy", "kl", 0, 400),
    "greedy, gain per bit (exllamav3)": Run("greedy_gain", "kl", 0, 400),
    "NSGA-II, seeded, long": Run("nsga2", "kl", 50, 5000),
    "EvoPress, long": Run("evopress", None, 0, 5000),
}


def enough(problem: Problem) -> int:
    """The evaluations after which ours is compared with rivals after 400: as many as 20 groups' in 6 schemes, and 100 more."""
    if isinstance(problem, Synthetic):
        return int(problem.space.allowed.sum()) + 100
    return 150 if problem.name == "digits" else 220


def sensitivity(problem: Problem, metric: str, cache: Path) -> tuple[SensitivityTable, int, float]:
    """The table, the evaluations that it cost, and the seconds."""
    if metric == "kl":
        before = problem.seconds
        table = measure_sensitivity(problem, KL())  # type: ignore[arg-type]
        return table, int(problem.space.allowed.sum()), problem.seconds - before
    file = cache / f"{problem.name}-{metric}.npz"
    if not file.exists():
        assert isinstance(problem, Network)
        engine = problem.engine
        start = time.process_time()
        table = measure_sensitivity(engine, METRICS[metric]())
        effects = {} if table.effects is None else {"effects": table.effects}
        np.savez(file, values=table.values, seconds=time.process_time() - start, **effects)
    with np.load(file) as found:
        return (
            SensitivityTable(metric, "nats", found["values"], problem.space, effects=found.get("effects")),
            0,
            float(found["seconds"]),
        )


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
    start, evaluated, spent = time.process_time(), problem.seconds, problem.spent

    def record(evaluation: Evaluation) -> None:
        own = time.process_time() - start - (problem.spent - spent)
        if evaluation.trial is not None:
            code = "" if isinstance(problem, Synthetic) else problem.encode(evaluation.allocation)
            now = seconds + own + problem.seconds - evaluated
            rows.append({"code": code, "bits": evaluation.average_bits, "loss": evaluation.loss, "seconds": now, "own": own})

    make: Any = {"gp": optuna.samplers.GPSampler, **RIVALS}.get(run.sampler)
    if make is None:
        make = instantiate(OmegaConf.load(ROOT / "conf" / "sampler" / f"{run.sampler}.yaml"))
    budgets = read_budgets({"bits": run.bits}, {"bits": AverageBits()}, problem.space)
    sampler = build_sampler(make, SamplerProblem(table, budgets=budgets, seed=seed))
    evaluate = SearchEvaluator(problem, EvaluationLog(record=record), budgets)  # type: ignore[arg-type]
    search(evaluate, sampler, n_trials=total - n_before, n_seeds=run.n_seeds)
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


def runs_of(name: str, cache: Path) -> list[dict[str, Any]]:
    """All that was run on the problem of that name."""
    return [json.loads(file.read_text()) for file in sorted(cache.glob(f"{name}-*-?.json"))]
