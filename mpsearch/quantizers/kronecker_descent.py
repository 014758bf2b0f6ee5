"""Coordinate descent on the loss increase due to a layer's outputs jointly, not to each output alone (YAQA, Tseng et al. 2025).

With H = E[x x^T] of the layer's input and G = E[g g^T] of the gradient of the loss at its output, a change E of the weight costs
about 1/2 tr(G E H E^T): the Fisher information of the weight, factored as by Martens and Grosse 2015 (K-FAC, equation 5). The
error of the output alone, tr(E H E^T), treats rows independently; here the error of one row can compensate for those of others.
With all rows but r as they are, r adds least where (e_r + b) H (e_r + b)^T is least, b = sum_(s != r) G_rs e_s / G_rr: a row is
rounded as by coordinate descent, to w_r - b. Rows take turns, starting from the result of coordinate descent for each alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.quantizers.base import CodedScheme, Codes, InputMoments
from mpsearch.quantizers.coordinate_descent import CoordinateDescent
from mpsearch.quantizers.gptq import damped_by
from mpsearch.quantizers.grids import Integers, RoundingProblem
from mpsearch.schemes.base import FindCodes

BLOCK = 64  # rows whose errors reach one another at once, and the others' by a matrix product


@dataclass(frozen=True)
class KroneckerDescent(CoordinateDescent):
    """Passes over all rows; the codes with the least error of all passes are taken.

    Codebooks, depthwise layers and layers without a gradient take the coordinate descent.

    Parameters
    ----------
    n_candidates, min_ratio, damping, act_order, n_sweeps
        Of the coordinate descent.
    n_passes
        Over all rows.
    output_damping
        As a share of the mean of G's diagonal, added to it; G is known from few samples only.
    """

    n_passes: int = 3
    output_damping: float = 0.1
    needs_fisher: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_passes < 1 or self.output_damping <= 0:
            raise InputError(
                f"n_passes must be 1 or more and output_damping above 0; got {self.n_passes} and {self.output_damping:g}. For no "
                "pass, use quantizer=coordinate_descent."
            )

    def _algorithm(self, moments: InputMoments) -> FindCodes:
        if moments.hessian is None or moments.fisher is None or moments.fisher.shape[1] == 1:
            return super()._algorithm(moments)
        fisher = damped_by(moments.fisher.double(), self.output_damping)
        return partial(self._codes_by_both, hessian=self._damped(moments.hessian), fisher=fisher)

    def _codes_by_both(
        self,
        matrix: Tensor,
        scheme: CodedScheme,
        group_size: int,
        importance: Tensor | None,
        fixed: Tensor | None = None,
        *,
        hessian: Tensor,
        fisher: Tensor,
    ) -> Codes:
        """`codes` with float64 `hessian` `[k, columns, columns]` and `fisher` `[k, rows / k, rows / k]`, both damped."""
        codes, scales, zero_points = self._codes_by_hessian(matrix, scheme, group_size, importance, fixed, hessian=hessian)
        problem = RoundingProblem.for_scheme(matrix, hessian, scheme, group_size, scales, zero_points, fixed)
        if not isinstance(problem.grid, Integers):
            return codes, scales, zero_points
        codes, row_scales = codes.reshape(problem.weight.shape).clone(), scales.expand(len(problem.weight), -1).clone()
        k, per = fisher.shape[:2]
        for i in range(k):
            part = slice(i * per, (i + 1) * per)
            rows = JointRows(
                problem.weight[part],
                hessian[i],
                fisher[i],
                problem.grid.of_rows(part),
                problem.groups,
                fit_scales=not problem.shared,
            )
            codes[part], row_scales[part] = rows.descend(codes[part], row_scales[part], self.n_passes)
        return codes.reshape(matrix.shape), row_scales[: len(matrix)].contiguous(), zero_points


@dataclass(frozen=True, eq=False)
class JointRows:
    """The rows of one group of a convolution (else all): `weight` float32 `[rows, columns]` on `grid`, with its H and G."""

    weight: Tensor
    hessian: Tensor
    fisher: Tensor
    grid: Integers
    groups: Tensor
    fit_scales: bool

    def descend(self, codes: Tensor, scales: Tensor, n_passes: int) -> tuple[Tensor, Tensor]:
        """Codes `[rows, columns]` and scales `[rows, n_groups]` with the least error, of the given ones and after each pass."""
        hessian = self.hessian.float()[None]
        feedback = hessian / hessian.diagonal(dim1=1, dim2=2)[:, :, None]
        coupling = (self.fisher / self.fisher.diagonal()[:, None]).float().fill_diagonal_(0.0)
        codes, scales = codes.clone(), scales.clone()
        errors = RoundingProblem(self.weight, hessian, self.grid, self.groups).dequantized(codes, scales) - self.weight
        least, best = self.cost(errors), (codes.clone(), scales.clone())
        for _ in range(n_passes):
            for begin in range(0, len(codes), BLOCK):
                block = slice(begin, begin + BLOCK)
                pulls = coupling[block] @ errors
                for i in range(len(pulls)):
                    row = slice(begin + i, begin + i + 1)
                    target = self.weight[row] - pulls[i : i + 1]
                    problem = RoundingProblem(target, hessian, self.grid.of_rows(row), self.groups)
                    if self.fit_scales:
                        scales[row] = problem.fitted_scales(codes[row], scales[row])
                    start = problem.dequantized(codes[row], scales[row]) - target
                    codes[row] = problem.grid.rounded(target, feedback, scales[row], self.groups, start)
                    error = problem.dequantized(codes[row], scales[row]) - self.weight[row]
                    pulls.addr_(coupling[block, begin + i], (error - errors[row])[0])
                    errors[row] = error
            if (cost := self.cost(errors)) < least:
                least, best = cost, (codes.clone(), scales.clone())
        return best

    def cost(self, errors: Tensor) -> float:
        """tr(G E H E^T)."""
        e = errors.double()
        return float((self.fisher * (e @ self.hessian @ e.T)).sum())
