"""The story of each command, told with objects: what the front door composed comes in as `settings` and `build`.

Everything that a user may have got wrong is checked before anything is measured.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from mpsearch.allocation import SearchSpace
from mpsearch.budget import read_budgets
from mpsearch.calibrate import calibrate
from mpsearch.confirm import confirm
from mpsearch.costs.size import parse_bytes
from mpsearch.engine import QuantEngine, load_batches, other_bits
from mpsearch.errors import InputError
from mpsearch.evaluation import Evaluation, SensitivityTable
from mpsearch.exporters.base import Picked
from mpsearch.fold import fold_batch_norms
from mpsearch.layer import check_finite, weights_sha256
from mpsearch.metrics.base import SensitivityMetric
from mpsearch.pick import pick
from mpsearch.quantizers.base import Quantizer
from mpsearch.report import SUMMARY_HEADER, draw_sensitivity, summary_rows, write_report
from mpsearch.result import SCORED, RunFolder, SearchResult, evaluation_row
from mpsearch.samplers.base import seeded
from mpsearch.search import Evaluator, check_sampler
from mpsearch.search import search as run_search
from mpsearch.sensitivity import measure_sensitivity
from mpsearch.tasks.base import SPLITS, Batch, Task
from mpsearch.trace import trace_layers

FILE_WIDTH = 120

Settings = Mapping[str, Any]
Build = Callable[..., Any]


@dataclass(frozen=True)
class Prepared:
    """The float model ready to be quantized, and what it was before it was folded."""

    model: nn.Module
    task: Task
    space: SearchSpace
    quantizers: Mapping[str, Quantizer]
    model_sha256: str
    folds: tuple[tuple[str, str], ...]
    calibration: Sequence[Batch]

    def identity(self, settings: Settings) -> dict[str, Any]:
        """What a run folder is known by; it is not gone on with under another one."""
        return {
            "space": self.space.to_dict(),
            "quality_name": self.task.quality_name,
            "model_name": _short(settings["model"]),
            "task_name": type(self.task).__name__,
            "model_sha256": self.model_sha256,
            "data_sha256": self.task.fingerprint(),
            "data": {split: self.task.describe(split) for split in SPLITS},
            "quantizers": {name: _fields(quantizer) for name, quantizer in self.quantizers.items()},
            "folded_batch_norms": [list(pair) for pair in self.folds],
            "bias_correction": settings["bias_correction"],
        }

    def engine(self, settings: Settings) -> QuantEngine:
        """Calibrate, and set up the engine."""
        return QuantEngine(
            self.model,
            self.task,
            self.space,
            self.quantizers,
            calibrate(self.model, self.task, self.space.layers, self.calibration),
            bias_correction=settings["bias_correction"],
            bank_max_bytes=parse_bytes(settings["bank_max_bytes"]),
            device=settings["device"],
        )


def prepare(settings: Settings, build: Build) -> Prepared:
    """Build task, model, schemes and quantizers; find the layers. Raises `InputError` for what cannot be searched."""
    device = _device(settings["device"])
    torch.manual_seed(settings["seed"])
    # TF32 keeps 10 bits of a product: that is more error than an 8-bit weight makes.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    schemes = _schemes(settings, build)
    quantizer = build("quantizer")
    quantizers = {name: build(f"quantizer_of.{name}") if name in settings["quantizer_of"] else quantizer for name in schemes}
    task = build("task")
    if not isinstance(task, Task):
        raise InputError(f"The task is a {type(task).__name__}; it must be a subclass of mpsearch.Task.")
    model = build("model")
    if not isinstance(model, nn.Module):
        raise InputError(f"The model is a {type(model).__name__}; it must be (a function that returns) a torch.nn.Module.")
    model.eval().requires_grad_(True)
    for name, parameter in model.named_parameters():
        check_finite(name, parameter.detach())
    sha256 = weights_sha256(model)
    model.to(device)
    calibration = load_batches(task, "calibration", device)
    inputs, targets = calibration[0]
    try:
        with torch.no_grad():
            logits = task.forward(model, inputs)
            _check_output(logits)
            qualities = task.quality(logits, targets)
            task.cross_entropy(logits, targets)
    except InputError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise InputError(f"The model, its input and its targets do not fit together ({what}). Check shapes and types.") from error
    _check_qualities(qualities, len(logits))
    _check_targets(task, logits.shape[1])
    folds = fold_batch_norms(model, task.forward, inputs) if settings["fold_batch_norms"] else ()
    layers = trace_layers(model, task.forward, inputs)
    space = SearchSpace.build(layers, schemes, settings.get("pin") or (), other_bits(model, layers))
    return Prepared(model, task, space, quantizers, sha256, tuple(folds), calibration)


def search(settings: Settings, build: Build, folder: Path) -> None:
    """Measure, search, confirm, report; or go on where an interrupted run stopped."""
    prepared = prepare(settings, build)
    space = prepared.space
    costs = {name: build(f"cost.{name}") for name in settings["cost"]}
    budgets = read_budgets(settings["budget"], costs, space)
    sampler = seeded(build("sampler"), settings["seed"])
    check_sampler(sampler, space, budgets)
    metric: SensitivityMetric = build("metric")
    run = RunFolder(folder)
    with run.locked():
        identity = {
            **prepared.identity(settings),
            "metric": {"name": metric.name, "unit": metric.unit},
            "budgets": {budget.table.name: budget.limit for budget in budgets},
        }
        run.identify(identity)
        quality = prepared.task.quality_name
        for table in ("sensitivity", "evaluations"):
            run.mend(table)
        known_sensitivity = run.read_sensitivity(space, metric.name)
        known = run.read_evaluations(space, quality)

        engine = prepared.engine(settings)
        sensitivity = _sensitivity(engine, metric, run, known_sensitivity)

        def record(evaluation: Evaluation) -> None:
            run.append("evaluations", evaluation_row(evaluation, space, quality))

        evaluate = Evaluator(engine, budgets, record, known)
        run_search(
            evaluate,
            sensitivity,
            sampler,
            n_trials=settings["n_trials"],
            n_seeds=settings["n_seeds"],
            max_seconds=settings["max_seconds"],
        )
        # Its evaluations are the evaluator's own list: confirmation adds to it what the report draws.
        result = SearchResult(space, quality, evaluate.evaluations, sensitivity, identity["budgets"], identity)
        if not result.front:
            raise InputError("No trial was run, so there is no front. Give n_trials above 0.")
        confirmed = confirm(evaluate, result)
        picked = pick(result)
        page = write_report(result, folder, picked, confirmed)
        _summary(result, picked)
        _paths(folder, page, "pareto.png", "front.csv")
        print(f"export a point: mpsearch export run={_relative(folder)} pick.max_bytes={picked.size_bytes}")


def sensitivity(settings: Settings, build: Build, folder: Path) -> None:
    """The sensitivity table and its chart, and nothing else."""
    prepared = prepare(settings, build)
    metric: SensitivityMetric = build("metric")
    run = RunFolder(folder)
    with run.locked():
        run.identify({**prepared.identity(settings), "metric": {"name": metric.name, "unit": metric.unit}})
        table = _sensitivity(prepared.engine(settings), metric, run, {})
    draw_sensitivity(table, folder)
    space = prepared.space
    shown = Table(title=f"{metric.name} ({metric.unit}) of each layer alone")
    for column in ("layer", *space.scheme_names):
        shown.add_column(column, justify="left" if column == "layer" else "right")
    for name, values in zip(space.names, table.values, strict=True):
        shown.add_row(name, *(f"{value:.3g}" for value in values))
    _stdout().print(shown)
    _paths(folder, folder / "sensitivity.csv", "sensitivity.png")


def report(settings: Settings, build: Build, folder: Path) -> None:
    """Draw the tables, figures and page again from what lies in the folder."""
    if "n_trials" not in settings:
        raise InputError(
            "This folder holds a sensitivity table alone; there is no front to report. Its chart is sensitivity.png."
        )
    result = SearchResult.load(folder, _schemes(settings, build))
    picked = pick(result)
    page = write_report(result, folder, picked)
    _summary(result, picked)
    _paths(folder, page, "pareto.png", "front.csv")


def export(settings: Settings, build: Build, folder: Path) -> None:
    """Write the picked point; the path of what was written is the last line printed."""
    if "n_trials" not in settings:
        raise InputError("This folder holds a sensitivity table alone; there is no point to export. Run: mpsearch search.")
    result = SearchResult.load(folder, _schemes(settings, build))
    picked = pick(result, **settings["pick"])
    exporter = build("exporter")
    prepared = prepare(settings, build)
    RunFolder(folder).identify(prepared.identity(settings))
    scores = {split: e for split in SCORED if (e := result.on(split).get(picked.allocation)) is not None}
    what = Picked(picked, scores, result.baselines, result.quality_name, prepared.model_sha256, prepared.folds)
    path = exporter.export(what, prepared.engine(settings), folder)
    write_report(result, folder, picked)
    _summary(result, picked)
    print(_relative(path))


def _sensitivity(
    engine: QuantEngine, metric: SensitivityMetric, run: RunFolder, known: Mapping[tuple[str, str], float]
) -> SensitivityTable:
    """Measured, every new row on disk before the next begins."""
    space = engine.space
    bits = {(g, s): int(space.storage_bits[i, j]) for i, g in enumerate(space.names) for j, s in enumerate(space.scheme_names)}

    def record(group: str, scheme: str, value: float) -> None:
        row = {"group": group, "scheme": scheme, "metric": metric.name, "value": value, "size_bits": bits[group, scheme]}
        run.append("sensitivity", row)

    return measure_sensitivity(engine, metric, known, record)


def _schemes(settings: Settings, build: Build) -> dict[str, Any]:
    return {name: build(f"scheme.{name}") for name in settings["scheme"] or {}}


def _summary(result: SearchResult, picked: Evaluation) -> None:
    table = Table(title=f"{len(result.front)} points on the front")
    for i, column in enumerate(SUMMARY_HEADER):
        table.add_column(column.format(q=result.quality_name), justify="right" if i else "left")
    for row in summary_rows(result, picked):
        table.add_row(*row)
    _stdout().print(table)


def _stdout() -> Console:
    """Tables keep their width in a file or a pipe, where nobody knows how wide a line may be."""
    return Console(width=None if sys.stdout.isatty() else FILE_WIDTH)


def _paths(folder: Path, page: Path, *names: str) -> None:
    for path in (page, *(folder / name for name in names)):
        print(_relative(path))


def _relative(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _device(name: str) -> str:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"There is no device '{name}' here ({reason}). Use device=cpu, or device=cuda where a GPU answers."
        ) from None
    return name


def _check_output(logits: Any) -> None:
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
        came = f"shape {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else f"a {type(logits).__name__}"
        raise InputError(
            f"The model's output must be logits [samples, classes]; {came} came. Override the task's forward to give them."
        )


def _check_qualities(qualities: torch.Tensor, n: int) -> None:
    if qualities.shape != (n,) or not ((qualities >= 0) & (qualities <= 1)).all():
        raise InputError(
            f"The task's quality must be [{n}] numbers from 0 to 1, one a sample; shape {tuple(qualities.shape)} came, from "
            f"{float(qualities.min()):g} to {float(qualities.max()):g}."
        )


def _check_targets(task: Task, n_classes: int) -> None:
    for split in SPLITS:
        for _, targets in load_batches(task, split, "cpu"):
            if not targets.numel() or targets.is_floating_point():
                continue
            low, high = int(targets.min()), int(targets.max())
            if low < 0 or high >= n_classes:
                raise InputError(
                    f"Labels of the {split} split run from {low} to {high}; the model has {n_classes} outputs: they must "
                    f"lie in 0..{n_classes - 1}."
                )


def _short(node: Mapping[str, Any]) -> str:
    """A model in the words of its config: the last part of its target, and its whole numbers: "resnet depth=20"."""
    words = [f"{key}={value}" for key, value in node.items() if isinstance(value, int) and not isinstance(value, bool)]
    return " ".join([str(node.get("_target_", "?")).rpartition(".")[2], *words])


def _fields(quantizer: Quantizer) -> dict[str, Any]:
    return {"class": type(quantizer).__name__, **(asdict(quantizer) if is_dataclass(quantizer) else {})}
