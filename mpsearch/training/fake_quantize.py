"""Quantization with a gradient, for training: what a scheme's codes stand for, with learned step sizes.

LSQ (Esser et al. 2020, https://arxiv.org/abs/1902.08153): rounding passes the gradient straight through where a code is not
clipped (equation 5), and a scale learns from how far the rounding moved each value (equation 3), its gradient divided by
sqrt(values of the group x largest level) (section 2.2). A zero point learns from what is clipped (LSQ+, Bhalgat et al. 2020,
https://arxiv.org/abs/2004.09576, equation 6). The same holds of any table of levels: the nearest one takes the place of the
rounded number.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from mpsearch import kernels
from mpsearch.schemes.input import IntegerInput
from mpsearch.schemes.levels import Levels


class Grid(ABC):
    """The values that a weight over its scale may take, where that is 1."""

    @abstractmethod
    def nearest(self, steps: Tensor) -> Tensor:
        """The grid's value nearest to each of `steps` (float32, any shape)."""

    @abstractmethod
    def holds(self, steps: Tensor) -> Tensor:
        """bool: whether it is not clipped."""

    @abstractmethod
    def gaps(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """How far the next value of the grid below and above each of `values` is; at an end that on the other side."""

    @property
    @abstractmethod
    def largest(self) -> float:
        """The largest level of LSQ's gradient scale."""


@dataclass(frozen=True)
class Whole(Grid):
    """The codes of `bits` bits: 0, 1, …, 2**bits - 1; a zero point is taken off afterwards."""

    bits: int

    def nearest(self, steps: Tensor) -> Tensor:
        """Rounded, and clipped."""
        return steps.round().clamp(0, 2**self.bits - 1)

    def holds(self, steps: Tensor) -> Tensor:
        """Whether the rounded number is a code."""
        rounded = steps.round()
        return (rounded >= 0) & (rounded <= 2**self.bits - 1)

    def gaps(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """1, and 1."""
        return torch.ones_like(values), torch.ones_like(values)

    @property
    def largest(self) -> float:
        """Of a symmetric scheme."""
        return max(2 ** (self.bits - 1) - 1, 1)


@dataclass(frozen=True)
class Table(Grid):
    """The values of a codebook."""

    levels: Levels

    def nearest(self, steps: Tensor) -> Tensor:
        """What the nearest value's code stands for."""
        return self.levels.decode(self.levels.encode(steps))

    def holds(self, steps: Tensor) -> Tensor:
        """Whether it is no larger than the largest magnitude."""
        return steps.abs() <= self.levels.largest

    def gaps(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Of the table."""
        table = self.levels.values[self.levels.values.isfinite()].unique().to(values.device)  # ascending
        at = torch.searchsorted(table, values)
        gaps = table.diff()
        return gaps[(at - 1).clamp(min=0)], gaps[at.clamp(max=len(gaps) - 1)]

    @property
    def largest(self) -> float:
        """Of the table."""
        return self.levels.largest


def groups_of(columns: int, group_size: int) -> Tensor:
    """int64 `[columns]`: the group of each column."""
    return torch.arange(columns) // group_size


def steps_of(matrix: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor) -> Tensor:
    """float32 `[rows, columns]`: the matrix over its scales, beyond the zero points; the zero point where a scale is 0."""
    scale = scales[:, groups]
    return torch.where(scale == 0, 0.0, matrix / torch.where(scale == 0, 1.0, scale)) + zeros[:, groups]


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, matrix, scales, zeros, groups, grid, gain):  # type: ignore[no-untyped-def]
        steps = steps_of(matrix, scales, zeros, groups)
        level = grid.nearest(steps) - zeros[:, groups]
        ctx.save_for_backward(scales, groups, level, level - (steps - zeros[:, groups]), grid.holds(steps))
        ctx.gain = gain
        return level * scales[:, groups]

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        scales, groups, level, moved, held = ctx.saved_tensors
        of_scale = torch.where(held, moved, level) * gradient
        of_zero = torch.where(held, 0.0, -scales[:, groups]) * gradient
        summed = (ctx.gain * torch.zeros_like(scales).index_add_(1, groups, part) for part in (of_scale, of_zero))
        return torch.where(held, gradient, 0.0), *summed, None, None, None


def fake_quantize(matrix: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor, grid: Grid) -> Tensor:
    """`(nearest - zero) * scale`, float32 `[rows, columns]`, with gradients for the matrix, the scales and the zero points.

    `scales` and `zeros` float32 `[rows, n_groups]` as they are stored; a symmetric zero point is the middle code (0.5 for one
    bit, 0 of a table). `groups` int64 `[columns]`.
    """
    group_size = matrix.shape[1] / max(scales.shape[1], 1)
    return _FakeQuantize.apply(matrix, scales, zeros, groups, grid, 1 / math.sqrt(group_size * grid.largest))


class _RotateBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, matrix):  # type: ignore[no-untyped-def]
        return kernels.rotate(matrix, back=True)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return kernels.rotate(gradient)


def rotate_back(matrix: Tensor) -> Tensor:
    """`kernels.rotate(matrix, back=True)` with its gradient, which is the rotation itself."""
    return _RotateBack.apply(matrix)


class _FakeQuantizeInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, zero_point, how, n_inner):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, scale, zero_point)
        ctx.how = how
        return how.fake_quantize(x, n_inner, {"input_scale": scale, "input_zero_point": zero_point})

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        x, scale, zero_point = ctx.saved_tensors
        largest = ctx.how.largest_code
        steps, low = x / scale, (-largest if ctx.how.symmetric else 0) - zero_point
        level = steps.clamp(low, low + largest + (largest if ctx.how.symmetric else 0))
        of_x = gradient * (level == steps)
        # The sum of (level - steps) over what is held and of level over what is clipped, times the gradient.
        of_scale = torch.dot(level.round_().flatten(), gradient.flatten()) - torch.dot(steps.flatten(), of_x.flatten())
        return of_x, (of_scale / math.sqrt(x[0].numel() * largest)).reshape(scale.shape), None, None, None


def fake_quantize_input(x: Tensor, scale: Tensor, zero_point: Tensor, how: IntegerInput, n_inner: int) -> Tensor:
    """`how.fake_quantize` under a static `scale` `[1]` that learns; `zero_point` float32 `[1]` stays, 0 where symmetric."""
    return _FakeQuantizeInput.apply(x, scale, zero_point, how, n_inner)
