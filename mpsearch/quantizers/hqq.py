"""HQQ: half-quadratic quantization, without data (Badri and Shaji 2023, "Half-Quadratic Quantization of Large ML Models").

An error r is measured by |r|^p with p below 1, which allows a few large errors so that most are small. Given an auxiliary error,
found by shrinkage, for the few, scales and zero points have closed forms. p is 3/4 (the authors take 0.7): its shrinkage needs
only roots, which every processor rounds alike. The authors store float zero points and fit those alone. Here a zero point is the
integer nearest to the mean, which minimizes the quadratic in it, and the scale gets its closed form too. Symmetric schemes, whose
zero point is implied, fit the scale alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpsearch import kernels
from mpsearch.errors import InputError
from mpsearch.quantizers.base import CodedScheme, Codes, Quantizer, kernel_codes
from mpsearch.quantizers.clip_search import ClipSearch
from mpsearch.quantizers.grids import float_zeros
from mpsearch.schemes.codebook import Codebook


@dataclass(frozen=True)
class HQQ(Quantizer):
    """Alternating shrinkage and fitting, from the min-max scales and zero points.

    Parameters
    ----------
    n_steps
        Of shrinkage and fitting.
    beta, growth
        Weight of the auxiliary error, in units of the min-max step, and its factor per step.
    """

    n_steps: int = 20
    beta: float = 50.0
    growth: float = 1.01

    def __post_init__(self) -> None:
        if self.n_steps < 1 or self.beta <= 0 or self.growth < 1:
            raise InputError(
                f"HQQ needs n_steps >= 1, beta > 0 and growth >= 1; got {self.n_steps}, {self.beta:g} and {self.growth:g}."
            )

    def codes(self, matrix: Tensor, scheme: CodedScheme, group_size: int, importance: Tensor | None) -> Codes:
        """Those with the least |r|^p of all steps; `importance` is not used. Codebooks take the clip search."""
        if isinstance(scheme, Codebook):
            return ClipSearch().codes(matrix, scheme, group_size, None)
        _, scales, zero_points = kernel_codes(matrix, scheme, group_size)
        codes, scales, zeros = kernels.half_quadratic(
            matrix,
            scales,
            float_zeros(scheme, scales, zero_points),
            bits=scheme.bits,
            group_size=group_size,
            fit_zeros=zero_points is not None,
            n_steps=self.n_steps,
            beta=self.beta,
            growth=self.growth,
        )
        return codes, scales, None if zero_points is None else zeros.to(torch.uint8)
