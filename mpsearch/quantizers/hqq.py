"""HQQ: half-quadratic quantization, without data (Badri and Shaji 2023, "Half-Quadratic Quantization of Large ML Models").

An error r is measured by |r|^p with p below 1, which lets a few weights err much so that the many err little. Where an
auxiliary error, found by shrinkage, takes up the few, the grid has closed forms. p is 3/4 (the authors take 0.7): its shrinkage
needs only roots, which every processor rounds alike. The authors store float zero points and fit those alone. Here a zero point
is a whole number: the quadratic in it is least at the whole number nearest to its mean, which is taken, and the scale gets its
closed form too. Symmetric schemes, whose zero point is implied, fit the scale alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpsearch import kernels
from mpsearch.errors import InputError
from mpsearch.quantizers.base import Quantizer, kernel_codes
from mpsearch.quantizers.clip_search import ClipSearch
from mpsearch.schemes.codebook import Codebook
from mpsearch.schemes.integer import Integer


@dataclass(frozen=True)
class HQQ(Quantizer):
    """`n_steps` of shrinkage and fitting from the min-max grid; `beta` is in units of that grid's step, times `growth` a step."""

    n_steps: int = 20
    beta: float = 50.0
    growth: float = 1.01

    def __post_init__(self) -> None:
        if self.n_steps < 1 or self.beta <= 0 or self.growth < 1:
            raise InputError(
                f"HQQ needs n_steps >= 1, beta > 0 and growth >= 1; {self.n_steps}, {self.beta:g} and {self.growth:g} came."
            )

    def codes(
        self, matrix: Tensor, scheme: Integer | Codebook, group_size: int, importance: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The grid with the least |r|^p on the way; `importance` is of no use here. Codebooks take the clip search."""
        if isinstance(scheme, Codebook):
            return ClipSearch().codes(matrix, scheme, group_size, None)
        _, scales, zero_points = kernel_codes(matrix, scheme, group_size)
        middle = 0.5 if scheme.bits == 1 else float(2 ** (scheme.bits - 1))
        zeros = torch.full(scales.shape, middle) if zero_points is None else zero_points.float()
        codes, scales, zeros = kernels.half_quadratic(
            matrix,
            scales,
            zeros,
            bits=scheme.bits,
            group_size=group_size,
            fit_zeros=zero_points is not None,
            n_steps=self.n_steps,
            beta=self.beta,
            growth=self.growth,
        )
        return codes, scales, None if zero_points is None else zeros.to(torch.uint8)
