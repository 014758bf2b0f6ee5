"""An evaluation as a row of `evaluations.csv`, and back, with every value checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from mpsearch.allocation import Allocation, SearchSpace
from mpsearch.errors import InputError
from mpsearch.evaluation import FINETUNED, REFINED, Evaluation
from mpsearch.files.csv_rows import CRC, Row
from mpsearch.quality import Quality

ORIGINS = ("float", "uniform", "knapsack", "sampler", "user", REFINED, FINETUNED)
SCORED = ("search", "confirm")
ROUNDING = 1e-6  # of the mean of float32 shares


def evaluation_columns(quality_name: str, costs: Sequence[str] = ()) -> tuple[str, ...]:
    """The columns of `evaluations.csv`: the fields of `Evaluation`, the quality under its own name, each cost on its own."""
    columns = (*(f.name.replace("quality", quality_name) for f in fields(Evaluation) if f.name != "costs"), *costs)
    taken = {name for name in columns if columns.count(name) > 1} | ({quality_name} & {"scheme", CRC})
    if taken:
        raise InputError(
            f"The quality cannot be named '{quality_name}': {', '.join(sorted(taken))} is a column of the run's tables already. "
            f"Give the task another quality_name, as in 'task_{quality_name}'."
        )
    return columns


def evaluation_row(evaluation: Evaluation, space: SearchSpace, quality_name: str, costs: Sequence[str] = ()) -> dict[str, Any]:
    """An evaluation as a row of `evaluations.csv`; the float model has no allocation, and no costs except the size."""
    values = {f.name: getattr(evaluation, f.name) for f in fields(Evaluation) if f.name != "costs"}
    values["allocation"] = space.encode(evaluation.allocation) if evaluation.allocation else ""
    cells = (*values.values(), *(evaluation.costs.get(name) for name in costs))
    return dict(zip(evaluation_columns(quality_name, costs), cells, strict=True))


def _timing(row: Row) -> dict[str, Any]:
    """The fields of a timed forward pass: all of them, or none."""
    columns = ("measured_ms", "measured_ms_low", "measured_ms_high")
    times = {column: row.number(column) if row.cells[column] else None for column in columns}
    timed = times["measured_ms"] is not None
    for column in (*columns, "measured_on"):
        if bool(row.cells[column]) != timed:
            raise row.damage(column, "a value, as there is a measured_ms" if timed else "nothing, as there is no measured_ms")
    return {**times, "measured_on": row.cells["measured_on"]}


class EvaluationReader:
    """Reads the rows of one table, in their order: called with a `Row`, returns its `Evaluation`.

    What a row says of its allocation's size must be what `space` computes. Raises `InputError` for anything that no run writes.
    """

    def __init__(self, space: SearchSpace, quality: Quality, costs: Sequence[str]) -> None:
        self.space, self.quality, self.costs = space, quality, costs
        self._trials: set[tuple[str, int]] = set()
        self._n_samples: dict[str, int] = {}

    def __call__(self, row: Row) -> Evaluation:
        """The evaluation of a row."""
        space, split = self.space, row.one_of("split", SCORED)
        origin, allocation = self._allocation(row)
        choice = space.choice(allocation) if allocation else None
        bits = space.size_bits(choice)
        loss = row.number("loss", infinite=True)
        quality, low, high = self._qualities(row, loss)
        return Evaluation(
            trial=self._trial(row, split),
            origin=origin,
            allocation=allocation,
            split=split,
            loss=loss,
            cross_entropy=row.number("cross_entropy", -math.inf, infinite=True, nan=math.isinf(loss)),
            quality=quality,
            quality_low=low,
            quality_high=high,
            size_bytes=int(_equal(row, "size_bytes", row.integer("size_bytes"), (bits + 7) // 8)),
            average_bits=_equal(row, "average_bits", row.number("average_bits"), (bits - space.other_bits) / space.numel),
            fraction=_equal(row, "fraction", row.number("fraction"), bits / space.size_bits()),
            feasible=row.boolean("feasible"),
            n_samples=self._samples(row, split),
            seconds=row.number("seconds"),
            packed=row.boolean("packed"),
            **_timing(row),
            verified=row.boolean("verified"),
            proposal_loss=row.number("proposal_loss", infinite=True) if row.cells["proposal_loss"] else None,
            accepted=row.boolean("accepted"),
            costs=self._costs(row, origin),
        )

    def _allocation(self, row: Row) -> tuple[str, Allocation]:
        space, origin, text = self.space, row.one_of("origin", ORIGINS), row.cells["allocation"]
        if origin == "float":
            if text:
                raise row.damage("allocation", "nothing, for the float model")
            return origin, Allocation()
        try:
            allocation = space.decode(text)
        except ValueError:
            n = len(space.names)
            raise row.damage("allocation", f"{n} characters, one of {len(space.schemes)} schemes for each group") from None
        choice = space.choice(allocation)
        if not space.allowed[np.arange(len(choice)), choice].all():
            raise row.damage("allocation", "a scheme that is allowed for each group")
        return origin, allocation

    def _qualities(self, row: Row, loss: float) -> tuple[float, float, float]:
        name, kind, is_broken = self.quality.name, self.quality.kind, math.isinf(loss)
        infinite = is_broken or kind == "perplexity"
        bounds = {"share": (0.0, 1.0), "perplexity": (0.0, math.inf)}.get(kind, (-math.inf, math.inf))
        quality = row.number(name, *bounds, infinite=infinite, nan=is_broken, slack=ROUNDING)
        low, high = (row.number(f"{name}_{end}", -math.inf, infinite=infinite, nan=is_broken) for end in ("low", "high"))
        if low > high:
            raise row.damage(f"{name}_high", f"at least {name}_low, {low:g}")
        return quality, low, high

    def _trial(self, row: Row, split: str) -> int | None:
        if not row.cells["trial"]:
            return None
        trial = row.integer("trial")
        if (split, trial) in self._trials:
            raise row.damage("trial", "a number that no earlier row has")
        self._trials.add((split, trial))
        return trial

    def _samples(self, row: Row, split: str) -> int:
        n = row.integer("n_samples", least=1)
        return int(_equal(row, "n_samples", n, self._n_samples.setdefault(split, n)))

    def _costs(self, row: Row, origin: str) -> Mapping[str, float]:
        if origin == "float":
            return {}
        return {name: row.number(name) for name in self.costs}


def _equal(row: Row, column: str, value: float, expected: float) -> float:
    if not math.isclose(value, expected, rel_tol=1e-9):
        raise row.damage(column, f"{expected!r}, which its allocation and the other rows give")
    return value
