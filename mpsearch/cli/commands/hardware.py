"""`mpsearch hardware`: what this machine's kernels run, whether they are right, and how fast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.table import Table

from mpsearch.allocation import SearchSpace
from mpsearch.cli.show import paths, stdout
from mpsearch.costs.base import Cost
from mpsearch.costs.latency import FLOAT, REST, Latency, LatencyMs, read_latency, write_latency
from mpsearch.errors import InputError
from mpsearch.files import file_errors
from mpsearch.graph.trace import batch_length, first_samples
from mpsearch.packed.hardware import facts, measure_latency, self_test
from mpsearch.pipeline.prepare import Build, Prepared, Settings, prepare
from mpsearch.reporting.charts.latency import draw_latency

LATENCY_SECONDS = 10.0  # spent on a latency table that a search needs


def hardware(settings: Settings, build: Build, folder: Path) -> None:
    """What this machine is, whether its kernels are right, what they run of this model, and how fast.

    The caller holds the lock of the folder.
    """
    prepared = prepare(settings, build)
    about = Table(title="This machine", show_header=False)
    for what, words in facts().items():
        about.add_row(what, words)
    stdout().print(about)
    tests = self_test()
    for backend, n, n_wrong in tests:
        print(f"self-test of {backend}: {n - n_wrong} of {n} cases agree with the specification")
    if not tests:
        print("self-test: there are no compiled kernels; everything runs on plain PyTorch")
    path = latency_table(prepared, settings["batch_size"], folder, settings["seconds"])
    rows = read_latency(path)
    draw_latency(rows, prepared.space, folder)
    stdout().print(_kernel_table(prepared.space, rows))
    paths(folder, path, "latency.png")
    if wrong := [backend for backend, _, n_wrong in tests if n_wrong]:
        raise InputError(f"The kernels of {', '.join(wrong)} compute something else than they should here. Please report this.")


def latency_table(prepared: Prepared, batch_size: int, folder: Path, seconds: float = LATENCY_SECONDS) -> Path:
    """`latency.csv` in the folder, measured where it is not there."""
    path = folder / "latency.csv"
    if not path.exists():
        inputs, _ = prepared.calibration[0]
        if batch_length(inputs) < batch_size:
            raise InputError(
                f"Latency is asked for {batch_size} samples, but a batch of the task has {batch_length(inputs)}. Ask for fewer, "
                "or give the task larger batches."
            )
        with file_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        inputs = first_samples(inputs, batch_size)
        rows = measure_latency(prepared.model, prepared.task.forward, prepared.space, prepared.quantizers, inputs, seconds)
        write_latency(path, rows)
    return path


def costs_of_run(settings: Settings, build: Build, folder: Path) -> tuple[dict[str, Cost], int]:
    """The costs of a finished run by name, latencies as its folder has them; and the samples of a timed forward pass."""
    costs: dict[str, Cost] = {name: build(f"cost.{name}") for name in settings["cost"]}
    latency = costs.get(LatencyMs.name)
    if not isinstance(latency, LatencyMs):
        return costs, 1
    if latency.path is None and (folder / "latency.csv").exists():
        costs[latency.name] = replace(latency, path=str(folder / "latency.csv"))
    return costs, latency.batch_size


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
