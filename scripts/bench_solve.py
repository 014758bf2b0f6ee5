"""`mpsearch solve` against the additive solution and the truth: the digits network, all of whose 59,049 allocations are known.

    python scripts/bench_solve.py            writes reports/bench_solve/

For 30 budgets, after runs of different lengths: the loss of the additive solution, of the best of it and all that was measured,
of what the surrogate predicts, and of what `solve` finds with both, each over the least loss there is within the budget.
Truths: reports/bench_search/digits.csv.gz. Also the seconds that `solve` takes before anything is measured.
"""

from __future__ import annotations

import argparse
import gzip
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pages import Row, machine, write
from search_problems import Network, Synthetic, digits_problem

from mpsearch.budget import read_budgets
from mpsearch.costs.size import AverageBits
from mpsearch.evaluation import EvaluationLog, SensitivityTable
from mpsearch.metrics.gauss_newton import GaussNewton
from mpsearch.pipeline.evaluators import SearchEvaluator
from mpsearch.pipeline.search import search
from mpsearch.pipeline.sensitivity import measure_sensitivity
from mpsearch.pipeline.solve import best_within, prediction, solution
from mpsearch.samplers.base import Problem
from mpsearch.samplers.front import Front

ROOT = Path(__file__).parent.parent
N_BUDGETS = 30
TRIALS = (25, 40, 60, 120)


def known(cache: Path) -> tuple[Network, np.ndarray, np.ndarray]:
    """The problem with every loss known; all choices [n, n_groups] and their losses [n]."""
    with gzip.open(ROOT / "reports" / "bench_search" / "digits.csv.gz", "rt") as stream:
        rows = [line.strip().split(",") for line in stream][1:]
    text = "".join(f"{code},{loss},0,0\n" for code, loss in rows)
    (cache / "digits.csv").write_text("allocation,loss,quality,seconds\n" + text)
    choices = np.array([list(code) for code, _ in rows]).astype(np.intp)
    return digits_problem(cache), choices, np.array([float(loss) for _, loss in rows])


def run(problem: Network, table: SensitivityTable, n_trials: int, seed: int) -> EvaluationLog:
    """A search without a budget."""
    evaluate = SearchEvaluator(problem)  # type: ignore[arg-type]
    return search(evaluate, Front(Problem(table, seed=seed)), n_trials=n_trials)


def compare(cache: Path, seed: int) -> list[dict[str, Any]]:
    """One row for each run and budget."""
    problem, choices, losses = known(cache)
    space = problem.space
    table = measure_sensitivity(problem.engine, GaussNewton())
    bits = space.storage_bits / space.numel
    whole = bits[np.arange(choices.shape[1]), choices].sum(1)
    rows = []
    for n_trials in TRIALS:
        recorded = run(problem, table, n_trials, seed)
        for limit in np.linspace(bits.min(1).sum(), bits.max(1).sum(), N_BUDGETS + 1)[1:]:
            budgets = read_budgets({"bits": limit}, {"bits": AverageBits()}, space)
            true = losses[whole <= limit * (1 + 1e-12)].min()
            within = [e.loss for e in recorded if e.origin != "float" and budgets[0].allows(space.choice(e.allocation))]
            additive = problem.score(solution(space, table.losses(), budgets)).loss
            evaluate = SearchEvaluator(problem, EvaluationLog(recorded))  # type: ignore[arg-type]
            solved = best_within(evaluate, table, budgets).loss
            found = {"additive": additive, "before": min([additive, *within]), "solve": solved}
            alone = problem.score(prediction(table, recorded[1:], budgets)).loss
            rows.append({"trials": n_trials, "bits": limit, "true": true, **found, "predicted": alone, "seed": seed})
    return rows


def seconds() -> dict[str, float]:
    """Of one `prediction` after 200 evaluations, at 20 groups of 6 schemes and at 200 of 8; processor time, median of 3."""
    result = {}
    for n, bits in ((20, (2, 3, 4, 5, 6, 8)), (200, tuple(range(1, 9)))):
        problem = Synthetic(n, bits=bits)
        space, rng = problem.space, np.random.default_rng(0)
        table = SensitivityTable("kl", "nats", np.square(problem.amplitudes), space, exact=True)
        evaluate = SearchEvaluator(problem)  # type: ignore[arg-type]
        last = len(bits) - 1
        for choice in np.clip(rng.normal(rng.uniform(0, last, (200, 1)), 1.0, (200, n)).round(), 0, last).astype(np.intp):
            evaluate(space.allocation(choice), "sampler")
        spent = []
        for limit in (3.0, 3.5, 4.0):
            budgets = read_budgets({"bits": limit}, {"bits": AverageBits()}, space)
            start = time.process_time()
            prediction(table, evaluate.log, budgets)
            spent.append(time.process_time() - start)
        result[f"{n} groups x {len(bits)} schemes"] = float(np.median(spent))
    return result


def page(rows: list[dict[str, Any]], spent: dict[str, float]) -> None:
    """table.md and rows.json."""
    lines = ["# bench_solve: solving a finished run for another budget", ""]
    lines += ["Written by `scripts/bench_solve.py`. " + " ".join((__doc__ or "").split("\n\n")[2].split()), ""]
    head = ["recorded trials", "runs", "additive solution", "best measured or additive", "predicted alone", "`solve`"]
    lines += ["Loss over the least possible: the median of the budgets, and how many hit the optimum itself.", ""]
    lines += ["| " + " | ".join(head) + " |", "|" + " ---: |" * len(head)]
    out: list[Row] = []
    for n in TRIALS:
        mine = [row for row in rows if row["trials"] == n]
        cells = [str(n), str(len({row["seed"] for row in mine}))]
        ratios = {}
        for what in ("additive", "before", "predicted", "solve"):
            ratio = ratios[what] = np.array([row[what] / row["true"] for row in mine])
            cells.append(f"{np.median(ratio):.3f} (mean {ratio.mean():.3f}, {100 * (ratio < 1 + 1e-6).mean():.0f} %)")
            out.append({"what": "loss over the least possible", "case": f"{what}, {n} trials", "value": float(ratio.mean())})
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| `prediction`, after 200 evaluations | seconds |", "| --- | ---: |"]
    lines += [f"| {what} | {value:.2f} |" for what, value in spent.items()]
    out += [{"what": "seconds of a prediction", "case": what, "value": value} for what, value in spent.items()]
    out.append(machine())
    write("bench_solve", [*lines, "", str(out[-1]["case"])], out)


def main() -> None:
    """Compare, time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        rows = [row for seed in range(arguments.seeds) for row in compare(Path(cache), seed)]
    page(rows, seconds())


if __name__ == "__main__":
    main()
