"""The story of each command, told with objects: what the front door composed comes in as `settings` and `build`.

Everything that a user may have got wrong is checked before anything is measured.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from mpsearch.allocation import SearchSpace
from mpsearch.budget import read_budgets
from mpsearch.calibrate import calibrate
from mpsearch.confirm import confirm
from mpsearch.costs.latency import FLOAT, REST, Latency, LatencyMs, read_latency, write_latency
from mpsearch.costs.size import Bytes, parse_bytes
from mpsearch.engine import QuantEngine, load_batches, other_bits
from mpsearch.errors import InputError
from mpsearch.evaluation import Evaluation, SensitivityTable
from mpsearch.exporters.base import Picked
from mpsearch.fold import fold_batch_norms
from mpsearch.group import share
from mpsearch.hardware import facts, first_samples, measure_latency, self_test
from mpsearch.layer import check_finite, weights_sha256
from mpsearch.metrics.base import SensitivityMetric
from mpsearch.pick import pick
from mpsearch.quantizers.base import Quantizer
from mpsearch.report import SUMMARY_HEADER, draw_latency, draw_sensitivity, summary_rows, write_report
from mpsearch.result import SCORED, RunFolder, SearchResult, evaluation_row
from mpsearch.runtimes.base import Runtime
from mpsearch.runtimes.native import Native
from mpsearch.samplers.base import complete
from mpsearch.search import Evaluator, check_sampler
from mpsearch.search import search as run_search
from mpsearch.sensitivity import measure_sensitivity
from mpsearch.solve import best_within, cheapest_within, solution
from mpsearch.tasks.base import SPLITS, Batch, Task
from mpsearch.trace import batch_length, trace_layers

FILE_WIDTH = 120
LATENCY_SECONDS = 10.0  # spent on a latency table that a search needs
SIZES = ("size_bytes", "average_bits", "fraction")  # every evaluation has them

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
    runtime: Runtime = build("runtime") if settings.get("runtime") else Native()
    layers = share(trace_layers(model, task.forward, inputs), runtime.shared, required=False)
    layers = share(layers, settings.get("share") or ())
    space = SearchSpace.build(layers, schemes, settings.get("pin") or (), other_bits(model, layers), runtime)
    if dropped := [name for name in schemes if name not in space.schemes]:
        print(f"not searched, as no layer may take it: {', '.join(dropped)}")
    quantizers = {name: quantizers[name] for name in space.schemes}
    return Prepared(model, task, space, quantizers, sha256, tuple(folds), calibration)


def search(settings: Settings, build: Build, folder: Path) -> None:
    """Measure, search, confirm, report; or go on where an interrupted run stopped."""
    prepared = prepare(settings, build)
    space = prepared.space
    costs = {name: build(f"cost.{name}") for name in settings["cost"]}
    objective = settings["objective"]
    if objective not in costs:
        raise InputError(f"The objective is one of this run's costs: {', '.join(costs)}; '{objective}' came.")
    latency = costs.get(LatencyMs.name)
    if isinstance(latency, LatencyMs) and latency.path is None:
        costs[latency.name] = replace(latency, path=str(_latency_table(prepared, latency.batch_size, folder)))
    budgets = read_budgets(settings["budget"], costs, space)
    tables = {name: cost.table(space) for name, cost in costs.items()}
    beside_size = [table for table in tables.values() if table.column not in SIZES]
    metric: SensitivityMetric = build("metric")
    make_sampler = build("sampler")
    nothing = SensitivityTable(metric.name, metric.unit, np.zeros(space.allowed.shape), space)
    check_sampler(complete(make_sampler, nothing, [tables[objective]], budgets, settings["seed"]), space, budgets)
    run = RunFolder(folder)
    with run.locked():
        identity = {
            **prepared.identity(settings),
            "metric": {"name": metric.name, "unit": metric.unit},
            "budgets": {budget.table.name: budget.limit for budget in budgets},
            "objective": tables[objective].column if tables[objective].column not in SIZES else "size_bytes",
            "costs": [table.column for table in beside_size],
        }
        run.identify(identity)
        quality = prepared.task.quality_name
        for table in ("sensitivity", "evaluations"):
            run.mend(table)
        known_sensitivity = run.read_sensitivity(space, metric.name)
        known = run.read_evaluations(space, quality, identity["costs"])

        engine = prepared.engine(settings)
        sensitivity = _sensitivity(engine, metric, run, known_sensitivity)

        def record(evaluation: Evaluation) -> None:
            run.append("evaluations", evaluation_row(evaluation, space, quality, identity["costs"]))

        batch_size = latency.batch_size if isinstance(latency, LatencyMs) else 1
        evaluate = Evaluator(engine, budgets, record, known, beside_size, batch_size)
        run_search(
            evaluate,
            sensitivity,
            complete(make_sampler, sensitivity, [tables[objective]], budgets, settings["seed"]),
            n_trials=settings["n_trials"],
            n_seeds=settings["n_seeds"],
            max_seconds=settings["max_seconds"],
            objective=None if tables[objective].column in SIZES else tables[objective],
        )
        # Its evaluations are the evaluator's own list: confirmation adds to it what the report draws.
        result = SearchResult(
            space,
            quality,
            evaluate.evaluations,
            sensitivity,
            identity["budgets"],
            identity,
            identity["objective"],
            identity["costs"],
        )
        if not result.front:
            raise InputError("No trial was run, so there is no front. Give n_trials above 0.")
        confirmed = confirm(evaluate, result)
        picked = pick(result)
        page = write_report(result, folder, picked, confirmed)
        _summary(result, picked)
        _paths(folder, page, "pareto.png", "front.csv")
        print(f"export a point: mpsearch export run={_relative(folder)} pick.max_bytes={picked.size_bytes}")


def solve(settings: Settings, build: Build, folder: Path) -> None:
    """Another budget on a finished run, or the cheapest point within a drop: solved, measured, confirmed, reported."""
    if "n_trials" not in settings:
        raise InputError("This folder holds a sensitivity table alone; there is no run to solve. Run: mpsearch search.")
    max_drop, asked = settings.get("max_drop"), {k: v for k, v in settings["budget"].items() if v is not None}
    if max_drop is None and not asked:
        raise InputError("Nothing to solve for came. Give a budget, as budget.bytes=100kB, or max_drop=0.01.")
    if max_drop is not None and (type(max_drop) not in (int, float) or not 0 <= max_drop < 1):
        raise InputError(f"max_drop is a number from 0 to 1, a share of the quality; '{max_drop}' came.")
    result = SearchResult.load(folder, _schemes(settings, build))
    space, quality = result.space, result.quality_name
    if not result.front:
        raise InputError(f"The run has no front to start from yet. Let it go on: mpsearch search run={_relative(folder)}.")
    costs = {name: build(f"cost.{name}") for name in settings["cost"]}
    latency = costs.get(LatencyMs.name)
    if isinstance(latency, LatencyMs) and latency.path is None and (folder / "latency.csv").exists():
        costs[latency.name] = latency = replace(latency, path=str(folder / "latency.csv"))
    budgets = read_budgets({**result.budgets, **asked}, costs, space)
    own = read_budgets(result.budgets, costs, space)
    start = time.perf_counter()
    if budgets:
        solution(
            space, result.sensitivity.losses(), budgets
        )  # budgets that no allocation meets together are said before a model is loaded
        print(f"solved in {1e3 * (time.perf_counter() - start):.0f} ms")
    tables = [cost.table(space) for cost in costs.values() if cost.column in result.costs]
    objective = next((t for t in tables if t.column == result.objective), None) or Bytes().table(space)
    prepared = prepare(settings, build)
    run = RunFolder(folder)
    with run.locked():
        run.identify(prepared.identity(settings))
        run.mend("evaluations")

        def record(evaluation: Evaluation) -> None:
            run.append("evaluations", evaluation_row(evaluation, space, quality, result.costs))

        batch_size = latency.batch_size if isinstance(latency, LatencyMs) else 1
        evaluate = Evaluator(prepared.engine(settings), own, record, result.evaluations, tables, batch_size)
        if max_drop is None:
            picked = best_within(evaluate, result.sensitivity, budgets)
        else:
            picked = cheapest_within(evaluate, result.sensitivity, budgets, objective, max_drop)
        result = replace(result, evaluations=evaluate.evaluations)
        evaluate(picked.allocation, picked.origin, "confirm")  # also where another cost than the objective was limited
        confirmed = confirm(evaluate, result)
        page = write_report(result, folder, picked, confirmed)
        _summary(result, picked)
        _paths(folder, page, "pareto.png", "front.csv")
        if any(e.allocation == picked.allocation for e in result.front):
            print(f"export it: mpsearch export run={_relative(folder)} pick.max_bytes={picked.size_bytes}")
        else:
            print("another point has a lower loss and costs no more: this one is not on the front that export picks from")


def hardware(settings: Settings, build: Build, folder: Path) -> None:
    """What this machine is, whether its kernels are right, what they run of this model, and how fast."""
    prepared = prepare(settings, build)
    about = Table(title="This machine", show_header=False)
    for what, words in facts().items():
        about.add_row(what, words)
    _stdout().print(about)
    tests = self_test()
    for backend, n, n_wrong in tests:
        print(f"self-test of {backend}: {n - n_wrong} of {n} cases agree with the specification")
    if not tests:
        print("self-test: there are no compiled kernels; everything runs on plain PyTorch")
    with RunFolder(folder).locked():
        path = _latency_table(prepared, settings["batch_size"], folder, settings["seconds"])
        rows = read_latency(path)
        draw_latency(rows, prepared.space, folder)
    _stdout().print(_kernel_table(prepared.space, rows))
    _paths(folder, path, "latency.png")
    if wrong := [backend for backend, _, n_wrong in tests if n_wrong]:
        raise InputError(f"The kernels of {', '.join(wrong)} compute something else than they should here. Please report this.")


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


def _latency_table(prepared: Prepared, batch_size: int, folder: Path, seconds: float = LATENCY_SECONDS) -> Path:
    """`latency.csv` in the folder, measured where it is not there."""
    path = folder / "latency.csv"
    if not path.exists():
        inputs, _ = prepared.calibration[0]
        if batch_length(inputs) < batch_size:
            raise InputError(
                f"Latency is asked for {batch_size} samples, but a batch of the task has {batch_length(inputs)}. Ask for fewer, "
                "or give the task larger batches."
            )
        folder.mkdir(parents=True, exist_ok=True)
        inputs = first_samples(inputs, batch_size)
        rows = measure_latency(prepared.model, prepared.task.forward, prepared.space, prepared.quantizers, inputs, seconds)
        write_latency(path, rows)
    return path


def _kernel_table(space: SearchSpace, rows: Sequence[Latency]) -> Table:
    """For each scheme: the op that runs each kind of layer, and the sum of the latencies."""
    kinds = {layer.name: layer.kind for layer in space.layers}
    shown = Table(title="What runs each scheme")
    for column in ("scheme", *dict.fromkeys(kinds.values()), "network, ms"):
        shown.add_column(column, justify="right" if column.endswith("ms") else "left")
    rest = sum(row.milliseconds for row in rows if row.layer == REST)
    for scheme in (FLOAT, *space.scheme_names):
        mine = [row for row in rows if row.scheme == scheme and row.layer != REST]
        ops = [", ".join(dict.fromkeys(r.op for r in mine if kinds[r.layer] == kind)) for kind in dict.fromkeys(kinds.values())]
        whole = sum(row.milliseconds for row in mine) + rest
        shown.add_row(scheme, *ops, f"{whole:.3f}" if len(mine) == len(kinds) else f"{whole:.3f} without pinned layers")
    return shown


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
