"""What a column may round to, for the quantizers that round one column after another: integers, or a codebook's levels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from mpsearch import kernels
from mpsearch.schemes.codebook import Codebook
from mpsearch.schemes.levels import Levels

BLOCK = 128  # columns whose errors reach one another at once, and the later ones by a matrix product


@dataclass(frozen=True, eq=False)
class Grid(ABC):
    """Codes are uint8 `[rows, columns]`, scales `[rows, n_groups]`, `groups` int32 `[columns]` each column's group.

    `fixed` bool `[rows, columns]` marks weights that are stored elsewhere and are 0 in the matrix, such as outliers: their codes
    are not used, so that their values are 0 too, and no error. `None`: there are none.
    """

    fixed: Tensor | None = field(default=None, kw_only=True)

    def values(self, codes: Tensor, groups: Tensor) -> Tensor:
        """What the codes stand for without their scale: float32 `[rows, columns]`."""
        found = self.decoded(codes, groups)
        return found if self.fixed is None else found.masked_fill(self.fixed, 0.0)

    def ordered(self, columns: Tensor) -> Self:
        """The grid of a matrix whose columns are those of this one in another order."""
        return self if self.fixed is None else replace(self, fixed=self.fixed[:, columns])

    @abstractmethod
    def decoded(self, codes: Tensor, groups: Tensor) -> Tensor:
        """`values`, of fixed weights as of all others."""

    @abstractmethod
    def rounded(self, weight: Tensor, feedback: Tensor, scales: Tensor, groups: Tensor, errors: Tensor | None = None) -> Tensor:
        """The codes of `kernels.round_with_feedback`, which gives the arguments."""

    @abstractmethod
    def storable(self, scales: Tensor) -> Tensor:
        """Floating-point scales as they can be stored, in the dtype that they came in first."""


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
        """Rounded to `dtype`; what is too large for it takes its largest value."""
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
        """The nearest that the scheme stores, not negative."""
        return self.scheme.nearest_scale(scales.clamp(min=0.0).float())


def levels_with_feedback(
    weight: Tensor, feedback: Tensor, scales: Tensor, table: Levels, errors: Tensor | None, fixed: Tensor | None
) -> Tensor:
    """The rounding of `kernels.round_with_feedback`, each column's to the nearest level; `scales` float32 `[rows, columns]`."""
    k, columns = len(feedback), weight.shape[1]
    weight, scales = weight.reshape(k, -1, columns), scales.reshape(k, -1, columns)
    inverse = torch.where(scales > 0, 1.0 / scales, 0.0)
    e = torch.zeros_like(weight) if errors is None else errors.reshape(weight.shape).clone()
    stays = torch.zeros_like(weight, dtype=torch.bool) if fixed is None else fixed.reshape(weight.shape)
    feedback = feedback - torch.diag_embed(feedback.diagonal(dim1=1, dim2=2))
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    for begin in range(0, columns, BLOCK):
        end = min(begin + BLOCK, columns)
        target = weight[..., begin:end] - e @ feedback[:, begin:end].transpose(1, 2)
        within = feedback[:, begin:end, begin:end]
        for j in range(begin, end):
            code = table.encode(target[..., j - begin] * inverse[..., j])
            error = torch.where(stays[..., j], e[..., j], table.decode(code) * scales[..., j] - weight[..., j])
            target -= (error - e[..., j])[..., None] * within[:, None, :, j - begin]
            codes[..., j], e[..., j] = code, error
    return codes.reshape(-1, columns)
