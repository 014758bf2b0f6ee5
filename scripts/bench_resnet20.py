"""Three measurements on ResNet-20 and CIFAR-10, each written to `reports/bench_resnet20_<what>/`.

    python scripts/bench_resnet20.py overhead    what swapping an allocation in and out costs beside the forward passes
    python scripts/bench_resnet20.py metrics     how well each sensitivity metric ranks layers, and what it costs
    python scripts/bench_resnet20.py search      hypervolume of the seeded search against NSGA-II without seeds

The data are found in `$MPSEARCH_DATA/cifar10` (default `../shared/data/cifar10`). `--json FILE` writes the rows as JSON too.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optuna
import torch
from pages import REPORTS, Row, machine, write
from scipy.stats import kendalltau

from mpsearch.allocation import Allocation, SearchSpace
from mpsearch.engine.calibrate import calibrate
from mpsearch.engine.engine import FLOAT, QuantEngine, load_batches
from mpsearch.graph.fold import fold_batch_norms
from mpsearch.graph.trace import trace_layers
from mpsearch.graph.unsearched import other_bits
from mpsearch.metrics.fisher import Fisher
from mpsearch.metrics.gauss_newton import GaussNewton
from mpsearch.metrics.kl import KL
from mpsearch.metrics.sqnr import SQNR
from mpsearch.metrics.task_loss import TaskLoss
from mpsearch.metrics.weight_mse import WeightMSE
from mpsearch.models.resnet import resnet
from mpsearch.optimize.pareto import hypervolume, non_dominated
from mpsearch.pipeline.search import Evaluator, search
from mpsearch.pipeline.sensitivity import measure_sensitivity
from mpsearch.quantizers.clip_search import ClipSearch
from mpsearch.schemes.integer import Integer
from mpsearch.tasks.cifar10 import Cifar10

BITS = (2, 3, 4, 5, 6, 8)
DATA = Path(os.environ.get("MPSEARCH_DATA", "../shared/data")) / "cifar10"


def build_engine(seed: int = 0, n_search: int = 1000, batch_size: int = 250) -> QuantEngine:
    """ResNet-20, per-channel symmetric schemes of `BITS`, calibration and search data from the training images."""
    task = Cifar10(str(DATA), n_calibration=1000, n_search=n_search, seed=seed, batch_size=batch_size)
    model = resnet(20, str(DATA / "resnet20.safetensors")).eval()
    inputs = task.batches("calibration")[0][0]
    fold_batch_norms(model, task.forward, inputs)
    layers = trace_layers(model, task.forward, inputs)
    space = SearchSpace.build(layers, {f"w{b}": Integer(b) for b in BITS}, other_bits=other_bits(model, layers))
    moments = calibrate(model, task, layers, load_batches(task, "calibration", "cpu"))
    return QuantEngine(model, task, space, dict.fromkeys(space.schemes, ClipSearch()), moments)


def overhead() -> tuple[list[Row], list[str]]:
    """Medians of interleaved pairs: scoring an allocation, and the bare forward passes over the same batches."""
    engine = build_engine()
    rng = np.random.default_rng(0)
    engine.score(FLOAT)
    for layer in engine.space.layers:
        for scheme in engine.space.schemes:
            engine.swaps(layer.name, scheme)
    scored, bare, swapped = [], [], []
    for _ in range(30):
        allocation = engine.space.allocation(rng.integers(0, len(BITS), len(engine.space.groups)))
        start = time.perf_counter()
        engine.score(allocation)
        scored.append(time.perf_counter() - start)
        start = time.perf_counter()
        with torch.no_grad():
            torch.cat([engine.task.forward(engine.model, x) for x, _ in engine.batches("search")])
        bare.append(time.perf_counter() - start)
        start = time.perf_counter()
        with engine.applied(allocation):
            pass
        swapped.append(time.perf_counter() - start)
    # What a score does beside the forward passes is timed alone, where the passes' own noise does not hide it.
    logits = engine.float_logits("search")
    compared = []
    for _ in range(30):
        start = time.perf_counter()
        engine._compare(logits + 0.1, logits, "search")
        compared.append(time.perf_counter() - start)
    rows: list[Row] = [
        {"what": "overhead", "case": "score one allocation, 1,000 images", "value": 1e3 * np.median(scored), "unit": "ms"},
        {"what": "overhead", "case": "bare forward passes", "value": 1e3 * np.median(bare), "unit": "ms"},
        {"what": "overhead", "case": "swap in and out", "value": 1e3 * np.median(swapped), "unit": "ms"},
        {"what": "overhead", "case": "compare logits, interval included", "value": 1e3 * np.median(compared), "unit": "ms"},
    ]
    total = 1e3 * (np.median(swapped) + np.median(compared))
    rows.append({"what": "overhead", "case": "overhead: swap + compare", "value": total, "unit": "ms"})
    return rows, []


def metrics() -> tuple[list[Row], list[str]]:
    """Kendall tau of each metric's 120 values with the measured KL, beside the KL's own on other images; and its seconds."""
    engine, other = build_engine(seed=0), build_engine(seed=1)
    kl, _ = _timed(lambda: measure_sensitivity(engine, KL()).values)
    rows: list[Row] = []
    for name, metric, where in (
        ("measured KL", KL(), build_engine(seed=0)),
        ("measured KL, other images", KL(), other),
        ("measured task loss", TaskLoss(), build_engine(seed=0)),
        ("output SQNR", SQNR(), build_engine(seed=0)),
        ("gauss_newton", GaussNewton(), build_engine(seed=0)),
        ("diagonal Fisher", Fisher(), build_engine(seed=0)),
        ("weight MSE", WeightMSE(), build_engine(seed=0)),
    ):
        for layer in where.space.layers:  # quantizing is no part of what a metric costs
            for scheme in where.space.schemes:
                where.swaps(layer.name, scheme)
        values, seconds = _timed(lambda metric=metric, where=where: measure_sensitivity(where, metric).values)
        within = [kendalltau(kl[:, j], values[:, j]).statistic for j in range(len(BITS))]
        rows.append({"what": "tau, all 120", "case": name, "value": float(kendalltau(kl, values).statistic), "unit": "tau"})
        rows.append({"what": "tau, layers within a width (mean)", "case": name, "value": float(np.mean(within)), "unit": "tau"})
        rows.append({"what": "cost", "case": name, "value": seconds, "unit": "s"})
    notes = [
        "Reference: measured KL on 1,000 search images, which gauss_newton sees too; Fisher uses 1,000 calibration images. "
        "One thread, 2 cores."
    ]
    return rows, notes


def search_benchmark() -> tuple[list[Row], list[str]]:
    """Hypervolume against the number of trials: seeded (after 120 sensitivity measurements), and NSGA-II from nothing."""
    engine = build_engine()
    space = engine.space
    sensitivity = measure_sensitivity(engine, KL())
    curves: dict[str, list[float]] = {}
    seeds, trials = (0, 1), 400
    uniform = {b: engine.score(space.uniform(f"w{b}")).loss for b in (2, 8)}
    bits = space.storage_bits / space.numel
    reference = (bits[:, -1].sum(), uniform[2])

    def volume(points: list[tuple[float, float]]) -> float:
        found = np.array(points)
        front = found[non_dominated(found)]
        return hypervolume(front[:, 0], front[:, 1], *reference)

    for seed in seeds:
        evaluate = Evaluator(engine, [])
        search(evaluate, sensitivity, optuna.samplers.NSGAIISampler(seed=seed, population_size=50), n_trials=200, n_seeds=50)
        points = [(e.average_bits, e.loss) for e in evaluate.evaluations if e.trial is not None]
        curves[f"seeded by the knapsack, then NSGA-II (seed {seed})"] = [volume(points[: n + 1]) for n in range(len(points))]
        study = optuna.create_study(
            directions=["minimize"] * 2, sampler=optuna.samplers.NSGAIISampler(seed=seed, population_size=50)
        )
        points = []
        for _ in range(trials):
            trial = study.ask()
            allocation = Allocation({name: trial.suggest_categorical(name, list(space.schemes)) for name in space.names})
            score = engine.score(allocation)
            points.append((float(bits[np.arange(len(bits)), space.choice(allocation)].sum()), score.loss))
            study.tell(trial, (points[-1][0], float(np.log10(max(score.loss, 1e-9)))))
        curves[f"NSGA-II without seeds (seed {seed})"] = [volume(points[: n + 1]) for n in range(len(points))]

    rows: list[Row] = []
    for name, curve in curves.items():
        for n in (50, 100, 200, 400):
            if n <= len(curve):
                rows.append({"what": "hypervolume", "case": f"{name}, {n} trials", "value": curve[n - 1], "unit": "bits x log10"})
    for seed in seeds:
        ours, theirs = (
            curves[name.format(seed)]
            for name in ("seeded by the knapsack, then NSGA-II (seed {})", "NSGA-II without seeds (seed {})")
        )
        rows.append(
            {
                "what": "hypervolume",
                "case": f"50 seeded trials against 400 without, seed {seed}",
                "value": ours[49],
                "unit": "bits x log10",
                "rival": "NSGA-II without seeds",
                "rival_value": theirs[-1],
                "ratio": ours[49] / theirs[-1],
            }
        )
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, curve in curves.items():
        axes.plot(range(1, len(curve) + 1), curve, label=name, ls="-" if name.startswith("seeded") else "--")
    axes.set(xlabel="trials", ylabel="hypervolume (average bits x log10 KL)", title="ResNet-20: seeded against unseeded search")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    folder = REPORTS / "bench_resnet20_search"
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "hypervolume.png", dpi=130)
    notes = [
        "The seeded search has spent 120 sensitivity measurements (one pass over the search split each) before its first trial.",
        f"Reference point: {reference[0]:.4f} bits (uniform 8 bits), KL {reference[1]:.4f} (uniform 2 bits).",
        "",
        "![hypervolume](hypervolume.png)",
    ]
    return rows, notes


def _timed(call: Callable[[], np.ndarray]) -> tuple[np.ndarray, float]:
    start = time.perf_counter()
    return call(), time.perf_counter() - start


def main() -> None:
    """Measure, print the table, and write it to the report folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["overhead", "metrics", "search"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows, notes = {"overhead": overhead, "metrics": metrics, "search": search_benchmark}[arguments.what]()
    rows.append(machine())
    lines = ["| what | case | value | unit | rival | ratio |", "| --- | --- | ---: | --- | --- | ---: |"]
    for row in rows:
        value = f"{row['value']:.4g}" if isinstance(row["value"], float) else row["value"]
        rival = f"{row['rival']}: {row['rival_value']:.4g}" if "rival" in row else ""
        ratio = f"{row['ratio']:.2f}" if "ratio" in row else ""
        lines.append(f"| {row['what']} | {row['case']} | {value} | {row['unit']} | {rival} | {ratio} |")
    page = [f"# bench_resnet20 {arguments.what}", "", *lines, "", *notes]
    write(f"bench_resnet20_{arguments.what}", page, rows, arguments.json)


if __name__ == "__main__":
    main()
