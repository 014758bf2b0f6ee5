"""Sums of tensors by name, over the batches of the data."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from torch import Tensor

from mpsearch.files.scratch import zeros

LARGE_BYTES = 2**25  # of matrices in memory; others are in files


class Sums:
    """Sums of tensors by name, with the number of rows that each sums over.

    Matrices on the CPU of more than `LARGE_BYTES` in all lie in files in the folder `scratch` (`mpsearch.files.scratch`).
    """

    def __init__(self, scratch: Path | None = None) -> None:
        self.scratch = scratch
        self.totals: dict[str, Tensor] = {}
        self.counts: Counter[str] = Counter()
        self._in_memory = 0

    def add(self, name: str, total: Tensor, count: int) -> None:
        """Add a tensor that is a sum over `count` rows."""
        self.totals[name] = self.totals[name].add_(total) if name in self.totals else total
        self.counts[name] += count

    def add_squares(self, name: str, x: Tensor) -> None:
        """Add x^T x of `[groups, n, columns]`."""
        if name in self.totals:
            self.totals[name].baddbmm_(x.transpose(1, 2), x)
        else:
            self.totals[name] = self._first_square(x)
        self.counts[name] += x.shape[1]

    def _first_square(self, x: Tensor) -> Tensor:
        groups, _, columns = x.shape
        n_bytes = 4 * groups * columns**2
        if x.device.type == "cpu" and self._in_memory + n_bytes > LARGE_BYTES:
            return zeros((groups, columns, columns), self.scratch).baddbmm_(x.transpose(1, 2), x)
        self._in_memory += n_bytes
        return x.transpose(1, 2) @ x

    def means(self) -> dict[str, Tensor]:
        """On the CPU; may be called once."""
        return {name: total.div_(self.counts[name]).cpu() for name, total in self.totals.items()}
