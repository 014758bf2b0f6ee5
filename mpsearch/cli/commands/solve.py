"""`mpsearch solve`: another budget on a finished run."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from mpsearch.budget import read_budgets
from mpsearch.cli.commands.hardware import costs_of_run
from mpsearch.cli.show import paths, summary
from mpsearch.costs.activation_bytes import ActivationBytes
from mpsearch.costs.size import Bytes
from mpsearch.errors import InputError, run_option
from mpsearch.graph.channel_scaling import recorded
from mpsearch.pipeline.confirm import confirm
from mpsearch.pipeline.prepare import Build, Settings, build_schemes, prepare
from mpsearch.pipeline.resume import check_resumed
from mpsearch.pipeline.search import Evaluator
from mpsearch.pipeline.solve import best_within, cheapest_within, solution
from mpsearch.reporting.report import write_report
from mpsearch.runs.run import Run, RunFolder


def solve(settings: Settings, build: Build, folder: Path) -> None:
    """Another budget on a finished run, or the cheapest point within a drop: solved, measured, confirmed, reported."""
    if "n_trials" not in settings:
        raise InputError("This folder holds a sensitivity table alone; there is no run to solve. Run: mpsearch search.")
    max_drop, asked = settings.get("max_drop"), {k: v for k, v in settings["budget"].items() if v is not None}
    if max_drop is None and not asked:
        raise InputError("Nothing to solve for: got neither a budget nor max_drop. Give budget.bytes=100kB, or max_drop=0.01.")
    result = Run.load(folder, build_schemes(settings, build))
    most = 1 if result.quality.kind == "share" else float("inf")
    if max_drop is not None and (type(max_drop) not in (int, float) or not 0 <= max_drop < most):
        raise InputError(f"max_drop must be a number from 0 to {most}, 0.01 for a point of accuracy; got '{max_drop}'.")
    space, quality = result.space, result.quality_name
    if not result.front:
        raise InputError(f"The run has no front to start from yet. Let it go on: mpsearch search {run_option(folder)}.")
    costs, batch_size = costs_of_run(settings, build, folder)
    budgets = read_budgets({**result.budgets, **asked}, costs, space)
    own = read_budgets(result.budgets, costs, space)
    start = time.perf_counter()
    if budgets:
        solution(
            space, result.sensitivity.losses(), budgets
        )  # budgets that no allocation meets together are said before a model is loaded
        print(f"solved in {1e3 * (time.perf_counter() - start):.0f} ms")
    tables = [cost.table(space) for cost in costs.values() if cost.column in result.costs]
    objective = next((t for t in tables if t.column == result.objectives[0]), None) or Bytes().table(space)
    of_run = {name: cost for name, cost in settings["cost"].items() if name != ActivationBytes.name or name in result.costs}
    prepared = prepare({**settings, "cost": of_run}, build, recorded(folder))
    run = RunFolder(folder)
    with run.locked():
        run.identify(prepared.identity(settings))
        run.mend("evaluations")

        engine = prepared.engine(settings, folder)
        check_resumed(engine, run, result.evaluations)
        record = run.recorder(space, quality, result.costs)
        evaluate = Evaluator(engine, own, record, result.evaluations, tables, batch_size)
        if max_drop is None:
            picked = best_within(evaluate, result.sensitivity, budgets, result.objectives)
        else:
            picked = cheapest_within(evaluate, result.sensitivity, budgets, objective, max_drop)
        evaluate(picked.allocation, picked.origin, "confirm")  # also where another cost than the objective was limited
        confirmed = confirm(evaluate, replace(result, evaluations=evaluate.evaluations))
        result = replace(result, evaluations=evaluate.evaluations)
        page = write_report(result, folder, picked, confirmed)
        summary(result, picked)
        paths(folder, page, "pareto.png", "front.csv")
        print(f"export it: mpsearch export {run_option(folder)} pick.point={picked.allocation.id}")
