"""`mpsearch finetune`: train a picked point as it is stored."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from mpsearch.allocation import Allocation
from mpsearch.budget import read_budgets
from mpsearch.cli.commands.hardware import costs_of_run
from mpsearch.cli.show import paths, summary
from mpsearch.errors import InputError, run_option
from mpsearch.evaluation import FINETUNED, Evaluation
from mpsearch.graph.channel_scaling import recorded
from mpsearch.packed.agreement import check_verified
from mpsearch.pipeline.pick import pick
from mpsearch.pipeline.prepare import Build, Settings, build_schemes, prepare
from mpsearch.pipeline.resume import check_resumed
from mpsearch.pipeline.search import Evaluator
from mpsearch.reporting.report import write_report
from mpsearch.runs.evaluation_rows import SCORED
from mpsearch.runs.run import Run, RunFolder
from mpsearch.training.finetune import Finetuned, Training
from mpsearch.training.finetune import finetune as run_finetune


def finetune(settings: Settings, build: Build, folder: Path) -> None:
    """Train the picked point, or go on with that; score it on both splits, and draw it beside what it was."""
    if "n_trials" not in settings:
        raise InputError("This folder holds a sensitivity table alone; there is no point to train. Run: mpsearch search.")
    given: dict[str, Any] = {field.name: settings.get(field.name) for field in fields(Training)}
    training = Training(**given)
    result = Run.load(folder, build_schemes(settings, build))
    picked = pick(result, **settings["pick"])
    allocation, space, quality = picked.allocation, result.space, result.quality_name
    costs, batch_size = costs_of_run(settings, build, folder)
    tables = [cost.table(space) for cost in costs.values() if cost.column in result.costs]
    prepared = prepare(settings, build, recorded(folder))
    run = RunFolder(folder)
    with run.locked():
        run.identify(prepared.identity(settings))
        run.mend("evaluations")
        engine = prepared.engine(settings, folder)
        check_resumed(engine, run, result.evaluations)
        record = run.recorder(space, quality, result.costs)
        budgets = read_budgets(result.budgets, costs, space)
        evaluate = Evaluator(engine, budgets, record, result.evaluations, tables, batch_size)
        trained, confirmed, after = train_point(evaluate, allocation, training, folder)
        result = replace(result, evaluations=evaluate.evaluations)
        page = write_report(result, folder, picked)
    summary(result, result.finetuned("search")[allocation], settings["pick"]["max_drop"])
    before = evaluate.qualities(allocation)
    was = result.quality.text(result.quality.score(float(before.mean(dtype="float64"))))
    drop, low, high = result.quality.paired_drop(after.qualities(allocation), before)
    gain, least, most = (result.quality.difference(-x) for x in (drop, high, low))
    print(
        f"epoch {trained.epoch} of {training.epochs} is kept: loss on search {trained.losses[0]:.4g} -> {min(trained.losses):.4g}"
    )
    print(
        f"{result.quality.label} on confirm: {was} -> {result.quality.text(confirmed.quality)}, a gain of "
        f"{gain}{result.quality.drop_unit} ({least} to {most}, paired 95 %), in {trained.seconds:.0f} s of training"
    )
    paths(folder, page, "pareto.png")
    check_verified([confirmed])
    print(f"export it: mpsearch export {run_option(folder)} pick.point={allocation.id} finetuned=true")


def train_point(
    evaluate: Evaluator, allocation: Allocation, training: Training, folder: Path
) -> tuple[Finetuned, Evaluation, Evaluator]:
    """Train an allocation of `evaluate`'s engine, or take up its checkpoint in the run's `folder`; add its two evaluations.

    Rows of the same training that are there already are not written again. Also returns the evaluation on the confirm split, and
    what evaluates the trained weights.
    """
    trained = run_finetune(evaluate.engine, allocation, training, folder / "finetuned")
    found: dict[str, Evaluation] = {}
    for e in evaluate.evaluations:
        if e.origin == FINETUNED and e.allocation == allocation:
            found = {e.split: e} if e.split == "search" else {**found, e.split: e}  # a new training begins on the search split
    if "search" in found and found["search"].loss != min(trained.losses):
        found = {}

    def record(evaluation: Evaluation) -> None:
        if evaluation.split == "search":
            evaluation = replace(evaluation, seconds=trained.seconds)
        found[evaluation.split] = evaluation
        evaluate.record(evaluation)
        evaluate.evaluations.append(evaluation)

    after = Evaluator(trained.engine, evaluate.budgets, record, (), evaluate.costs, evaluate.latency_batch_size)
    for split in SCORED:
        if split not in found:
            after(allocation, FINETUNED, split)
    return trained, found["confirm"], after
