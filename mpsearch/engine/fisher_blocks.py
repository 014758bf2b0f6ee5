"""Output Fishers of many rows: the blocks on their diagonal stand for them.

A language model's head has a row for each word: its matrix would take 10 GB, and its factors several times as much. The errors of
rows in different blocks then do not compensate for one another.
"""

from __future__ import annotations

import math
from typing import Any

from mpsearch.layer import rows_shape
from mpsearch.progress import say_once

MOST_ROWS = 8192  # of a matrix that is kept whole: 0.3 GB, of which factoring takes six times as much
BLOCK_ROWS = 2048  # at most, of a block


def fisher_blocks(rows: int) -> int:
    """How many blocks stand for the matrix of so many rows: 1, the whole, up to `MOST_ROWS`.

    Else the fewest of equal size with at most `BLOCK_ROWS` rows; single rows at worst, which take the coordinate descent.
    """
    if rows <= MOST_ROWS:
        return 1
    return next(n for n in range(-(-rows // BLOCK_ROWS), rows + 1) if rows % n == 0)


def say_if_in_blocks(layer: str, rows: int) -> None:
    """Say once, on the console, that the layer's output Fisher is not whole."""
    if (n := fisher_blocks(rows)) > 1:
        say_once(
            f"The output Fisher of layer '{layer}' would take {4e-9 * rows**2:.1f} GB: {n} blocks of {rows // n} rows on its "
            f"diagonal stand for it ({4e-9 * rows**2 / n:.1f} GB)."
        )


def hessian_bytes(module: Any) -> int:
    """The bytes of the matrices that `hessians` returns for a module."""
    columns = math.prod(rows_shape(module)[1:])
    return 4 * getattr(module, "groups", 1) * columns**2


def fisher_bytes(module: Any) -> int:
    """The bytes of the matrices that `output_fishers` returns for a module."""
    groups = getattr(module, "groups", 1)
    rows = rows_shape(module)[0] // groups
    return 4 * groups * rows**2 // fisher_blocks(rows)
