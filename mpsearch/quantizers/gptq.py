"""GPTQ: columns are rounded one after another, and each makes up for the errors of those before it (Frantar et al. 2023).

With H = E[x x^T] of the layer's input, the mean squared error of an output is e^T H e, e being the error of its row. Written
H = (I + A)^T D (I + A), with A strictly lower triangular and D diagonal, it is the sum of D_jj (e_j + sum_(i<j) A_ji e_i)^2, of
which column j can only choose its own code: nearest to w_j - sum_(i<j) A_ji e_i. This is GPTQ's algorithm without the inverse of
H (Chee et al. 2023, QuIP, theorem 6). The scales come first, of the clip search weighted by the diagonal of H.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.quantizers.base import InputMoments
from mpsearch.quantizers.clip_search import ClipSearch
from mpsearch.quantizers.grids import Grid, Integers, LevelGrid
from mpsearch.schemes.base import QuantizedTensor, QuantScheme
from mpsearch.schemes.codebook import Codebook
from mpsearch.schemes.integer import Integer


@dataclass(frozen=True)
class GPTQ(ClipSearch):
    """Feedback from each column to the later ones; `act_order` takes columns with the largest inputs first.

    `damping` times the mean of its diagonal is added to the Hessian, which bounds the feedback where few calibration samples or
    columns that never vary leave it singular; ten times more, and a warning, where that is not enough. A layer without a Hessian
    (an embedding, a transposed convolution, one that the calibration data do not reach) takes the clip search.
    """

    damping: float = 0.01
    act_order: bool = True
    needs_hessian: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.damping <= 1:
            raise InputError(f"damping is above 0 and at most 1, as a share of the Hessian's diagonal; {self.damping} came.")

    def quantize(self, weight: Tensor, scheme: QuantScheme, moments: InputMoments | None = None) -> QuantizedTensor:
        """`weight` (float32, output channels first) as `scheme` stores it, by the moments' Hessian."""
        if moments is None or moments.hessian is None:
            return super().quantize(weight, scheme, moments)
        moments = moments.for_scheme(scheme)
        assert moments.hessian is not None
        codes = partial(self._codes_by_hessian, hessian=self._damped(moments.hessian))
        return scheme.quantize(weight, codes, moments.second_moment, moments.histogram)

    def _codes_by_hessian(
        self,
        matrix: Tensor,
        scheme: Integer | Codebook,
        group_size: int,
        importance: Tensor | None,
        fixed: Tensor | None = None,
        *,
        hessian: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """`codes` with the damped float64 `hessian` `[k, columns, columns]`; a matrix of one row is a whole tensor."""
        _, scales, zero_points = self.codes(matrix, scheme, group_size, importance)
        columns = hessian.shape[-1]
        weight = matrix.reshape(-1, columns)
        groups = (torch.arange(columns) // group_size).int()
        rows, grid = len(weight), self._grid(scheme, scales, zero_points, weight.shape, fixed)
        codes, scales = self._solve(weight, hessian, scales.expand(rows, -1).contiguous(), grid, groups, len(matrix) < rows)
        return codes.reshape(matrix.shape), scales[: len(matrix)].contiguous(), zero_points

    def _grid(
        self,
        scheme: Integer | Codebook,
        scales: Tensor,
        zero_points: Tensor | None,
        shape: torch.Size,
        fixed: Tensor | None,
    ) -> Grid:
        fixed = None if fixed is None else fixed.reshape(shape)
        if isinstance(scheme, Codebook):
            return LevelGrid(scheme, fixed=fixed)
        middle = 0.5 if scheme.bits == 1 else float(2 ** (scheme.bits - 1))
        zeros = torch.full(scales.shape, middle) if zero_points is None else zero_points.float()
        return Integers(scheme.bits, zeros.expand(shape[0], -1).contiguous(), scales.dtype, fixed=fixed)

    def _solve(
        self, weight: Tensor, hessian: Tensor, scales: Tensor, grid: Grid, groups: Tensor, shared: bool
    ) -> tuple[Tensor, Tensor]:
        """Codes `[rows, columns]` and scales `[rows, n_groups]`, here as they came; where `shared`, all rows have one."""
        order = torch.arange(len(groups))
        if self.act_order:
            order = hessian.diagonal(dim1=1, dim2=2).sum(0).argsort(descending=True, stable=True)
        feedback = triangular_feedback(hessian[:, order][:, :, order])
        codes = torch.empty(weight.shape, dtype=torch.uint8)
        codes[:, order] = grid.ordered(order).rounded(weight[:, order].contiguous(), feedback, scales, groups[order])
        return codes, scales

    def _damped(self, hessian: Tensor) -> Tensor:
        """float64, positive definite."""
        hessian = hessian.double()
        diagonal = hessian.diagonal(dim1=1, dim2=2)
        mean = diagonal.mean(1)
        mean = torch.where(mean > 0, mean, 1.0)[:, None]  # no input at all: every error counts alike
        share, most = self.damping, 1.0
        while share <= most:
            damped = hessian + torch.diag_embed((share * mean).expand_as(diagonal))
            if not torch.linalg.cholesky_ex(damped).info.any():
                if share > self.damping:
                    warnings.warn(
                        f"A Hessian is not positive definite with damping={self.damping:g}; {share:g} was taken. More "
                        "calibration data, or a larger damping, make it so.",
                        stacklevel=2,
                    )
                return damped
            share *= 10
        raise InputError(
            f"The Hessian of the layer's input is not positive definite even with {most:g} times its mean diagonal added. It is "
            "not of the form E[x x^T]: check the calibration data, or take quantizer=clip_search for this scheme."
        )


def triangular_feedback(hessian: Tensor) -> Tensor:
    """float32 A `[k, columns, columns]`, strictly lower triangular, of `hessian` = (I + A)^T D (I + A), positive definite."""
    lower = torch.linalg.cholesky(hessian.flip(1, 2)).flip(1, 2)  # upper triangular: H = lower lower^T
    unit = lower / lower.diagonal(dim1=1, dim2=2)[:, None, :]
    return unit.transpose(1, 2).tril(-1).float().contiguous()
