"""Percentile clipping: a given share of the weights at the ends of the range saturates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.quantizers.base import CodedScheme, Codes, Quantizer, kernel_codes


@dataclass(frozen=True)
class Percentile(Quantizer):
    """Clip each group to a percentile before rounding to nearest.

    In a group of n weights one outlier is cut off only where `percentile` is below about 100 * (1 - 1/n).

    Parameters
    ----------
    percentile
        Of |w| where the scheme is symmetric, else of both tails; above 50 and at most 100. Interpolated linearly between order
        statistics.
    """

    percentile: float = 99.9

    def __post_init__(self) -> None:
        if not 50 < self.percentile <= 100:
            raise InputError(f"percentile must be above 50 and at most 100; got {self.percentile}.")

    def codes(self, matrix: Tensor, scheme: CodedScheme, group_size: int, importance: Tensor | None) -> Codes:
        """Clipped to the percentile, then min-max; `importance` is not used."""
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
    """Linear quantile of each row, `[rows, 1]`; torch.quantile is limited to 16 million elements, a sort is not."""
    ordered = rows.sort(dim=1).values
    position = share * (rows.shape[1] - 1)
    below = int(position)
    above = min(below + 1, rows.shape[1] - 1)
    return torch.lerp(ordered[:, below : below + 1], ordered[:, above : above + 1], position - below)
