"""The public functions that continue a finished run: other budgets, other allocations, training, the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from mpsearch.allocation import Allocation
from mpsearch.budget import read_budgets
from mpsearch.costs.size import Bytes
from mpsearch.errors import InputError, run_option
from mpsearch.pipeline.confirm import confirm as confirm_front
from mpsearch.pipeline.finetune import summarized, train_point
from mpsearch.pipeline.goal import resolved_costs
from mpsearch.pipeline.pick import pick
from mpsearch.pipeline.prepare import Choice
from mpsearch.pipeline.refine import start_of_training
from mpsearch.pipeline.result import Point, Result, grown, verified
from mpsearch.pipeline.solve import best_within, cheapest_within, solution
from mpsearch.pipeline.workspace import reopened
from mpsearch.reporting.tables import evaluations_table
from mpsearch.runs.verified import Verified
from mpsearch.training.finetune import Training


def solve(result: Result, *, budget: Mapping[str, Any] | None = None, max_drop: float | None = None) -> Point:
    """Solve a finished run for another budget, or for the cheapest point within a drop in quality; measure and confirm it.

    Parameters
    ----------
    result : Result
        From `search`, or from `load_result` with the model and the task.
    budget : mapping, optional
        Cost -> limit, in addition to those of the run.
    max_drop : float, optional
        The largest drop in quality on the search split: 0.01 is a point of accuracy, or 1 % of a perplexity.

    Returns
    -------
    Point
        The point; its `result` holds all that was measured.

    Raises
    ------
    InputError
        Neither was given, or no allocation meets them.
    """
    run = result.run
    asked = {name: limit for name, limit in (budget or {}).items() if limit is not None}
    if max_drop is None and not asked:
        raise InputError("Nothing to solve for: got neither a budget nor max_drop. Give budget.bytes=100kB, or max_drop=0.01.")
    most = 1 if run.quality.kind == "share" else math.inf
    if max_drop is not None and (type(max_drop) not in (int, float) or not 0 <= max_drop < most):
        raise InputError(f"max_drop must be a number from 0 to {most}, 0.01 for a point of accuracy; got '{max_drop}'.")
    if not run.front:
        raise InputError(f"The run has no front to start from yet. Resume it: mpsearch search {run_option(result.folder)}.")
    costs = resolved_costs(result.costs, asked, [])
    budgets = read_budgets({**run.budgets, **asked}, costs, run.space)
    if budgets:
        solution(run.space, run.sensitivity.losses(), budgets)  # an infeasible budget is an error before a model is loaded
    workspace = result.workspace
    with reopened(workspace, run, costs) as evaluate:
        if max_drop is None:
            picked = best_within(evaluate.search, run.sensitivity, budgets, run.objectives)
        else:
            tables = (cost.table(run.space) for cost in costs.values() if cost.column in run.costs)
            objective = next((t for t in tables if t.column == run.objectives[0]), None) or Bytes().table(run.space)
            picked = cheapest_within(evaluate.search, run.sensitivity, budgets, objective, max_drop)
        run = replace(run, evaluations=tuple(evaluate.log))
        evaluate.refined(picked.allocation, picked.origin)  # also where a cost that is no objective was limited
        confirmed = confirm_front(evaluate.refined, run, n_points=0)
        new = grown(result, evaluate.log, workspace, confirmed)
        return Point(new, new.run.on("search")[picked.allocation])


def confirm(result: Result, allocations: Sequence[Mapping[str, str]]) -> pd.DataFrame:
    """Score allocations on the confirm split, packed, as the quantizer stores them, and record the evaluations with the run.

    Parameters
    ----------
    result : Result
        From `search`, or from `load_result` with the model and the task.
    allocations : sequence of mappings
        Group -> scheme name, for every group of the search space.

    Returns
    -------
    pandas.DataFrame
        A row for each allocation, columns as in `Result.evaluations`.
    """
    space = result.run.space
    for allocation in allocations:
        if set(allocation) != set(space.names) or not set(allocation.values()) <= set(space.schemes):
            raise InputError(
                f"An allocation must give each of the {len(space.names)} groups one of {', '.join(space.schemes)}; "
                f"got {dict(allocation)}."
            )
    with reopened(result.workspace, result.run, result.costs) as evaluate:
        rows = [evaluate.confirm(Allocation(allocation), "user") for allocation in allocations]
    return evaluations_table(replace(result.run, evaluations=tuple(rows)))


def finetune(
    result: Result | Point,
    *,
    epochs: int = 20,
    batches: int | None = None,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    loss: str = "kl",
    seed: int = 0,
    **limits: Any,
) -> Point:
    """Train a point as it is stored (quantization-aware training) and score it on both splits.

    Parameters
    ----------
    result : Result or Point
        A point, or a result of which `limits` pick one, as `Result.pick` does.
    epochs, batches, batch_size : int
        Epochs; batches of an epoch (`None`: all that the task has to train on); samples of a batch.
    learning_rate : float
        In units of a weight matrix's root mean square, and of a scale.
    loss : str
        "kl" (the divergence from the float model's outputs) or "cross_entropy" (the task's own loss).
    seed : int
        Of the order of the data.

    Returns
    -------
    Point
        Its `export` writes the trained weights; its `training` says how the training went.
    """
    training = Training(epochs, learning_rate, batch_size, batches, loss, seed)  # type: ignore[arg-type]
    point = result if isinstance(result, Point) else result.pick(**limits)
    source, allocation = point.result, point.allocation
    workspace = source.workspace
    with reopened(workspace, source.run, source.costs) as evaluate:
        before = start_of_training(evaluate.refined, allocation)
        trained, _, after = train_point(before, allocation, training, source.folder)
        new = grown(source, evaluate.log, workspace, source.confirmed)
        summary = summarized(trained, epochs, new.run.quality, before.qualities(allocation), after.qualities(allocation))
    return Point(new, new.run.finetuned("search")[allocation], summary)


def verify(result: Result | Point, *, exporter: Choice | None = None, **limits: Any) -> Verified:
    """Export a point, open the written file in its runtime, and measure it there on the confirm split.

    Parameters
    ----------
    result : Result or Point
        A point, or a result of which `limits` pick one, as `Result.pick` does; with the model and the task.
    exporter : str or Exporter, optional
        By default the one whose files the run's runtime opens.

    Returns
    -------
    Verified
        Loss and quality in the runtime, bytes of the files, and milliseconds compared with the float model in PyTorch and with
        our packed model. It is a row of `verified.csv`, and the report shows it.

    Raises
    ------
    InputError
        The runtime is not installed, the point cannot be exported, or the runtime does not run the file.
    """
    if isinstance(result, Point):
        return result.verify(exporter)
    return verified(result, pick(result.run, **limits), exporter, limits=limits)


def report(result: Result, **limits: Any) -> Path:
    """Write tables, figures and the page of a run; see `Result.report`."""
    return result.report(**limits)
