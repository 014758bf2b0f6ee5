"""`mpsearch finetune`: train a picked point as it is stored."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from mpsearch.budget import read_budgets
from mpsearch.commands.hardware import costs_of_run
from mpsearch.commands.prepare import Build, Settings, build_schemes, prepare
from mpsearch.commands.show import paths, relative, summary
from mpsearch.engine import paired_interval
from mpsearch.equalization import recorded
from mpsearch.errors import InputError
from mpsearch.evaluation import FINETUNED, Evaluation
from mpsearch.finetune import Training
from mpsearch.finetune import finetune as run_finetune
from mpsearch.pick import pick
from mpsearch.report import write_report
from mpsearch.result import SCORED, RunFolder, SearchResult, evaluation_row
from mpsearch.search import Evaluator


def finetune(settings: Settings, build: Build, folder: Path) -> None:
    """Train the picked point, or go on with that; score it on both splits, and draw it beside what it was."""
    if "n_trials" not in settings:
        raise InputError("This folder holds a sensitivity table alone; there is no point to train. Run: mpsearch search.")
    given: dict[str, Any] = {field.name: settings.get(field.name) for field in fields(Training)}
    training = Training(**given)
    result = SearchResult.load(folder, build_schemes(settings, build))
    picked = pick(result, **settings["pick"])
    allocation, space, quality = picked.allocation, result.space, result.quality_name
    costs, batch_size = costs_of_run(settings, build, folder)
    tables = [cost.table(space) for cost in costs.values() if cost.column in result.costs]
    prepared = prepare(settings, build, recorded(folder))
    run = RunFolder(folder)
    with run.locked():
        run.identify(prepared.identity(settings))
        run.mend("evaluations")
        engine = prepared.engine(settings)
        trained = run_finetune(engine, allocation, training, folder / "finetuned")
        found: list[Evaluation] = []

        def record(evaluation: Evaluation) -> None:
            found.append(replace(evaluation, seconds=trained.seconds) if evaluation.split == "search" else evaluation)
            run.append("evaluations", evaluation_row(found[-1], space, quality, result.costs))

        budgets = read_budgets(result.budgets, costs, space)
        before = Evaluator(engine, budgets, latency_batch_size=batch_size)
        after = Evaluator(trained.engine, budgets, record, (), tables, batch_size)
        for split in SCORED:
            after(allocation, FINETUNED, split)
        result = replace(result, evaluations=[*result.evaluations, *found])
        page = write_report(result, folder, picked)
    summary(result, picked)
    gains = after.qualities(allocation) - before.qualities(allocation)
    low, high = paired_interval(gains)
    was = result.quality.text(result.quality.score(float(before.qualities(allocation).mean(dtype="float64"))))
    gain, least, most = (result.quality.difference(result.quality.sign * x) for x in (float(gains.mean()), low, high))
    gain += f" ({least} to {most})" if result.quality.sign > 0 else f" ({most} to {least})"
    print(
        f"epoch {trained.epoch} of {training.epochs} is kept: KL on search {trained.losses[0]:.4g} -> {min(trained.losses):.4g}"
    )
    print(
        f"{result.quality.label} on confirm: {was} -> {result.quality.text(found[-1].quality)}, a gain of {gain} a sample "
        f"(paired 95 %), in {trained.seconds:.0f} s of training"
    )
    paths(folder, page, "pareto.png")
    print(f"export it: mpsearch export run={relative(folder)} pick.max_bytes={picked.size_bytes} finetuned=true")
