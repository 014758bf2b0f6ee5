"""Cyclic coordinate descent on the error of the layer's output, from GPTQ's codes on (Behdin et al. 2023, QuantEase).

GPTQ's early columns never learn what the later ones became. Here columns take turns: each moves to the code that is best with
all others as they are, which is the one nearest to w_j - sum_(i != j) H_ji e_i / H_jj (equation 10), so that e^T H e never grows.
Between the sweeps each group's scale takes the value that is best for its codes, s + (q^T H (w - s q)) / (q^T H q).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.quantizers.gptq import GPTQ
from mpsearch.quantizers.grids import Grid


@dataclass(frozen=True)
class CoordinateDescent(GPTQ):
    """`n_sweeps` over all columns, each after the scales were fitted; stops early for what no longer moves."""

    n_sweeps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_sweeps < 1:
            raise InputError(f"n_sweeps is 1 or more; {self.n_sweeps} came. For none, take quantizer=gptq.")

    def _solve(
        self, weight: Tensor, hessian: Tensor, scales: Tensor, grid: Grid, groups: Tensor, shared: bool
    ) -> tuple[Tensor, Tensor]:
        """The codes and scales with the least error met on the way, each row's own."""
        codes, scales = super()._solve(weight, hessian, scales, grid, groups, shared)
        feedback = (hessian / hessian.diagonal(dim1=1, dim2=2)[:, :, None]).float()
        best = squared_error(weight, hessian, codes, scales, grid, groups, shared)
        best_codes, best_scales = codes, scales
        for _ in range(self.n_sweeps):
            scales = fitted_scales(weight, hessian, codes, scales, grid, groups, shared)
            errors = dequantized(codes, scales, grid, groups) - weight
            moved = grid.rounded(weight, feedback, scales, groups, errors)
            error = squared_error(weight, hessian, moved, scales, grid, groups, shared)
            better = (error < best)[:, None]
            best = torch.minimum(error, best)
            best_codes, best_scales = torch.where(better, moved, best_codes), torch.where(better, scales, best_scales)
            if torch.equal(moved, codes):
                break
            codes = moved
        return best_codes, best_scales


def dequantized(codes: Tensor, scales: Tensor, grid: Grid, groups: Tensor) -> Tensor:
    """The grid's values times their scales, float32 `[rows, columns]`."""
    return grid.values(codes, groups) * scales.float()[:, groups]


def squared_error(
    weight: Tensor, hessian: Tensor, codes: Tensor, scales: Tensor, grid: Grid, groups: Tensor, shared: bool
) -> Tensor:
    """e^T H e of each row, or of them all where `shared`, float64 `[rows]`."""
    e = (dequantized(codes, scales, grid, groups) - weight).double().reshape(len(hessian), -1, len(groups))
    error = ((e @ hessian) * e).sum(-1).flatten()
    return error.sum().expand_as(error) if shared else error


def fitted_scales(
    weight: Tensor, hessian: Tensor, codes: Tensor, scales: Tensor, grid: Grid, groups: Tensor, shared: bool
) -> Tensor:
    """The scale of each group in turn, or of all rows where `shared`, that is best for the codes as they are; 0 stays 0."""
    k, columns, size = len(hessian), len(groups), int((groups == 0).sum())
    step = grid.values(codes, groups).to(hessian.dtype).reshape(k, -1, columns)
    found = scales.to(hessian.dtype)
    left = weight.to(hessian.dtype).reshape(step.shape) - step * found[:, groups].reshape(step.shape)
    for group in range(scales.shape[1]):
        inside = slice(group * size, (group + 1) * size)  # a view: of one row, copies would cost more than the products
        part = step[..., inside]
        gain = (part * (left @ hessian[:, :, inside])).sum(-1).flatten()
        weighs = (part * (part @ hessian[:, inside, inside])).sum(-1).flatten()
        if shared:
            gain, weighs = gain.sum(), weighs.sum()
        moved = grid.storable(found[:, group] + torch.where(weighs > 0, gain / weighs, 0.0)).to(found.dtype)
        moved = torch.where(found[:, group] == 0, 0.0, moved)
        left[..., inside] -= part * (moved - found[:, group]).reshape(k, -1, 1)
        found[:, group] = moved
    return found.to(scales.dtype)
