"""Sums of tensors by name, over the batches of the data."""

from __future__ import annotations

from collections import Counter

from torch import Tensor

LARGE_BYTES = 2**26  # of matrices of which no second copy should be in memory


class Sums:
    """Sums of tensors by name, with the number of rows that each sums over."""

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}
        self.counts: Counter[str] = Counter()

    def add(self, name: str, total: Tensor, count: int) -> None:
        """Add a tensor that is a sum over `count` rows."""
        self.totals[name] = self.totals[name].add_(total) if name in self.totals else total
        self.counts[name] += count

    def add_squares(self, name: str, x: Tensor) -> None:
        """Add x^T x of `[groups, n, columns]`."""
        total = self.totals.get(name)
        if total is None or total.nbytes < LARGE_BYTES:
            self.add(name, x.transpose(1, 2) @ x, x.shape[1])
        else:  # without a second matrix of that size
            total.baddbmm_(x.transpose(1, 2), x)
            self.counts[name] += x.shape[1]

    def means(self) -> dict[str, Tensor]:
        """On the CPU; may be called once."""
        return {name: total.div_(self.counts[name]).cpu() for name, total in self.totals.items()}
