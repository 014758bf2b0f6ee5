"""Any cost from a table of the user's: latency, energy or area of hardware that is not at hand, or not built yet."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from mpsearch.allocation import SearchSpace
from mpsearch.costs.base import Cost, CostTable
from mpsearch.errors import InputError, check_integer, did_you_mean, one_line

COLUMNS = ("layer", "scheme", "value")
BATCH_SIZE = "batch_size"


@dataclass(frozen=True)
class TableCost(Cost):
    """The sum of a value for each layer in its scheme, from a CSV file.

    The file has the columns `layer` (a name, or a pattern with `*` and `?`), `scheme` and `value`, and may have `batch_size`. A
    row with a name goes before rows with patterns. A row without layer and scheme is the cost of everything else.

    Parameters
    ----------
    path
        The file.
    batch_size
        The rows that count, of a file with that column.
    """

    path: str | None = None
    batch_size: int | None = None

    name = "table"
    column = "table_cost"

    def __post_init__(self) -> None:
        if self.batch_size is not None:
            check_integer("cost.table.batch_size", self.batch_size)

    def table(self, space: SearchSpace) -> CostTable:
        """Each group's cost in each scheme; `InputError` for an entry that is missing or not unique."""
        rows = self._rows()
        rest = [value for layer, scheme, value in rows if not layer and not scheme]
        if len(rest) > 1:
            raise InputError(f"{self.path} has {len(rest)} rows without a layer and a scheme; expected one, or none.")
        values = np.zeros(space.allowed.shape)
        for i, j in np.argwhere(space.allowed):
            values[i, j] = sum(self._value(rows, layer.name, space.scheme_names[j]) for layer in space.groups[i].layers)
        return CostTable(self.name, self.column, values, rest[0] if rest else 0.0)

    def _value(self, rows: list[tuple[str, str, float]], layer: str, scheme: str) -> float:
        of_scheme = [(name, value) for name, at, value in rows if at == scheme]
        matching = [value for name, value in of_scheme if name == layer]
        matching = matching or [value for name, value in of_scheme if name and fnmatch.fnmatchcase(layer, name)]
        if len(matching) == 1:
            return matching[0]
        if matching:
            raise InputError(f"{self.path} has {len(matching)} rows for layer '{layer}' in scheme '{scheme}'; expected one.")
        known = sorted({name for name, _, _ in rows if name})
        raise InputError(
            f"{self.path} has no row for layer '{layer}' in scheme '{scheme}'. Add it, or a pattern such as *."
            f"{did_you_mean(layer, known)}"
        )

    def _rows(self) -> list[tuple[str, str, float]]:
        """(layer, scheme, value) of the rows that count."""
        if self.path is None or not Path(self.path).expanduser().is_file():
            raise InputError(f"There is no cost table {self.path}. Set cost.table.path to a CSV file: {', '.join(COLUMNS)}.")
        try:
            table = pd.read_csv(Path(self.path).expanduser(), dtype={"layer": str, "scheme": str}, keep_default_na=False)
            if absent := [column for column in COLUMNS if column not in table]:
                raise ValueError(f"it has no column {', '.join(absent)}")
            values = table["value"].to_numpy(dtype=np.float64)
            if (bad := np.flatnonzero(~np.isfinite(values) | (values < 0))).size:
                raise ValueError(f"the value of row {bad[0] + 1} is {table['value'][bad[0]]}, expected a number of 0 or more")
        except Exception as error:  # a damaged file can raise anything
            raise InputError(f"{self.path} is not a cost table: {one_line(error)}.") from error
        counted = np.ones(len(table), dtype=bool)
        if BATCH_SIZE in table:
            sizes = sorted(set(table[BATCH_SIZE]))
            if self.batch_size is None and len(sizes) > 1:
                raise InputError(f"{self.path} has rows for batch sizes {', '.join(map(str, sizes))}. Set cost.table.batch_size.")
            counted = np.ones(len(table), bool) if self.batch_size is None else (table[BATCH_SIZE] == self.batch_size).to_numpy()
        rows = zip(table["layer"], table["scheme"], values, counted, strict=True)
        return [(layer, scheme, float(value)) for layer, scheme, value, counts in rows if counts]
