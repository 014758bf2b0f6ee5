"""Rounding column by column, for integers, levels and llama.cpp's blocks, and the error of the output that it minimizes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from mpsearch import kernels
from mpsearch.quantizers.block_fit import refitted
from mpsearch.schemes.codebook import Codebook
from mpsearch.schemes.integer import Integer
from mpsearch.schemes.k_quant import KQuant
from mpsearch.schemes.levels import Levels

BLOCK = 128  # columns whose errors reach one another at once, and the later ones by a matrix product


@dataclass(frozen=True, eq=False)
class Grid(ABC):
    """The values that a weight may be rounded to.

    Codes are uint8 `[rows, columns]`, scales `[rows, n_groups]` (of blocks their steps), `groups` int32 `[columns]` each column's
    group.

    Attributes
    ----------
    fixed
        bool `[rows, columns]`: weights that are stored in another tensor and are 0 in the matrix, such as outliers. Their codes
        are not used: their values are 0 too, and they have no error. `None`: there are none.
    """

    fixed: Tensor | None = field(default=None, kw_only=True)

    def values(self, codes: Tensor, groups: Tensor) -> Tensor:
        """The values of the codes without their scale: float32 `[rows, columns]`."""
        values = self.decoded(codes, groups)
        return values if self.fixed is None else values.masked_fill(self.fixed, 0.0)

    def ordered(self, columns: Tensor) -> Self:
        """The grid of the matrix with its columns in another order."""
        return self if self.fixed is None else replace(self, fixed=self.fixed[:, columns])

    def dequantized(self, codes: Tensor, scales: Tensor, groups: Tensor) -> Tensor:
        """The weights of the codes, float32 `[rows, columns]`."""
        return self.values(codes, groups) * scales.float()[:, groups]

    @abstractmethod
    def decoded(self, codes: Tensor, groups: Tensor) -> Tensor:
        """`values`, as if no weight were fixed."""

    @abstractmethod
    def rounded(self, weight: Tensor, feedback: Tensor, scales: Tensor, groups: Tensor, errors: Tensor | None = None) -> Tensor:
        """Codes; arguments as of `kernels.round_with_feedback`."""


@dataclass(frozen=True, eq=False)
class Integers(Grid):
    """Unsigned codes of `bits`, `zeros` float32 `[rows, n_groups]`, and scales of `dtype`."""

    bits: int
    zeros: Tensor
    dtype: torch.dtype

    def of_rows(self, rows: slice) -> Integers:
        """The grid of these rows of the matrix."""
        return replace(self, zeros=self.zeros[rows], fixed=None if self.fixed is None else self.fixed[rows])

    def decoded(self, codes: Tensor, groups: Tensor) -> Tensor:
        """`code - zero`."""
        return codes.float() - self.zeros[:, groups]

    def rounded(self, weight: Tensor, feedback: Tensor, scales: Tensor, groups: Tensor, errors: Tensor | None = None) -> Tensor:
        """By the compiled kernels."""
        fixed = None if self.fixed is None else self.fixed.contiguous()
        return kernels.round_with_feedback(
            weight, feedback, scales.float(), self.zeros, groups, bits=self.bits, errors=errors, fixed=fixed
        )

    def storable(self, scales: Tensor) -> Tensor:
        """Floating-point scales rounded to `dtype`; larger values become its largest."""
        largest = torch.finfo(self.dtype).max
        return scales.clamp(-largest, largest).to(self.dtype)


@dataclass(frozen=True, eq=False)
class LevelGrid(Grid):
    """The levels of `scheme`."""

    scheme: Codebook

    def decoded(self, codes: Tensor, groups: Tensor) -> Tensor:
        """The levels themselves."""
        return self.scheme.table.decode(codes)

    def rounded(self, weight: Tensor, feedback: Tensor, scales: Tensor, groups: Tensor, errors: Tensor | None = None) -> Tensor:
        """In plain PyTorch: there is no kernel for tables."""
        return levels_with_feedback(weight, feedback, scales[:, groups], self.scheme.table, errors, self.fixed)

    def storable(self, scales: Tensor) -> Tensor:
        """Floating-point scales rounded to the nearest that the scheme stores, not negative."""
        return self.scheme.nearest_scale(scales.clamp(min=0.0).float())


@dataclass(frozen=True, eq=False)
class BlockGrid(Grid):
    """The codes of llama.cpp's blocks, in `scheme`; no weights are fixed."""

    scheme: KQuant

    def dequantized(self, codes: Tensor, scales: Tensor, groups: Tensor) -> Tensor:
        """`KQuant.decode`."""
        return self.scheme.decode(codes, scales)

    def decoded(self, codes: Tensor, groups: Tensor) -> Tensor:
        """`KQuant.values`."""
        return self.scheme.values(codes)

    def affine(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Steps as scales and zero points of the kernels, float32 `[rows, n_groups]`; 0 stands for minima without a scale."""
        scales, minima = self.scheme.effective(steps)
        zeros = torch.where(scales == 0, 0.0, minima / torch.where(scales == 0, 1.0, scales))
        return scales.contiguous(), (zeros + self.scheme.blocks.middle).contiguous()

    def rounded(self, weight: Tensor, feedback: Tensor, scales: Tensor, groups: Tensor, errors: Tensor | None = None) -> Tensor:
        """By the compiled kernels; of tables in plain PyTorch."""
        scales, zeros = self.affine(scales)
        blocks = self.scheme.blocks
        if blocks.table:
            return levels_with_feedback(weight, feedback, scales[:, groups], blocks.table, errors, None)
        return kernels.round_with_feedback(weight, feedback, scales, zeros, groups, bits=blocks.bits, errors=errors)

    def fitted(self, codes: Tensor, steps: Tensor, weight: Tensor, hessian: Tensor) -> Tensor:
        """Better steps for the codes as they are."""
        return refitted(self.scheme, codes, steps, weight, hessian[0].float())


def float_zeros(scheme: Integer, scales: Tensor, zero_points: Tensor | None) -> Tensor:
    """Zero points float32, shaped like `scales`; those implied by a symmetric scheme where there are none."""
    middle = 0.5 if scheme.bits == 1 else float(2 ** (scheme.bits - 1))
    return torch.full(scales.shape, middle) if zero_points is None else zero_points.float()


@dataclass(frozen=True, eq=False)
class RoundingProblem:
    """Rounding a weight so that the squared error of the layer's output is small: e^T H e of each row, e being its error.

    Attributes
    ----------
    weight
        float32 `[rows, columns]`.
    hessian
        H = E[x x^T], float64 or float32 `[k, columns, columns]`, positive definite; rows divide by k.
    grid, groups
        The values that weights may take, and the group of each column, int32 `[columns]`.
    shared
        Whether all rows have one scale.
    """

    weight: Tensor
    hessian: Tensor
    grid: Integers | LevelGrid | BlockGrid
    groups: Tensor
    shared: bool = False

    @classmethod
    def for_scheme(
        cls,
        matrix: Tensor,
        hessian: Tensor,
        scheme: Integer | Codebook | KQuant,
        group_size: int,
        scales: Tensor,
        zero_points: Tensor | None,
        fixed: Tensor | None,
    ) -> RoundingProblem:
        """The problem of a matrix that `scheme` quantizes; a matrix of one row is a whole tensor, of many rows of the weight."""
        columns = hessian.shape[-1]
        weight = matrix.reshape(-1, columns)
        fixed = None if fixed is None else fixed.reshape(weight.shape)
        grid: Integers | LevelGrid | BlockGrid
        if isinstance(scheme, KQuant):
            grid = BlockGrid(scheme)
        elif isinstance(scheme, Codebook):
            grid = LevelGrid(scheme, fixed=fixed)
        else:
            zeros = float_zeros(scheme, scales, zero_points).expand(len(weight), -1).contiguous()
            grid = Integers(scheme.bits, zeros, scales.dtype, fixed=fixed)
        groups = (torch.arange(columns) // group_size).int()
        return cls(weight, hessian, grid, groups, shared=len(matrix) < len(weight))

    def dequantized(self, codes: Tensor, scales: Tensor) -> Tensor:
        """The grid's values times their scales, float32 `[rows, columns]`."""
        return self.grid.dequantized(codes, scales, self.groups)

    def squared_errors(self, codes: Tensor, scales: Tensor) -> Tensor:
        """e^T H e of each row, or of all together where `shared`, float64 `[rows]`."""
        e = (self.dequantized(codes, scales) - self.weight).double().reshape(len(self.hessian), -1, len(self.groups))
        error = ((e @ self.hessian) * e).sum(-1).flatten()
        return error.sum().expand_as(error) if self.shared else error

    def fitted_scales(self, codes: Tensor, scales: Tensor) -> Tensor:
        """The best scale of each group in turn, or of all rows where `shared`, for the codes as they are; 0 stays 0."""
        if isinstance(self.grid, BlockGrid):
            return self.grid.fitted(codes, scales, self.weight, self.hessian)
        hessian, size = self.hessian, int((self.groups == 0).sum())
        values = self.grid.values(codes, self.groups).to(hessian.dtype).reshape(len(hessian), -1, len(self.groups))
        fitted = scales.to(hessian.dtype)
        residual = self.weight.to(hessian.dtype).reshape(values.shape) - values * fitted[:, self.groups].reshape(values.shape)
        for group in range(scales.shape[1]):
            inside = slice(group * size, (group + 1) * size)  # a view: of one row, copies would cost more than the products
            part = values[..., inside]
            gain = (part * (residual @ hessian[:, :, inside])).sum(-1).flatten()
            norm = (part * (part @ hessian[:, inside, inside])).sum(-1).flatten()
            if self.shared:
                gain, norm = gain.sum(), norm.sum()
            moved = self.grid.storable(fitted[:, group] + torch.where(norm > 0, gain / norm, 0.0)).to(fitted.dtype)
            moved = torch.where(fitted[:, group] == 0, 0.0, moved)
            residual[..., inside] -= part * (moved - fitted[:, group]).reshape(len(hessian), -1, 1)
            fitted[:, group] = moved
        return fitted.to(scales.dtype)


def levels_with_feedback(
    weight: Tensor, feedback: Tensor, scales: Tensor, table: Levels, errors: Tensor | None, fixed: Tensor | None
) -> Tensor:
    """`kernels.round_with_feedback` with rounding to the nearest level; `scales` float32 `[rows, columns]`."""
    k, columns = len(feedback), weight.shape[1]
    weight, scales = weight.reshape(k, -1, columns), scales.reshape(k, -1, columns)
    inverse = torch.where(scales == 0, 0.0, 1.0 / scales)
    e = torch.zeros_like(weight) if errors is None else errors.reshape(weight.shape).clone()
    is_fixed = torch.zeros_like(weight, dtype=torch.bool) if fixed is None else fixed.reshape(weight.shape)
    feedback = feedback - torch.diag_embed(feedback.diagonal(dim1=1, dim2=2))
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    for begin in range(0, columns, BLOCK):
        end = min(begin + BLOCK, columns)
        target = weight[..., begin:end] - e @ feedback[:, begin:end].transpose(1, 2)
        within = feedback[:, begin:end, begin:end]
        for j in range(begin, end):
            code = table.encode(target[..., j - begin] * inverse[..., j])
            error = torch.where(is_fixed[..., j], e[..., j], table.decode(code) * scales[..., j] - weight[..., j])
            target -= (error - e[..., j])[..., None] * within[:, None, :, j - begin]
            codes[..., j], e[..., j] = code, error
    return codes.reshape(-1, columns)
