"""Coordinate descent on the loss increase due to a layer's outputs jointly, not to each output alone (YAQA, Tseng et al. 2025).

With H = E[x x^T] of the layer's input and G = E[g g^T] of the gradient of the loss at its output, a change E of the weight costs
about 1/2 tr(G E H E^T): the Fisher information of the weight, factored as by Martens and Grosse 2015 (K-FAC, equation 5). The
error of the output alone, tr(E H E^T), treats rows independently; here the error of one row can compensate for those of others.
The first codes come from rounding with feedback between rows as well as between columns, the two-sided form of GPTQ. Then every
weight in turn moves to the code that is best with all others as they are, and each scale to the value that is best for its codes,
so that the error never grows. `kernels.round_jointly` does both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from mpsearch import kernels
from mpsearch.errors import InputError
from mpsearch.quantizers.base import CodedScheme, Codes, InputMoments
from mpsearch.quantizers.block_fit import refitted
from mpsearch.quantizers.coordinate_descent import CoordinateDescent
from mpsearch.quantizers.gptq import GPTQ, damped_by, triangular_feedback
from mpsearch.quantizers.grids import BlockGrid, Integers, RoundingProblem
from mpsearch.schemes.base import FindCodes
from mpsearch.schemes.codebook import Codebook
from mpsearch.schemes.k_quant import KQuant

KEPT_BYTES = 2**28  # of output Fishers, whose factors are kept in twice as much
FIRST_DAMPING = 3.0  # times `output_damping`, for the first codes: they follow G furthest, also where it is noise


@dataclass(frozen=True)
class KroneckerDescent(CoordinateDescent):
    """Passes over all weights, after rounding with feedback between rows and columns.

    Codebooks, blocks of llama.cpp with a table, depthwise layers and layers without a gradient take the coordinate descent.

    Parameters
    ----------
    n_candidates, min_ratio, damping, n_sweeps
        Of the coordinate descent.
    act_order
        Whether columns with the largest inputs, and rows with the largest gradients, are rounded first.
    n_passes
        At most so many passes; a pass that changes nothing is the last.
    output_damping
        As a share of the mean of G's diagonal, added to it; G is known from few samples only.
    """

    n_passes: int = 4
    output_damping: float = 0.1
    needs_fisher: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_passes < 1 or self.output_damping <= 0:
            raise InputError(
                f"n_passes must be 1 or more and output_damping above 0; got {self.n_passes} and {self.output_damping:g}. For no "
                "pass, use quantizer=coordinate_descent."
            )

    def work(self, rows: int, columns: int, k: int = 1) -> float:
        """Passes over rows and columns in place of sweeps over columns."""
        return GPTQ.work(self, rows, columns, k) + self.n_passes * k * rows * columns * (rows + 2.0 * columns)

    def _algorithm(self, moments: InputMoments) -> FindCodes:
        if moments.hessian is None or moments.fisher is None or moments.fisher.shape[1] == 1:
            return super()._algorithm(moments)
        return partial(self._codes_by_both, moments=moments)

    def _codes_by_both(
        self,
        matrix: Tensor,
        scheme: CodedScheme,
        group_size: int,
        importance: Tensor | None,
        fixed: Tensor | None = None,
        *,
        moments: InputMoments,
    ) -> Codes:
        """`codes` with the Hessian and the output Fisher of `moments`."""
        if isinstance(scheme, Codebook) or (isinstance(scheme, KQuant) and scheme.blocks.table):
            algorithm = super()._algorithm(moments)
            return algorithm(matrix, scheme, group_size, importance, fixed)
        assert moments.hessian is not None
        _, scales, zero_points = self._codes_without_feedback(matrix, scheme, group_size, importance)
        problem = RoundingProblem.for_scheme(matrix, moments.hessian, scheme, group_size, scales, zero_points, fixed)
        scales = scales.expand(len(problem.weight), -1).clone()
        codes = torch.empty(problem.weight.shape, dtype=torch.uint8)
        assert moments.fisher is not None
        of_inputs, n = moments.derived(("feedback", self), lambda: self._between_columns(moments)), len(moments.fisher)
        per, jointly = len(codes) // n, self._in_blocks if isinstance(scheme, KQuant) else self._jointly
        for i in range(n):
            part, columns = slice(i * per, (i + 1) * per), of_inputs[i * len(of_inputs) // n]
            codes[part], scales[part] = jointly(problem, part, self._between_rows(moments, i), columns, scales[part])
        return codes.reshape(matrix.shape), scales[: len(matrix)].contiguous(), zero_points

    def _between_columns(self, moments: InputMoments) -> list[Feedback]:
        """For each group of a convolution."""
        assert moments.hessian is not None
        hessian = self._damped(moments.hessian)
        return Feedback.from_matrices(hessian, hessian, self.act_order)

    def _between_rows(self, moments: InputMoments, i: int) -> Feedback:
        """For the `i`-th group of a convolution, or block of many rows; kept for the next scheme unless all of them are large."""
        assert moments.fisher is not None
        fisher = moments.fisher

        def make() -> Feedback:
            matrix = fisher[i : i + 1].double()
            damped, first = (damped_by(matrix, min(share * self.output_damping, 1.0)) for share in (1.0, FIRST_DAMPING))
            return Feedback.from_matrices(damped, first, self.act_order)[0]

        return make() if fisher.nbytes > KEPT_BYTES else moments.derived(("rows", self, i), make)

    def _jointly(
        self, problem: RoundingProblem, part: slice, rows: Feedback, columns: Feedback, scales: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Codes and scales of the rows `part`, to which the feedback belongs."""
        weight, grid, groups = problem.weight[part], problem.grid, problem.groups
        assert isinstance(grid, Integers)
        zeros, fixed = grid.zeros[part], None if grid.fixed is None else grid.fixed[part].contiguous()
        codes = _first_codes(weight, rows, columns, scales, zeros, groups, grid.bits, fixed)
        codes, scales, _ = kernels.round_jointly(
            weight,
            rows.full,
            columns.full,
            scales,
            zeros,
            groups,
            bits=grid.bits,
            codes=codes,
            fixed=fixed,
            n_passes=self.n_passes,
            n_fits=0 if problem.shared else self.n_passes,
            column_weights=columns.weights,
        )
        return codes, scales

    def _in_blocks(
        self, problem: RoundingProblem, part: slice, rows: Feedback, columns: Feedback, steps: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same of llama.cpp's blocks: codes and steps."""
        weight, grid, groups = problem.weight[part], problem.grid, problem.groups
        assert isinstance(grid, BlockGrid)
        bits = grid.scheme.weight_bits
        fisher, hessian = (each.weights[:, None] * each.full for each in (rows, columns))
        codes = _first_codes(weight, rows, columns, *grid.affine(steps), groups, bits)
        for _ in range(self.n_passes):
            steps = refitted(grid.scheme, codes, steps, weight, hessian, fisher)
            scales, zeros = grid.affine(steps)
            feedback = rows.full, columns.full
            codes, _, n_changed = kernels.round_jointly(weight, *feedback, scales, zeros, groups, bits=bits, codes=codes)
            if not n_changed.any():
                break
        return codes, steps


@dataclass(frozen=True, eq=False)
class Feedback:
    """What errors do to one another by a matrix M, float32 `[n, n]`, positive definite: H of columns or G of rows.

    Attributes
    ----------
    order
        int64 `[n]`: which are rounded first.
    triangular
        I + A of M = (I + A)^T D (I + A), A strictly lower triangular, M in that order, and damped more for G.
    full
        M, each row divided by its diagonal.
    weights
        float32 `[n]`: the diagonal.
    """

    order: Tensor
    triangular: Tensor
    full: Tensor
    weights: Tensor

    @classmethod
    def from_matrices(cls, matrices: Tensor, first: Tensor, largest_first: bool) -> list[Feedback]:
        """Of each matrix of float64 `[k, n, n]`; the triangular ones of `first`, shaped like it."""
        feedback = []
        for matrix, other in zip(matrices, first, strict=True):
            diagonal = matrix.diagonal()
            order = diagonal.argsort(descending=True, stable=True) if largest_first else torch.arange(len(diagonal))
            triangular = triangular_feedback(other[order][:, order][None])[0].fill_diagonal_(1.0)
            feedback.append(cls(order, triangular, (matrix / diagonal[:, None]).float(), diagonal.float().contiguous()))
        return feedback


def _first_codes(
    weight: Tensor,
    rows: Feedback,
    columns: Feedback,
    scales: Tensor,
    zeros: Tensor,
    groups: Tensor,
    bits: int,
    fixed: Tensor | None = None,
) -> Tensor:
    """By rounding with feedback between rows and columns, each in its order; arguments as of `kernels.round_jointly`."""
    ordered = [None if x is None else x[rows.order][:, columns.order].contiguous() for x in (weight, fixed)]
    first, _, _ = kernels.round_jointly(
        ordered[0],  # type: ignore[arg-type]
        rows.triangular,
        columns.triangular,
        scales[rows.order],
        zeros[rows.order],
        groups[columns.order],
        bits=bits,
        fixed=ordered[1],
    )
    codes = torch.empty_like(first)
    codes[rows.order[:, None], columns.order] = first
    return codes
