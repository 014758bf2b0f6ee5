"""Round to nearest between the smallest and the largest weight: the baseline that every other quantizer is to beat."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mpsearch.quantizers.base import Quantizer, kernel_codes
from mpsearch.schemes.codebook import Codebook
from mpsearch.schemes.integer import Integer


@dataclass(frozen=True)
class RoundToNearest(Quantizer):
    """The range is the weights' own; one outlier stretches it for all of its group."""

    def codes(
        self, matrix: Tensor, scheme: Integer | Codebook, group_size: int, importance: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Min-max; `importance` is of no use here."""
        return kernel_codes(matrix, scheme, group_size)
