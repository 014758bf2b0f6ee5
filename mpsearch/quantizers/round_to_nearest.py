"""Round to nearest between the smallest and the largest weight: the baseline of all other quantizers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mpsearch.quantizers.base import CodedScheme, Codes, Quantizer, kernel_codes


@dataclass(frozen=True)
class RoundToNearest(Quantizer):
    """The range is that of the weights; one outlier widens it for all of its group."""

    def codes(self, matrix: Tensor, scheme: CodedScheme, group_size: int, importance: Tensor | None) -> Codes:
        """Min-max; `importance` is not used."""
        return kernel_codes(matrix, scheme, group_size)
