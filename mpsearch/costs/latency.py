"""Latency, from what `hardware` measured on this machine: the table that it writes and this cost reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np

from mpsearch.allocation import SearchSpace
from mpsearch.costs.base import Cost, CostTable
from mpsearch.errors import InputError
from mpsearch.files.csv_rows import Row, read_rows, write_rows

FLOAT, REST = "float", ""  # in the column scheme: the float layer; in the column layer: what is no searched layer


@dataclass(frozen=True)
class Latency:
    """A row of `latency.csv`: what a layer takes in a scheme, in `milliseconds` for all calls of one forward pass.

    `layer` is empty for the rest of the network. `op` is the kernel that runs, "dequantize" where there is none, the kind of
    layer where `scheme` is "float"; `shape` is the input's. Measured on `backend` with `threads` threads, `batch_size` samples.
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
    """Milliseconds of a forward pass of `batch_size` samples: the sum of the layers' and of the rest.

    `path` is the `latency.csv` to read; `null` measures this machine at the start of the search.
    """

    batch_size: int = 1
    path: str | None = None

    name = "latency_ms"
    column = "latency_ms"

    def __post_init__(self) -> None:
        if type(self.batch_size) is not int or self.batch_size < 1:
            raise InputError(f"cost.latency_ms.batch_size is a whole number from 1; {self.batch_size!r} came.")

    def table(self, space: SearchSpace) -> CostTable:
        """Each group's milliseconds in each scheme; the rest of the network is the constant."""
        if self.path is None:
            raise InputError("cost.latency_ms has no table to read. Measure one: mpsearch hardware, then cost.latency_ms.path=.")
        rows = read_latency(self.path)
        found = {(row.layer, row.scheme): row.milliseconds for row in rows if row.batch_size == self.batch_size}
        values = np.full((len(space.groups), len(space.schemes)), np.nan)
        for i, group in enumerate(space.groups):
            for j, scheme in enumerate(space.scheme_names):
                if space.allowed[i, j]:
                    values[i, j] = sum(found.get((layer.name, scheme), np.nan) for layer in group.layers)
        missing = np.argwhere(np.isnan(values) & space.allowed)
        if len(missing) or (REST, REST) not in found:
            i, j = missing[0] if len(missing) else (0, 0)
            raise InputError(
                f"{self.path} has no latency of layer '{space.names[i]}' in scheme '{space.scheme_names[j]}' for a batch of "
                f"{self.batch_size}. Measure this model and these schemes: mpsearch hardware."
            )
        return CostTable(self.name, self.column, np.nan_to_num(values, nan=np.nanmax(values)), found[REST, REST])


def write_latency(path: Path, rows: Sequence[Latency]) -> None:
    """`latency.csv`, replaced in one step."""
    write_rows(path, COLUMNS, [astuple(row) for row in rows])


def read_latency(path: Path | str) -> list[Latency]:
    """The rows of a `latency.csv`, or of a table that was made by hand and has no checksums; `InputError` where it is damaged."""
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
