"""Coordinate descent on what the loss minds of a layer's outputs together, not of each output alone (YAQA, Tseng et al. 2025).

With H = E[x x^T] of the layer's input and G = E[g g^T] of the gradient of the loss at its output, a change E of the weight costs
about 1/2 tr(G E H E^T): the Fisher information of the weight, factored as by Martens and Grosse 2015 (K-FAC, equation 5). The
error of the output alone, tr(E H E^T), lets each row err by itself; here the error of one row can make up for those of others.
Where all rows but r are as they are, what r adds is least where (e_r + b) H (e_r + b)^T is, b = sum_(s != r) G_rs e_s / G_rr: a
row is rounded as by coordinate descent, to w_r - b. Rows take turns, from what coordinate descent finds for each alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.quantizers.base import InputMoments
from mpsearch.quantizers.coordinate_descent import CoordinateDescent, dequantized, fitted_scales
from mpsearch.quantizers.grids import Integers
from mpsearch.schemes.base import QuantizedTensor, QuantScheme
from mpsearch.schemes.codebook import Codebook
from mpsearch.schemes.integer import Integer

BLOCK = 64  # rows whose errors reach one another at once, and the others' by a matrix product


@dataclass(frozen=True)
class KroneckerDescent(CoordinateDescent):
    """`n_passes` over all rows; of what was met after each, the least error is taken.

    `output_damping` times the mean of its diagonal is added to G, which is known from few samples only. Codebooks, depthwise
    layers and layers of which no gradient is had take the coordinate descent.
    """

    n_passes: int = 3
    output_damping: float = 0.1
    needs_fisher: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_passes < 1 or self.output_damping <= 0:
            raise InputError(
                f"n_passes is 1 or more and output_damping above 0; {self.n_passes} and {self.output_damping:g} came. For no "
                "pass, take quantizer=coordinate_descent."
            )

    def quantize(self, weight: Tensor, scheme: QuantScheme, moments: InputMoments | None = None) -> QuantizedTensor:
        """`weight` (float32, output channels first) as `scheme` stores it, by the moments' Hessian and Fisher information."""
        if moments is None or moments.hessian is None or moments.fisher is None or moments.fisher.shape[1] == 1:
            return super().quantize(weight, scheme, moments)
        moments = moments.for_scheme(scheme)
        assert moments.hessian is not None
        assert moments.fisher is not None
        fisher = moments.fisher.double()
        diagonal = fisher.diagonal(dim1=1, dim2=2)
        mean = diagonal.mean(1, keepdim=True)
        damping = self.output_damping * torch.where(mean > 0, mean, 1.0)
        fisher = fisher + torch.diag_embed(damping.expand_as(diagonal))
        codes = partial(self._codes_by_both, hessian=self._damped(moments.hessian), fisher=fisher)
        return scheme.quantize(weight, codes, moments.second_moment, moments.histogram)

    def _codes_by_both(
        self,
        matrix: Tensor,
        scheme: Integer | Codebook,
        group_size: int,
        importance: Tensor | None,
        fixed: Tensor | None = None,
        *,
        hessian: Tensor,
        fisher: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """`codes` with float64 `hessian` `[k, columns, columns]` and `fisher` `[k, rows / k, rows / k]`, both damped."""
        codes, scales, zero_points = self._codes_by_hessian(matrix, scheme, group_size, importance, fixed, hessian=hessian)
        (k, per), columns, shape = fisher.shape[:2], hessian.shape[-1], codes.shape
        weight = matrix.reshape(-1, columns)
        grid, groups = self._grid(scheme, scales, zero_points, weight.shape, fixed), (torch.arange(columns) // group_size).int()
        if not isinstance(grid, Integers):
            return codes, scales, zero_points
        codes, every = codes.reshape(-1, columns).clone(), scales.expand(len(weight), -1).clone()
        for i in range(k):
            part = slice(i * per, (i + 1) * per)
            rows = Rows(weight[part], hessian[i], fisher[i], grid.of_rows(part), groups, fit_scales=len(matrix) == len(weight))
            codes[part], every[part] = rows.descend(codes[part], every[part], self.n_passes)
        return codes.reshape(shape), every[: len(matrix)].contiguous(), zero_points


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of one group of a convolution (else all): `weight` float32 `[rows, columns]` on `grid`, with its H and G."""

    weight: Tensor
    hessian: Tensor
    fisher: Tensor
    grid: Integers
    groups: Tensor
    fit_scales: bool

    def descend(self, codes: Tensor, scales: Tensor, n_passes: int) -> tuple[Tensor, Tensor]:
        """Codes `[rows, columns]` and scales `[rows, n_groups]` with the least error after any pass, those given among them."""
        single = self.hessian.float()[None]
        feedback = single / single.diagonal(dim1=1, dim2=2)[:, :, None]
        coupling = (self.fisher / self.fisher.diagonal()[:, None]).float().fill_diagonal_(0.0)
        codes, scales = codes.clone(), scales.clone()
        errors = dequantized(codes, scales, self.grid, self.groups) - self.weight
        best, found = self.cost(errors), (codes.clone(), scales.clone())
        for _ in range(n_passes):
            for begin in range(0, len(codes), BLOCK):
                block = slice(begin, begin + BLOCK)
                pulls = coupling[block] @ errors
                for i in range(len(pulls)):
                    row = slice(begin + i, begin + i + 1)
                    grid, target = self.grid.of_rows(row), self.weight[row] - pulls[i : i + 1]
                    if self.fit_scales:
                        scales[row] = fitted_scales(target, single, codes[row], scales[row], grid, self.groups, False)
                    start = dequantized(codes[row], scales[row], grid, self.groups) - target
                    codes[row] = grid.rounded(target, feedback, scales[row], self.groups, start)
                    error = dequantized(codes[row], scales[row], grid, self.groups) - self.weight[row]
                    pulls.addr_(coupling[block, begin + i], (error - errors[row])[0])
                    errors[row] = error
            if (cost := self.cost(errors)) < best:
                best, found = cost, (codes.clone(), scales.clone())
        return found

    def cost(self, errors: Tensor) -> float:
        """tr(G E H E^T)."""
        e = errors.double()
        return float((self.fisher * (e @ self.hessian @ e.T)).sum())
