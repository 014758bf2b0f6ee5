"""The search's own sampler against its rivals: same problems, same quantized weights, same evaluations, counted alike.

    python scripts/bench_search.py run digits        every sampler on one problem; goes on where it was stopped
    python scripts/bench_search.py check digits      the surrogate on held-out allocations; the loss at equal bytes
    python scripts/bench_search.py confirm digits    ours and the additive optima on data that no search saw
    python scripts/bench_search.py fronts digits     whole fronts there
    python scripts/bench_search.py cost              what a proposal costs at 200 and at 10,000 groups
    python scripts/bench_search.py page              tables, figures and the page, from whatever was run: reports/bench_search/

Problems: digits (all 59,049 allocations known); resnet20, stories260k, minilm and efficientnet_lite0 (need $MPSEARCH_DATA);
synthetic1000, synthetic10000.
What was scored is kept in `--cache DIR` (default build/bench_search), for all samplers together.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import optuna
import torch
from search_checks import check, confirm, fronts
from search_page import write_page
from search_problems import (
    Problem,
    Synthetic,
    digits_problem,
    efficientnet_problem,
    enumerate_digits,
    minilm_problem,
    resnet20_problem,
    stories_problem,
)
from search_runs import ROOT, RUNS, enough, reference, run_one

from mpsearch.evaluation import SensitivityTable
from mpsearch.samplers.base import Problem as SamplerProblem
from mpsearch.samplers.front import Front
from mpsearch.samplers.optuna_sampler import distributions
from mpsearch.samplers.proposer import History

PROBLEMS: dict[str, Callable[[Path], Problem]] = {
    "digits": digits_problem,
    "resnet20": resnet20_problem,
    "resnet20_1000": lambda cache: resnet20_problem(cache, 1000),
    "resnet20_500_unseen": lambda cache: resnet20_problem(cache, 500, unseen=True),
    "stories260k": stories_problem,
    "minilm": minilm_problem,
    "efficientnet_lite0": efficientnet_problem,
    "synthetic1000": lambda cache: Synthetic(1000),
    "synthetic10000": lambda cache: Synthetic(10_000),
}


def cost(n_groups: int) -> dict[str, float]:
    """Milliseconds of processor time that one proposal takes after 300 evaluations, and that Optuna takes to keep one trial."""
    problem = Synthetic(n_groups, bits=(1, 2, 3, 4, 5, 6, 7, 8))
    space, rng = problem.space, np.random.default_rng(0)
    table = SensitivityTable("kl", "nats", np.square(problem.amplitudes), space, exact=True)
    sampler = Front(SamplerProblem(table))
    choices = np.clip(rng.normal(rng.uniform(1, 7, (300, 1)), 1.0, (300, n_groups)).round(), 0, 7).astype(np.intp)
    log_losses = np.log([problem.score(space.allocation(choice)).loss for choice in choices])
    history = History(choices, log_losses, sampler.sizes(choices), np.zeros(300, dtype=bool))
    proposing, keeping = [], []
    for _ in range(6):
        start = time.process_time()
        choice = sampler.choose(history, rng)
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
    parser.add_argument("what", choices=["run", "check", "confirm", "fronts", "cost", "page"])
    parser.add_argument("problem", nargs="?", choices=PROBLEMS)
    parser.add_argument("--cache", type=Path, default=ROOT / "build" / "bench_search")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
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
    if arguments.what in ("check", "confirm", "fronts"):
        {"check": check, "confirm": confirm, "fronts": fronts}[arguments.what](problem, cache)  # type: ignore[operator]
        return
    for seed in arguments.seeds:
        for name in arguments.runs:
            run = RUNS[name]
            total = max(run.total, enough(problem)) if run.metric or not run.total else run.total
            run_one(problem, name, seed, arguments.total or total, cache)


if __name__ == "__main__":
    main()
