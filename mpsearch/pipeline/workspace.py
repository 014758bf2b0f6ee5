"""The model and the data of a run: what it takes to measure more of it, or to write its files, after the search."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from mpsearch.budget import read_budgets
from mpsearch.costs.base import Cost
from mpsearch.costs.latency import LatencyMs
from mpsearch.engine.engine import QuantEngine
from mpsearch.errors import InputError
from mpsearch.evaluation import EvaluationLog
from mpsearch.graph.channel_scaling import FILE, recorded
from mpsearch.pipeline.engine_options import EngineOptions
from mpsearch.pipeline.evaluators import ConfirmEvaluator, SearchEvaluator
from mpsearch.pipeline.prepare import Model, Plan, Prepared, prepare_planned
from mpsearch.pipeline.refine import Evaluators, RefiningEvaluator
from mpsearch.pipeline.resume import check_resumed
from mpsearch.quantizers.base import Quantizer
from mpsearch.refiners.base import Refiner
from mpsearch.registry import recorded as recorded_choice
from mpsearch.runs.run import Run, RunFolder
from mpsearch.runs.samples import SampleFiles
from mpsearch.tasks.base import Task


@dataclass(frozen=True)
class Workspace:
    """A prepared model, its engine, the folder of the run, and how its points are refined."""

    prepared: Prepared
    engine: QuantEngine
    folder: Path
    refiner: Refiner | None = None


@dataclass(frozen=True)
class Source:
    """What a finished run is opened with: a model, a task (`None`: without data), and choices that are not mpsearch's own."""

    model: Model
    task: Task | None
    quantizers: Mapping[str, Quantizer] | None = None
    options: EngineOptions | None = None
    seed: int = 0
    refiner: Refiner | None = None

    def open(self, run: Run, folder: Path) -> Workspace:
        """Prepare the model as the run recorded it; `InputError` where model or data are not those of the run."""
        assert self.task is not None
        record = run.identity
        options = replace(self.options or EngineOptions(), bias_correction=record["bias_correction"])
        plan = recorded_plan(run, folder, self.quantizers)
        about = {"seed": self.seed, "name": record["model_name"]}
        prepared = prepare_planned(self.model, self.task, plan, options, record["not_searched"], **about)
        RunFolder(folder).identify(prepared.identity)
        refiner = recorded_refiner(run, self.refiner)
        return Workspace(prepared, prepared.engine(folder), folder, refiner)


def recorded_plan(run: Run, folder: Path, quantizers: Mapping[str, Quantizer] | None) -> Plan:
    """The plan of a finished run; `quantizers` by scheme are needed where some are not mpsearch's own."""
    record, equalization = run.identity, recorded(folder)
    about = record.get("equalizer")
    if (about or {}).get("sha256") != (equalization and equalization.sha256):
        raise InputError(f"{folder / FILE} is not the file of this run. Restore it.")
    folds = tuple((layer, norm) for layer, norm in record["folded_batch_norms"])
    if quantizers is None:
        quantizers = {scheme: recorded_choice("quantizer", about) for scheme, about in record["quantizers"].items()}
    return Plan(record["model_sha256"], folds, equalization, about, run.space, {s: quantizers[s] for s in run.space.schemes})


def recorded_refiner(run: Run, refiner: Refiner | None = None) -> Refiner | None:
    """How points of a finished run are refined; a `refiner` is needed where that is not mpsearch's own."""
    about = run.identity.get("refiner")
    return None if about is None else refiner or recorded_choice("refiner", about)


def recorded_costs(run: Run, folder: Path, costs: Mapping[str, Cost] | None = None) -> dict[str, Cost]:
    """The costs of a finished run by name, and those that a new budget may name; latencies as the run's folder has them."""
    objects = dict(costs or {})
    for name, about in run.identity.get("cost_settings", {}).items():
        if name not in objects:
            objects[name] = recorded_choice("cost", about)
    latency = objects.get(LatencyMs.name)
    if isinstance(latency, LatencyMs) and latency.path is None and (folder / "latency.csv").exists():
        objects[LatencyMs.name] = replace(latency, path=str(folder / "latency.csv"))
    return objects


@contextmanager
def reopened(workspace: Workspace, run: Run, costs: Mapping[str, Cost]) -> Iterator[Evaluators]:
    """What measures more of a finished run, while its folder is locked; new evaluations are recorded there."""
    folder = RunFolder(workspace.folder)
    with folder.locked():
        folder.drop_incomplete_row("evaluations")
        check_resumed(workspace.engine, folder, run.evaluations)
        log = EvaluationLog(run.evaluations, folder.recorder(run.space, run.quality_name, run.costs))
        latency = costs.get(LatencyMs.name)
        batch_size = latency.batch_size if isinstance(latency, LatencyMs) else 1
        tables = [cost.table(run.space) for cost in costs.values() if cost.column in run.costs]
        budgets = read_budgets(run.budgets, costs, run.space)
        parts = workspace.engine, log, budgets, tables
        confirm = ConfirmEvaluator(*parts, batch_size, SampleFiles(workspace.folder))
        refined = confirm if workspace.refiner is None else RefiningEvaluator(confirm, workspace.refiner, workspace.folder)
        yield Evaluators(SearchEvaluator(*parts), confirm, refined)
