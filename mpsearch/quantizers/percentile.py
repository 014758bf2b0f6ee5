"""Percentile clipping: the range leaves out the given share of the weights at its ends, so that outliers saturate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.quantizers.base import Quantizer, kernel_codes
from mpsearch.schemes.codebook import Codebook
from mpsearch.schemes.integer import Integer


@dataclass(frozen=True)
class Percentile(Quantizer):
    """Clips each group to its `percentile` (of |w| where symmetric, of both tails else) before rounding to nearest.

    The percentile is interpolated linearly between order statistics. In a group of n weights one outlier is cut off only where
    `percentile` is below about 100 * (1 - 1/n).
    """

    percentile: float = 99.9

    def __post_init__(self) -> None:
        if not 50 < self.percentile <= 100:
            raise InputError(f"percentile is above 50 and at most 100; {self.percentile} came.")

    def codes(
        self, matrix: Tensor, scheme: Integer | Codebook, group_size: int, importance: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Clipped to the percentile, then min-max; `importance` is of no use here."""
        if not torch.isfinite(matrix).all():
            return kernel_codes(matrix, scheme, group_size)  # which counts them and raises
        clipped = torch.cat([self._clip(part, scheme.symmetric) for part in matrix.split(group_size, dim=1)], dim=1)
        return kernel_codes(clipped.contiguous(), scheme, group_size)

    def _clip(self, part: Tensor, symmetric: bool) -> Tensor:
        if part.numel() == 0:
            return part
        share = self.percentile / 100
        if symmetric:
            high = _quantile(part.abs(), share)
            return part.clamp(-high, high)
        return part.clamp(_quantile(part, 1 - share), _quantile(part, share))


def _quantile(rows: Tensor, share: float) -> Tensor:
    """Linear quantile of each row, `[rows, 1]`; torch.quantile refuses more than 16 million elements, a sort does not."""
    ordered = rows.sort(dim=1).values
    position = share * (rows.shape[1] - 1)
    below = int(position)
    above = min(below + 1, rows.shape[1] - 1)
    return torch.lerp(ordered[:, below : below + 1], ordered[:, above : above + 1], position - below)
