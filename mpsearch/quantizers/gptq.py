"""GPTQ: columns are rounded one after another, and each compensates for the errors of those before it (Frantar et al. 2023).

With H = E[x x^T] of the layer's input, the mean squared error of an output is e^T H e, e being the error of its row. Written
H = (I + A)^T D (I + A), with A strictly lower triangular and D diagonal, it is the sum of D_jj (e_j + sum_(i<j) A_ji e_i)^2, of
which column j can only choose its own code: nearest to w_j - sum_(i<j) A_ji e_i. This is GPTQ's algorithm without the inverse of
H (Chee et al. 2023, QuIP, theorem 6). The scales come first, from the clip search weighted by the diagonal of H.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.quantizers.base import CodedScheme, Codes, InputMoments
from mpsearch.quantizers.clip_search import ClipSearch
from mpsearch.quantizers.grids import RoundingProblem
from mpsearch.schemes.base import FindCodes


@dataclass(frozen=True)
class GPTQ(ClipSearch):
    """Feedback from each column to the later ones.

    A layer without a Hessian (an embedding, a transposed convolution, one that the calibration data do not reach) takes the clip
    search.

    Parameters
    ----------
    n_candidates, min_ratio
        Of the clip search.
    damping
        As a share of the mean of the Hessian's diagonal, added to it. Bounds the feedback where few calibration samples or
        constant columns leave the Hessian singular; ten times more, and a warning, where that is not enough.
    act_order
        Whether columns with the largest inputs are rounded first.
    """

    damping: float = 0.01
    act_order: bool = True
    needs_hessian: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.damping <= 1:
            raise InputError(f"damping, a share of the Hessian's diagonal, must be above 0 and at most 1; got {self.damping}.")

    def work(self, rows: int, columns: int, k: int = 1) -> float:
        """In addition, rounding with feedback, and factoring the Hessian."""
        return super().work(rows, columns, k) + k * columns**2 * (rows + columns)

    def _algorithm(self, moments: InputMoments) -> FindCodes:
        if moments.hessian is None:
            return super()._algorithm(moments)
        hessian = moments.hessian
        damped = moments.derived(("damped", self.damping), lambda: self._damped(hessian))
        return partial(self._codes_by_hessian, hessian=damped)

    def _codes_by_hessian(
        self,
        matrix: Tensor,
        scheme: CodedScheme,
        group_size: int,
        importance: Tensor | None,
        fixed: Tensor | None = None,
        *,
        hessian: Tensor,
    ) -> Codes:
        """`codes` with the damped float64 `hessian` `[k, columns, columns]`."""
        _, scales, zero_points = self._codes_without_feedback(matrix, scheme, group_size, importance)
        problem = RoundingProblem.for_scheme(matrix, hessian, scheme, group_size, scales, zero_points, fixed)
        codes, scales = self._solve(problem, scales.expand(len(problem.weight), -1).contiguous())
        return codes.reshape(matrix.shape), scales[: len(matrix)].contiguous(), zero_points

    def _solve(self, problem: RoundingProblem, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Codes `[rows, columns]` and scales `[rows, n_groups]`; here the given ones."""
        hessian, groups = problem.hessian, problem.groups
        order = torch.arange(len(groups))
        if self.act_order:
            order = hessian.diagonal(dim1=1, dim2=2).sum(0).argsort(descending=True, stable=True)
        feedback, weight = triangular_feedback(hessian[:, order][:, :, order]), problem.weight[:, order].contiguous()
        codes = torch.empty(weight.shape, dtype=torch.uint8)
        codes[:, order] = problem.grid.ordered(order).rounded(weight, feedback, scales, groups[order])
        return codes, scales

    def _damped(self, hessian: Tensor) -> Tensor:
        """float64, positive definite."""
        hessian, share, largest_share = hessian.double(), self.damping, 1.0
        while share <= largest_share:
            damped = damped_by(hessian, share)
            if not torch.linalg.cholesky_ex(damped).info.any():
                if share > self.damping:
                    warnings.warn(
                        f"A Hessian is not positive definite with damping={self.damping:g}; {share:g} was used. More "
                        "calibration data, or a larger damping, make it so.",
                        stacklevel=2,
                    )
                return damped
            share *= 10
        raise InputError(
            f"The Hessian of the layer's input is not positive definite even with {largest_share:g} times its mean diagonal "
            "added. It is not of the form E[x x^T]: check the calibration data, or use quantizer=clip_search for this scheme."
        )


def damped_by(matrix: Tensor, share: float) -> Tensor:
    """`matrix` `[k, n, n]` with `share` of the mean of its diagonal (of 1 where that is 0) added to the diagonal."""
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    mean = torch.where(mean > 0, mean, 1.0)  # no input at all: every error counts alike
    return matrix + torch.diag_embed((share * mean).expand_as(diagonal))


def triangular_feedback(hessian: Tensor) -> Tensor:
    """float32 A `[k, columns, columns]`, strictly lower triangular, of `hessian` = (I + A)^T D (I + A), positive definite."""
    lower = torch.linalg.cholesky(hessian.flip(1, 2)).flip(1, 2)  # upper triangular: H = lower lower^T
    unit = lower / lower.diagonal(dim1=1, dim2=2)[:, None, :]
    return unit.transpose(1, 2).tril(-1).float().contiguous()
