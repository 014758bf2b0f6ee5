"""The commands: each translates its settings into calls of the public API and prints what they return.

`settings` are plain values of the composed config, `build(key)` builds the object of one of its nodes, `folder` is the run's.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.table import Table

from mpsearch.allocation import SearchSpace
from mpsearch.cli.saved_config import saved
from mpsearch.cli.show import path_lines, paths, print_summary, progress_lines, progress_table, relative, stdout
from mpsearch.costs.latency import FLOAT, REST, Latency
from mpsearch.errors import InputError
from mpsearch.packed.agreement import check_verified
from mpsearch.packed.hardware import facts, self_test
from mpsearch.pipeline import api, finished
from mpsearch.pipeline.compare import compared
from mpsearch.pipeline.goal import objective_names
from mpsearch.pipeline.pick import pick
from mpsearch.pipeline.result import Result, load_result, redrawn, verified, written
from mpsearch.pipeline.watch import watched
from mpsearch.registry import resolve
from mpsearch.reporting.charts.latency import draw_latency
from mpsearch.reporting.charts.sensitivity import draw_sensitivity
from mpsearch.reporting.verified import verified_sentence
from mpsearch.runs.run import RunFolder
from mpsearch.runtimes.base import Runtime

Settings = Mapping[str, Any]
Build = Callable[..., Any]

PATHS = ("data_dir", "path")  # arguments of the tasks


def search(settings: Settings, build: Build, folder: Path) -> None:
    """Measure, search, confirm, report; or resume an interrupted run. The caller holds the lock of the folder."""
    same = ("budget", "objective", "max_drop", "n_trials", "n_seeds", "max_seconds")
    options: dict[str, Any] = {key: settings[key] for key in same}
    costs = list(settings["cost"])
    if unknown := [name for name in objective_names(settings["objective"]) if name not in costs]:
        raise InputError(
            f"objective must be one of this run's costs, or two in brackets: {', '.join(costs)}; got '{unknown[0]}'. Add it: "
            f"cost=[{','.join([*costs, unknown[0]])}]"
        )
    result = api.search(
        **_prepared(settings, build),
        **options,
        **_memory(settings),
        runtime=build("runtime") if settings.get("runtime") else "mpsearch",
        equalizer=build("equalizer") if settings.get("equalizer") else None,
        metric=build("metric"),
        sampler=build("sampler"),
        executor=build("executor"),
        refiner=build("refiner") if settings.get("refiner") else None,
        costs={name: build(f"cost.{name}") for name in settings["cost"]},
        pin=settings["pin"] or (),
        share=settings["share"] or (),
        in_flight=settings["study"]["in_flight"],
        mirror=settings["study"]["mirror"],
        confirm_points=settings["confirm"]["n_points"],
        finetune_steps=settings["confirm"]["finetune_steps"],
        verify=settings["verify"],
        folder=RunFolder(folder, is_held=True),
    )
    picked = result.pick()
    page = result.report()
    said = [verified_sentence(result.run, result.verified[-1])] if settings["verify"] else []
    said += path_lines(folder, folder / "index.html", page.name, "front.csv")
    print_summary(result.run, picked.evaluation, folder, said=said)
    check_verified(result.run.on("confirm").values())


def sensitivity(settings: Settings, build: Build, folder: Path) -> None:
    """The sensitivity table and its chart, and nothing else. The caller holds the lock of the folder."""
    table = api.sensitivity(
        **_prepared(settings, build),
        metric=build("metric"),
        equalizer=build("equalizer") if settings.get("equalizer") else None,
        **_memory(settings),
        folder=RunFolder(folder, is_held=True),
    )
    draw_sensitivity(table, folder)
    shown = Table(title=f"{table.metric} ({table.unit}) of each layer alone")
    for column in ("layer", *table.space.scheme_names):
        shown.add_column(column, justify="left" if column == "layer" else "right")
    for name, values in zip(table.space.names, table.values, strict=True):
        shown.add_row(name, *(f"{value:.3g}" for value in values))
    stdout().print(shown)
    paths(folder, folder / "sensitivity.csv", "sensitivity.png")


def hardware(settings: Settings, build: Build, folder: Path) -> None:
    """What this machine is, whether its kernels are right, what they run of this model, and how fast.

    The caller holds the lock of the folder.
    """
    about = Table(title="This machine", show_header=False)
    for label, value in facts().items():
        about.add_row(label, value)
    stdout().print(about)
    tests = self_test()
    for backend, n, n_wrong in tests:
        print(f"self-test of {backend}: {n - n_wrong} of {n} cases agree with the specification")
    if not tests:
        print("self-test: there are no compiled kernels; everything runs on plain PyTorch")
    held = RunFolder(folder, is_held=True)
    options = {key: settings[key] for key in ("batch_size", "seconds")}
    space, rows = api.hardware(**_prepared(settings, build), **options, pin=settings["pin"] or (), folder=held)
    draw_latency(rows, space, folder)
    stdout().print(_kernel_table(space, rows))
    paths(folder, folder / "latency.csv", "latency.png")
    if wrong := [backend for backend, _, n_wrong in tests if n_wrong]:
        raise InputError(f"The kernels of {', '.join(wrong)} compute something else than they should here. Please report this.")


def solve(settings: Settings, build: Build, folder: Path) -> None:
    """Another budget on a finished run, or the cheapest point within a drop: solved, measured, confirmed, reported."""
    _require_search(settings, "no run to solve")
    result = _loaded(settings, build, folder)
    point = finished.solve(result, budget=settings["budget"], max_drop=settings.get("max_drop"))
    page = point.result.report(point=point.id)
    said = path_lines(folder, folder / "index.html", page.name, "front.csv")
    print_summary(point.result.run, point.evaluation, folder, said=said)


def finetune(settings: Settings, build: Build, folder: Path) -> None:
    """Train the picked point, or resume its training; score it on both splits, and draw it with the untrained one."""
    _require_search(settings, "no point to train")
    options = {key: settings[key] for key in ("epochs", "batches", "batch_size", "learning_rate", "loss", "seed")}
    result = _loaded(settings, build, folder)
    point = finished.finetune(result, **options, **settings["pick"])
    run, training = point.result.run, point.training
    assert training is not None
    page = point.result.report(point=point.id)
    quality, confirmed = run.quality, run.finetuned("confirm")[point.allocation]
    drop, low, high = training.drop
    gain, least, most = (quality.difference(-x) for x in (drop, high, low))
    said = [
        f"epoch {training.best_epoch} of {training.epochs} is kept: loss on search {training.loss_before:.4g} -> "
        f"{training.loss_after:.4g}",
        f"{quality.label} on confirm: {quality.text(training.quality_before)} -> {quality.text(confirmed.quality)}, a gain of "
        f"{gain}{quality.drop_unit} ({least} to {most}, paired 95 %), in {training.seconds:.0f} s of training",
        *path_lines(folder, folder / "index.html", page.name),
    ]
    print_summary(run, point.evaluation, folder, settings["pick"]["max_drop"], said)
    check_verified([confirmed])


def report(settings: Settings, build: Build, folder: Path) -> None:
    """Draw the tables, figures and page again from what lies in the folder; nothing that the config names is built."""
    _require_search(settings, "no front to report. Its chart is sensitivity.png")
    result, picked, page = redrawn(folder, pick, lambda: load_result(folder), every_figure=True)
    print_summary(result.run, picked, folder, said=path_lines(folder, folder / "index.html", page.name, "front.csv"))


def compare(folders: list[Path], target: Path) -> None:
    """Compare finished runs on the confirm split, and print the tables."""
    page = compared(folders, target, [saved(folder) for folder in folders])
    print("\n".join(line for line in page.read_text(encoding="utf-8").splitlines() if not line.startswith("![")).strip())
    paths(target, page, "comparison.png", "comparison.csv")


def watch(settings: Settings, build: Build, folder: Path) -> None:
    """Show a run in progress until it ends: in place on a terminal, else a line whenever something changed."""
    every, said = settings["every_seconds"], ""
    if isinstance(every, bool) or not isinstance(every, int | float) or not 0 < every < 86_400:
        raise InputError(f"every_seconds must be a number above 0; got {every!r}.")
    with Live(console=stdout(), auto_refresh=False) if sys.stdout.isatty() else nullcontext() as live:
        for now in watched(folder, every):
            if live is not None:
                live.update(Group(*progress_lines(now), progress_table(now)), refresh=True)
            elif (line := "; ".join(progress_lines(now))) != said:
                said = line
                print(line, flush=True)


def export(settings: Settings, build: Build, folder: Path) -> None:
    """Write the picked point; the path of the main file is the last line printed."""
    _require_search(settings, "no point to export")
    limits = settings["pick"]
    absent = _absent_data(settings)
    result = _loaded(settings, build, folder, with_data=absent is None)
    picked = pick(result.run, **limits)
    path, point = written(result, picked, _exporter(settings, build), finetuned=settings["finetuned"], limits=limits)
    if absent is not None:
        print(f"{absent} does not exist: the digests of what was written were checked, its loss was not measured again")
    result, _, _ = redrawn(folder, lambda run: pick(run, point=point.allocation.id), lambda: result)
    print_summary(result.run, point, None, limits.get("max_drop"))
    print(relative(path))


def verify(settings: Settings, build: Build, folder: Path) -> None:
    """Export the picked point, open the file in its runtime, and measure it there on the confirm split."""
    _require_search(settings, "no point to verify")
    limits = settings["pick"]
    exporter = _exporter(settings, build)
    resolve("exporter", exporter).check_installed()
    result = _loaded(settings, build, folder)
    picked = pick(result.run, **limits)
    measured = verified(result, picked, exporter, settings["finetuned"], limits)
    result, _, page = redrawn(folder, lambda run: pick(run, point=measured.point), lambda: result)
    print(verified_sentence(result.run, measured))
    paths(folder, page, "verified.csv")


def _exporter(settings: Settings, build: Build) -> Any:
    """The exporter that was asked for, or the one whose files the run's runtime opens."""
    if settings.get("exporter"):
        return build("exporter")
    return build("runtime").exporter if settings.get("runtime") else Runtime.exporter


