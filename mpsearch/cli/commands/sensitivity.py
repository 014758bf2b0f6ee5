"""`mpsearch sensitivity`: the sensitivity table and its chart, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.table import Table

from mpsearch.cli.show import paths, stdout
from mpsearch.engine.engine import QuantEngine
from mpsearch.evaluation import SensitivityTable
from mpsearch.executors.base import Executor
from mpsearch.graph.channel_scaling import recorded
from mpsearch.graph.unsearched import sentence
from mpsearch.metrics.base import SensitivityMetric
from mpsearch.pipeline.prepare import Build, Settings, prepare
from mpsearch.pipeline.sensitivity import measure_sensitivity
from mpsearch.reporting.charts.sensitivity import draw_sensitivity
from mpsearch.runs.run import RunFolder


def sensitivity(settings: Settings, build: Build, folder: Path) -> None:
    """The sensitivity table and its chart, and nothing else. The caller holds the lock of the folder."""
    prepared = prepare(settings, build, recorded(folder))
    print(sentence(prepared.not_searched))
    metric: SensitivityMetric = build("metric")
    run = RunFolder(folder)
    prepared.record(folder)
    unit = metric.unit_for(prepared.divergence)
    run.identify({**prepared.identity(settings), "metric": {"name": metric.name, "unit": unit, "exact": metric.exact}})
    table = measured_sensitivity(prepared.engine(settings, folder), metric, run, {})
    draw_sensitivity(table, folder)
    space = prepared.space
    shown = Table(title=f"{metric.name} ({table.unit}) of each layer alone")
    for column in ("layer", *space.scheme_names):
        shown.add_column(column, justify="left" if column == "layer" else "right")
    for name, values in zip(space.names, table.values, strict=True):
        shown.add_row(name, *(f"{value:.3g}" for value in values))
    stdout().print(shown)
    paths(folder, folder / "sensitivity.csv", "sensitivity.png")


def measured_sensitivity(
    engine: QuantEngine,
    metric: SensitivityMetric,
    run: RunFolder,
    known: Mapping[tuple[str, str], float],
    executor: Executor | None = None,
) -> SensitivityTable:
    """Measured, every new row on disk before the next begins."""
    space = engine.space
    bits = {(g, s): int(space.storage_bits[i, j]) for i, g in enumerate(space.names) for j, s in enumerate(space.scheme_names)}

    def record(group: str, scheme: str, value: float) -> None:
        row = {"group": group, "scheme": scheme, "metric": metric.name, "value": value, "size_bits": bits[group, scheme]}
        run.append("sensitivity", row)

    effects = run.read_effects(space)
    return measure_sensitivity(engine, metric, known, record, executor, effects, run.write_effects)
