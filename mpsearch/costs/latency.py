"""Latency: the cost, and the table `latency.csv` that `mpsearch hardware` writes on a machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np

from mpsearch.allocation import SearchSpace
from mpsearch.costs.base import Cost, CostTable
from mpsearch.errors import InputError, check_integer
from mpsearch.files.csv_rows import Row, read_rows, write_rows

FLOAT, REST = "float", ""  # in the column scheme: the float layer; in the column layer: everything but the searched layers


@dataclass(frozen=True)
class Latency:
    """A row of `latency.csv`: the latency of a layer in a scheme.

    Attributes
    ----------
    layer
        Its name; empty for the rest of the network.
    op
        The kernel that runs, "dequantize" where there is none, the kind of layer where `scheme` is "float".
    shape
        The input's.
    scheme
        Its name, or "float".
    batch_size, threads, backend
        Samples, threads and backend of the measurement.
    milliseconds
        For all calls of one forward pass.
    """

    layer: str
    op: str
    shape: str
    scheme: str
    batch_size: int
    threads: int
    backend: str
    milliseconds: float


COLUMNS = tuple(field.name for field in fields(Latency))


@dataclass(frozen=True)
class LatencyMs(Cost):
    """Milliseconds of a forward pass: the sum over the layers and the rest of the network.

    Parameters
    ----------
    batch_size
        Samples of a forward pass.
    path
        The `latency.csv` to read; `None` measures this machine at the start of the search.
    """

    batch_size: int = 1
    path: str | None = None

    name = "latency_ms"
    column = "latency_ms"

    def __post_init__(self) -> None:
        check_integer("cost.latency_ms.batch_size", self.batch_size)

    def table(self, space: SearchSpace) -> CostTable:
        """Each group's milliseconds in each scheme; the rest of the network is the constant."""
        if self.path is None:
            raise InputError("cost.latency_ms has no table to read. Measure one: mpsearch hardware, then cost.latency_ms.path=.")
        rows = [row for row in read_latency(self.path) if row.batch_size == self.batch_size]
        measured = {(row.layer, row.scheme): row.milliseconds for row in rows}
        values = [
            [sum(measured.get((layer.name, scheme), np.nan) for layer in group.layers) for scheme in space.scheme_names]
            for group in space.groups
        ]
        table = np.where(space.allowed, values, np.nan)
        missing = np.argwhere(np.isnan(table) & space.allowed)
        if len(missing) or (REST, REST) not in measured:
            i, j = missing[0] if len(missing) else (0, 0)
            raise InputError(
                f"{self.path} has no latency of layer '{space.names[i]}' in scheme '{space.scheme_names[j]}' for a batch of "
                f"{self.batch_size}. Measure this model and these schemes: mpsearch hardware."
            )
        return CostTable(self.name, self.column, np.nan_to_num(table, nan=np.nanmax(table)), measured[REST, REST])


def write_latency(path: Path, rows: Sequence[Latency]) -> None:
    """Write `latency.csv`, atomically."""
    write_rows(path, COLUMNS, [astuple(row) for row in rows])


def read_latency(path: Path | str) -> list[Latency]:
    """The rows of a `latency.csv`, or of a table without checksums that was made by hand; `InputError` where it is damaged."""
    if not Path(path).exists():
        raise InputError(f"There is no latency table {path}. Measure one: mpsearch hardware.")
    measured: set[tuple[str, str, int]] = set()

    def parse(row: Row) -> Latency:
        cells, batch_size = row.cells, row.integer("batch_size", least=1)
        key = cells["layer"], cells["scheme"], batch_size
        if key in measured:
            raise row.damage("scheme", "a layer, scheme and batch size that no earlier row has")
        measured.add(key)
        threads, milliseconds = row.integer("threads", least=1), row.number("milliseconds")
        return Latency(
            cells["layer"], cells["op"], cells["shape"], cells["scheme"], batch_size, threads, cells["backend"], milliseconds
        )

    return read_rows(Path(path), COLUMNS, parse, at_once=True, unchecked=True, remedy="Measure it again: mpsearch hardware")