def _memory(settings: Settings) -> dict[str, Any]:
    """The options of the engine."""
    memory = settings["memory"]
    limits = {"memory_max_bytes": memory["max_bytes"], "prefix_max_bytes": memory["prefix_max_bytes"]}
    return {"bias_correction": settings["bias_correction"], **limits}


def _prepared(settings: Settings, build: Build) -> dict[str, Any]:
    """The arguments that say what is quantized, and how."""
    return {
        "model": functools.partial(build, "model"),
        "task": build("task"),
        "schemes": {name: build(f"scheme.{name}") for name in settings["scheme"]},
        "quantizer": build("quantizer"),
        "quantizer_of": {name: build(f"quantizer_of.{name}") for name in settings["quantizer_of"]},
        "name": _short(settings["model"]),
        **{key: settings[key] for key in ("fold_batch_norms", "seed", "device")},
    }


def _loaded(settings: Settings, build: Build, folder: Path, with_data: bool = True) -> Result:
    """The finished run, with the model, the data and the choices that its config names."""
    given = settings["quantizer_of"]
    quantizers = {name: build(f"quantizer_of.{name}" if name in given else "quantizer") for name in settings["scheme"]}
    return load_result(
        folder,
        functools.partial(build, "model"),
        build("task") if with_data else None,
        schemes={name: build(f"scheme.{name}") for name in settings["scheme"]},
        quantizers=quantizers,
        costs={name: build(f"cost.{name}") for name in settings["cost"]},
        refiner=build("refiner") if settings.get("refiner") else None,
        device=settings["device"],
        seed=settings["seed"],
    )


