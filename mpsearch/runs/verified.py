"""`verified.csv`: what exported files scored, opened by their runtimes, on the confirm split; a row for each verification."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path

from mpsearch.files.csv_rows import Row, read_rows
from mpsearch.quality import Quality
from mpsearch.runs.evaluation_rows import ROUNDING
from mpsearch.runs.run import RunFolder

TABLE = "verified"
QUALITIES = ("quality", "quality_low", "quality_high")
POSITIVE = ("ms", "ms_low", "ms_high", "float_ms", "packed_ms")


@dataclass(frozen=True)
class Verified:
    """An exported point as its runtime runs it.

    Attributes
    ----------
    exporter
        Its name, that of its module.
    point
        The id of its allocation.
    trained
        Whether the weights are those that were trained.
    file_bytes
        Of the exported files, descriptions in JSON aside.
    loss, packed_loss
        Divergence from the float model in the runtime, and of our packed model.
    quality, quality_low, quality_high
        As in `mpsearch.evaluation.Score`.
    ms, ms_low, ms_high, float_ms, packed_ms
        Milliseconds of a forward pass in the runtime (median and quartiles), of the float model in PyTorch and of our packed
        model (medians), of interleaved calls; `measured_on` names machine, threads and batch size.
    n_tokens, same_tokens
        Of a language model: tokens that were generated greedily, and how many of the first ones are those of our packed model.
    """

    exporter: str
    runtime: str
    point: str
    trained: bool
    file_bytes: int
    loss: float
    packed_loss: float
    quality: float
    quality_low: float
    quality_high: float
    n_samples: int
    ms: float
    ms_low: float
    ms_high: float
    float_ms: float
    packed_ms: float
    measured_on: str
    n_tokens: int = 0
    same_tokens: int = 0


def verified_columns(quality_name: str) -> tuple[str, ...]:
    """The columns of `verified.csv`: the fields of `Verified`, the quality under its own name."""
    return tuple(f.name.replace("quality", quality_name) if f.name in QUALITIES else f.name for f in fields(Verified))


def append_verified(folder: RunFolder, verified: Verified, quality_name: str) -> None:
    """Add a row; the caller holds the lock of the folder."""
    folder.drop_incomplete_row(TABLE)
    values = (getattr(verified, f.name) for f in fields(Verified))
    folder.append(TABLE, dict(zip(verified_columns(quality_name), values, strict=True)))


def read_verified(folder: Path, quality: Quality) -> tuple[Verified, ...]:
    """All rows, in the order in which they were measured; `InputError` where the table is damaged."""
    file = folder / f"{TABLE}.csv"
    if not file.exists():
        return ()
    remedy = "Delete the file and verify again: mpsearch verify run=<folder>"
    return tuple(read_rows(file, verified_columns(quality.name), lambda row: _verified(row, quality), remedy=remedy))


def _verified(row: Row, quality: Quality) -> Verified:
    loss = row.number("loss", infinite=True, nan=True)
    is_broken = not math.isfinite(loss)
    bounds = {"share": (0.0, 1.0), "perplexity": (0.0, math.inf)}.get(quality.kind, (-math.inf, math.inf))
    infinite = is_broken or quality.kind == "perplexity"
    name, n_tokens = quality.name, row.integer("n_tokens")
    if (same := row.integer("same_tokens")) > n_tokens:
        raise row.damage("same_tokens", f"at most n_tokens, {n_tokens}")
    return Verified(
        exporter=row.cells["exporter"],
        runtime=row.cells["runtime"],
        point=row.cells["point"],
        trained=row.boolean("trained"),
        file_bytes=row.integer("file_bytes", least=1),
        loss=loss,
        packed_loss=row.number("packed_loss", infinite=True, nan=True),
        quality=row.number(name, *bounds, infinite=infinite, nan=is_broken, slack=ROUNDING),
        quality_low=row.number(f"{name}_low", -math.inf, infinite=infinite, nan=is_broken),
        quality_high=row.number(f"{name}_high", -math.inf, infinite=infinite, nan=is_broken),
        n_samples=row.integer("n_samples", least=1),
        **{column: row.number(column) for column in POSITIVE},
        measured_on=row.cells["measured_on"],
        n_tokens=n_tokens,
        same_tokens=same,
    )
