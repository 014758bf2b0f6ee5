"""Fake quantization with gradients, for training: the values that a scheme's codes decode to, with learned scales.

LSQ (Esser et al. 2020, https://arxiv.org/abs/1902.08153): rounding passes the gradient straight through where a code is not
clipped (equation 5), and a scale learns from how far the rounding moved each value (equation 3), its gradient divided by
sqrt(values of the group x largest level) (section 2.2). A zero point learns from what is clipped (LSQ+, Bhalgat et al. 2020,
https://arxiv.org/abs/2004.09576, equation 6). The same holds for any table of levels, with the nearest level in the place of the
rounded number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mpsearch import kernels
from mpsearch.schemes.input import IntegerInput
from mpsearch.schemes.levels import Levels


@dataclass(frozen=True)
class IntegerGrid:
    """The codes 0, 1, …, 2**bits - 1: the values of a weight over its scale, before the zero point is subtracted."""

    bits: int

    def nearest(self, steps: Tensor) -> Tensor:
        """The grid's value nearest to each of `steps` (float32, any shape)."""
        return steps.round().clamp(0, 2**self.bits - 1)

    def contains(self, steps: Tensor) -> Tensor:
        """bool, shaped like `steps`: whether a value is not clipped."""
        rounded = steps.round()
        return (rounded >= 0) & (rounded <= 2**self.bits - 1)

    def gaps(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Distance from each of the grid's `values` to the next one below and above; at an end that on the other side."""
        return torch.ones_like(values), torch.ones_like(values)

    @property
    def largest(self) -> float:
        """The largest level in LSQ's gradient scale, that of a symmetric scheme."""
        return max(2 ** (self.bits - 1) - 1, 1)


@dataclass(frozen=True)
class LevelGrid:
    """The levels of a codebook; methods as of `IntegerGrid`."""

    levels: Levels

    def nearest(self, steps: Tensor) -> Tensor:
        """The level nearest to each of `steps`."""
        return self.levels.decode(self.levels.encode(steps))

    def contains(self, steps: Tensor) -> Tensor:
        """Whether a value is at most the largest magnitude."""
        return steps.abs() <= self.levels.largest

    def gaps(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Distances to the neighbours of each value in the table."""
        table = self.levels.values[self.levels.values.isfinite()].unique().to(values.device)  # ascending
        index, gaps = torch.searchsorted(table, values), table.diff()
        return gaps[(index - 1).clamp(min=0)], gaps[index.clamp(max=len(gaps) - 1)]

    @property
    def largest(self) -> float:
        """The largest level."""
        return self.levels.largest


Grid = IntegerGrid | LevelGrid


def column_groups(columns: int, group_size: int) -> Tensor:
    """int64 `[columns]`: the group of each column."""
    return torch.arange(columns) // group_size


def scaled_steps(matrix: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor) -> Tensor:
    """float32 `[rows, columns]`: the matrix over its scales plus the zero points; the zero point where a scale is 0."""
    scale = scales[:, groups]
    return torch.where(scale == 0, 0.0, matrix / torch.where(scale == 0, 1.0, scale)) + zeros[:, groups]


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, matrix, scales, zeros, groups, grid, gain):  # type: ignore[no-untyped-def]
        steps = scaled_steps(matrix, scales, zeros, groups)
        level = grid.nearest(steps) - zeros[:, groups]
        ctx.save_for_backward(scales, groups, level, level - (steps - zeros[:, groups]), grid.contains(steps))
        ctx.gain = gain
        return level * scales[:, groups]

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        scales, groups, level, moved, inside = ctx.saved_tensors
        for_scale = torch.where(inside, moved, level) * gradient
        for_zero = torch.where(inside, 0.0, -scales[:, groups]) * gradient
        summed = (ctx.gain * torch.zeros_like(scales).index_add_(1, groups, part) for part in (for_scale, for_zero))
        return torch.where(inside, gradient, 0.0), *summed, None, None, None


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
    def forward(ctx, x, scale, zero_point, input_format, n_inner):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, scale, zero_point)
        ctx.input_format = input_format
        return input_format.fake_quantize(x, n_inner, {"input_scale": scale, "input_zero_point": zero_point})

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        x, scale, zero_point = ctx.saved_tensors
        largest, symmetric = ctx.input_format.largest_code, ctx.input_format.symmetric
        steps, low = x / scale, (-largest if symmetric else 0) - zero_point
        level = steps.clamp(low, low + largest + (largest if symmetric else 0))
        for_x = gradient * (level == steps)
        # The sum of (level - steps) over what is not clipped and of level over what is, times the gradient.
        for_scale = torch.dot(level.round_().flatten(), gradient.flatten()) - torch.dot(steps.flatten(), for_x.flatten())
        return for_x, (for_scale / math.sqrt(x[0].numel() * largest)).reshape(scale.shape), None, None, None


def fake_quantize_input(x: Tensor, scale: Tensor, zero_point: Tensor, input_format: IntegerInput, n_inner: int) -> Tensor:
    """`input_format.fake_quantize` under a static `scale` `[1]` that learns.

    `zero_point` float32 `[1]` does not learn; it is 0 for symmetric formats.
    """
    return _FakeQuantizeInput.apply(x, scale, zero_point, input_format, n_inner)
