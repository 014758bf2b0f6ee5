"""`mpsearch search`: measure, search, confirm, report."""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mpsearch.budget import read_budgets
from mpsearch.cli.commands.finetune import train_point
from mpsearch.cli.commands.hardware import latency_table
from mpsearch.cli.commands.sensitivity import measured_sensitivity
from mpsearch.cli.show import paths, summary
from mpsearch.costs.latency import LatencyMs
from mpsearch.costs.size import Bytes
from mpsearch.errors import InputError, run_option
from mpsearch.evaluation import SensitivityTable
from mpsearch.executors.base import Executor, at_least_one
from mpsearch.graph.channel_scaling import recorded
from mpsearch.graph.unsearched import sentence
from mpsearch.metrics.base import SensitivityMetric
from mpsearch.packed.agreement import check_verified
from mpsearch.pipeline.confirm import confirm
from mpsearch.pipeline.mirror import Mirror
from mpsearch.pipeline.pick import pick
from mpsearch.pipeline.prepare import Build, Prepared, Settings, engine_elsewhere, prepare
from mpsearch.pipeline.resume import check_resumed
from mpsearch.pipeline.search import Evaluator, check_sampler
from mpsearch.pipeline.search import search as run_search
from mpsearch.progress import phase, quiet
from mpsearch.quality import Quality
from mpsearch.reporting.report import write_report
from mpsearch.runs.run import Run, RunFolder
from mpsearch.samplers.base import complete
from mpsearch.tasks.base import Task
from mpsearch.training.finetune import Training, check_trainable

SIZES = ("size_bytes", "average_bits", "fraction")  # every evaluation has them


