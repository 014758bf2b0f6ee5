"""What a search weighs and respects: costs, budgets on them, and the one or two objectives that the front trades against loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mpsearch.budget import Budget, read_budgets
from mpsearch.costs.base import Cost, CostTable
from mpsearch.costs.latency import LatencyMs, write_latency
from mpsearch.costs.size import Bytes
from mpsearch.errors import InputError
from mpsearch.files import file_errors
from mpsearch.graph.trace import batch_length, first_samples
from mpsearch.packed.hardware import measure_latency
from mpsearch.pipeline.prepare import Choice, Prepared
from mpsearch.registry import resolve

SIZES = ("size_bytes", "average_bits", "fraction")  # columns that every evaluation has
LATENCY_SECONDS = 10.0  # spent on measuring a latency table that a search needs


@dataclass(frozen=True)
class Goal:
    """Costs by name, budgets, tables of the objectives and of the costs that are not sizes, and the timed batch size."""

    costs: Mapping[str, Cost]
    budgets: tuple[Budget, ...]
    objectives: Sequence[CostTable]
    other_costs: Sequence[CostTable]
    batch_size: int


def resolved_costs(
    costs: Mapping[str, Choice] | Iterable[Choice], budget: Mapping[str, Any] | None, objectives: Sequence[str]
) -> dict[str, Cost]:
    """Cost objects by name: those that are given, and those that a budget or an objective names."""
    given = dict(costs) if isinstance(costs, Mapping) else {getattr(cost, "name", cost): cost for cost in costs}
    named = [*objectives, *(name for name, limit in (budget or {}).items() if limit is not None)]
    given |= {name: name for name in named if name not in given}
    return {name: resolve("cost", choice, f"cost.{name}") for name, choice in given.items()}


def objective_names(objective: str | Sequence[str] | None) -> list[str]:
    """One or two names of costs; `InputError` for more, or none."""
    names = list(dict.fromkeys([objective] if isinstance(objective, str) else map(str, objective or ())))
    if not 1 <= len(names) <= 2:
        raise InputError(f"objective must be one cost, or two in brackets; got {len(names)}: {', '.join(names)}.")
    return names


def goal_of(
    prepared: Prepared, costs: Mapping[str, Cost], budget: Mapping[str, Any] | None, objectives: Sequence[str], folder: Path
) -> Goal:
    """Tables and budgets on the prepared space; latencies are measured in `folder` where they are needed and not there yet.

    Raises
    ------
    InputError
        An objective that makes no front, or a budget that no allocation meets.
    """
    space, costs = prepared.space, dict(costs)
    if unknown := [name for name in objectives if name not in costs]:
        raise InputError(f"objective must be one or two of this run's costs ({', '.join(costs)}); got '{unknown[0]}'.")
    latency = costs.get(LatencyMs.name)
    batch_size = latency.batch_size if isinstance(latency, LatencyMs) else 1
    if isinstance(latency, LatencyMs) and latency.path is None:
        costs[latency.name] = replace(latency, path=str(latency_table(prepared, batch_size, folder)))
    budgets = read_budgets(budget or {}, costs, space)
    tables = {name: cost.table(space) for name, cost in costs.items()}
    for name in objectives:
        if tables[name].peak:
            raise InputError(
                f"{name} is a peak and takes few values, so that it makes no front: limit it, budget.{name}=…, and keep "
                "another objective; --multirun tries several limits."
            )
    weighed = [Bytes().table(space) if tables[name].column in SIZES else tables[name] for name in objectives]
    if len({table.column for table in weighed}) < len(objectives):
        raise InputError(f"{' and '.join(objectives)} are the same cost in two units. Give one of them, or another cost.")
    others = [table for table in tables.values() if table.column not in SIZES]
    return Goal(costs, budgets, weighed, others, batch_size)


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
        model, forward, quantizers = prepared.model, prepared.task.forward, prepared.plan.quantizers
        write_latency(path, measure_latency(model, forward, prepared.space, quantizers, inputs, seconds))
    return path