def _require_search(settings: Settings, missing: str) -> None:
    if "n_trials" not in settings:
        raise InputError(f"This folder holds a sensitivity table alone; there is {missing}. Run: mpsearch search.")


def _absent_data(settings: Settings) -> str | None:
    """Data of the task that do not exist, as "task.data_dir=data/cifar10"; `None` where none is known to be absent."""
    given = {key: settings["task"].get(key) for key in PATHS}
    absent = (key for key, value in given.items() if isinstance(value, str) and not Path(value).expanduser().exists())
    return next((f"task.{key}={given[key]}" for key in absent), None)


def _short(node: Mapping[str, Any]) -> str:
    """The name of a model in reports: its file's or folder's, timm's, or the last part of its target and its integers."""
    if isinstance(path := node.get("path"), str):
        return Path(path).expanduser().resolve().name.removesuffix(".gguf").removesuffix(".onnx")
    if isinstance(name := node.get("model_name"), str):
        return name
    words = [f"{key}={value}" for key, value in node.items() if isinstance(value, int) and not isinstance(value, bool)]
    return " ".join([str(node.get("_target_", "?")).rpartition(".")[2], *words])


def _kernel_table(space: SearchSpace, rows: list[Latency]) -> Table:
    """For each scheme: the operator that runs each kind of layer, and the sum of the latencies."""
    kinds = {layer.name: layer.kind for layer in space.layers}
    shown = Table(title="What runs each scheme")
    for column in ("scheme", *dict.fromkeys(kinds.values()), "network, ms"):
        shown.add_column(column, justify="right" if column.endswith("ms") else "left")
    rest = sum(row.milliseconds for row in rows if row.layer == REST)
    for scheme in (FLOAT, *space.scheme_names):
        layers = [row for row in rows if row.scheme == scheme and row.layer != REST]
        ops = [", ".join(dict.fromkeys(r.op for r in layers if kinds[r.layer] == kind)) for kind in dict.fromkeys(kinds.values())]
        total = sum(row.milliseconds for row in layers) + rest
        shown.add_row(scheme, *ops, f"{total:.3f}" if len(layers) == len(kinds) else f"{total:.3f} without pinned layers")
    return shown