def search(settings: Settings, build: Build, folder: Path) -> None:
    """Measure, search, confirm, report; or resume an interrupted run. The caller holds the lock of the folder."""
    prepared = prepare(settings, build, recorded(folder))
    print(sentence(prepared.not_searched))
    space = prepared.space
    costs = {name: build(f"cost.{name}") for name in settings["cost"]}
    asked = settings["objective"]
    names = list(dict.fromkeys(map(str, asked if isinstance(asked, list) else [asked])))
    if not 1 <= len(names) <= 2 or not set(names) <= set(costs):
        raise InputError(f"The objective is one of this run's costs, or two in brackets: {', '.join(costs)}; '{asked}' came.")
    latency = costs.get(LatencyMs.name)
    if isinstance(latency, LatencyMs) and latency.path is None:
        costs[latency.name] = replace(latency, path=str(latency_table(prepared, latency.batch_size, folder)))
    budgets = read_budgets(settings["budget"], costs, space)
    tables = {name: cost.table(space) for name, cost in costs.items()}
    for name in names:
        if tables[name].peak:
            raise InputError(
                f"{name} is a peak and takes few values, so that it makes no front: limit it, budget.{name}=…, and keep "
                "another objective; --multirun tries several limits."
            )
    objectives = [Bytes().table(space) if tables[name].column in SIZES else tables[name] for name in names]
    if len({table.column for table in objectives}) < len(names):
        raise InputError(f"{' and '.join(names)} are the same cost in two units. Give one of them, or another cost beside it.")
    beside_size = [table for table in tables.values() if table.column not in SIZES]
    metric: SensitivityMetric = build("metric")
    make_sampler = build("sampler")
    nothing = SensitivityTable(metric.name, metric.unit_for(prepared.divergence), np.zeros(space.allowed.shape), space)
    check_sampler(complete(make_sampler, nothing, objectives, budgets, settings["seed"]), space, budgets)
    executor: Executor = build("executor")
    in_flight = settings["study"]["in_flight"]
    if in_flight is None and (folder / "space.json").exists():  # of a run whose config does not say it
        in_flight = RunFolder(folder).read_identity().get("trials", {}).get("in_flight")
    at_least_one("study.in_flight", in_flight)
    training = _training(settings, prepared)
    max_drop = _max_drop(settings["max_drop"], prepared.task)
    run = RunFolder(folder)
    with executor:
        engine = prepared.engine(settings, folder)
        elsewhere = functools.partial(
            engine_elsewhere, settings, build, prepared.model_sha256, folder.absolute(), prepared.equalization
        )
        executor.start(engine, elsewhere)
        identity = {
            **prepared.identity(settings),
            "metric": {
                **{"name": metric.name, "unit": metric.unit_for(prepared.divergence), "exact": metric.exact},
                **(asdict(metric) if is_dataclass(metric) else {}),
            },
            "trials": {"in_flight": in_flight},
            "budgets": {budget.table.name: budget.limit for budget in budgets},
            "objectives": [table.column for table in objectives],
            "max_drop": max_drop,
            "costs": [table.column for table in beside_size],
        }
        prepared.record(folder)
        run.identify(identity)
        quality = prepared.task.quality_name
        kind = Quality(quality, prepared.task.quality_kind)
        for table in ("sensitivity", "evaluations"):
            run.mend(table)
        known_sensitivity = run.read_sensitivity(space, metric.name)
        known = run.read_evaluations(space, kind, identity["costs"])
        check_resumed(engine, run, known)

        url, name = settings["study"]["mirror"], "/".join(folder.parts[-2:])  # the runs of a sweep are 0, 1, 2
        mirror = Mirror(url, name, space, identity["objectives"]) if url else None
        sensitivity = measured_sensitivity(engine, metric, run, known_sensitivity, executor)

        record = run.recorder(space, quality, identity["costs"])
        batch_size = latency.batch_size if isinstance(latency, LatencyMs) else 1
        evaluate = Evaluator(engine, budgets, record, known, beside_size, batch_size, executor)
        with mirror or contextlib.nullcontext():
            run_search(
                evaluate,
                sensitivity,
                complete(make_sampler, sensitivity, objectives, budgets, settings["seed"]),
                n_trials=settings["n_trials"],
                n_seeds=settings["n_seeds"],
                max_seconds=settings["max_seconds"],
                objectives=objectives,
                in_flight=in_flight,
                finished=mirror or (lambda trial, evaluation: None),
            )
        result = Run(
            space,
            quality,
            evaluate.evaluations,
            sensitivity,
            identity["budgets"],
            identity,
            identity["objectives"],
            identity["costs"],
        )
        if not result.front:
            raise InputError("No trial was run, so there is no front. Give n_trials above 0.")
        confirmed = confirm(evaluate, result)
        if training is not None:
            with phase("finetune", len(result.front)) as advance:
                for point in result.front:
                    with quiet():
                        _, trained, _ = train_point(evaluate, point.allocation, training, folder)
                    advance(f"{point.average_bits:.2f} bits: {result.quality.label} {result.quality.text(trained.quality)}")
        result = replace(result, evaluations=evaluate.evaluations)  # with those on the confirm split
        picked = pick(result)
        page = write_report(result, folder, picked, confirmed)
        summary(result, picked)
        paths(folder, page, "pareto.png", "front.csv")
        check_verified(result.on("confirm").values())
        print(f"export a point: mpsearch export {run_option(folder)} pick.point={picked.allocation.id}")


def _max_drop(asked: Any, task: Task) -> float:
    """The drop that counts as none: as it was asked for, else the task's own, else that of the quality's kind."""
    if asked is None:
        return Quality(task.quality_name, task.quality_kind).max_drop if task.max_drop is None else task.max_drop
    if isinstance(asked, bool) or not isinstance(asked, int | float) or not 0 <= asked < math.inf:
        raise InputError(f"max_drop must be a number of 0 or more, 0.01 for a point of accuracy; got '{asked}'.")
    return float(asked)


def _training(settings: Settings, prepared: Prepared) -> Training | None:
    """How the points of the front are trained before they are confirmed; `None`: not at all."""
    steps = settings.get("confirm", {}).get("finetune_steps")
    if steps is None:
        return None
    at_least_one("confirm.finetune_steps", steps)
    check_trainable(prepared.task, prepared.space.schemes.values())
    return Training.of_steps(steps, settings["seed"])
