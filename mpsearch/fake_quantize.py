"""Quantization with a gradient, for training: what a scheme's codes stand for, with learned step sizes.

LSQ (Esser et al. 2020, https://arxiv.org/abs/1902.08153): rounding passes the gradient straight through where a code is not
clipped (equation 5), and a scale learns from how far the rounding moved each weight (equation 3), its gradient divided by
sqrt(weights of the group x largest level) (section 2.2). A zero point learns from what is clipped (LSQ+, Bhalgat et al. 2020,
https://arxiv.org/abs/2004.09576, equation 6).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def groups_of(columns: int, group_size: int) -> Tensor:
    """int64 `[columns]`: the group of each column."""
    return torch.arange(columns) // group_size


def codes_of(matrix: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor, bits: int) -> Tensor:
    """float32 `[rows, columns]`, whole numbers 0..2**bits - 1: the code of each weight.

    `scales` and `zeros` float32 `[rows, n_groups]` as they are stored; a symmetric zero point is the middle code (0.5 for one
    bit). Where a scale is 0 the code is the zero point.
    """
    scale, zero = scales[:, groups], zeros[:, groups]
    steps = torch.where(scale == 0, 0.0, matrix / torch.where(scale == 0, 1.0, scale))
    return (steps + zero).round().clamp(0, 2**bits - 1)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, matrix, scales, zeros, groups, bits, gain):  # type: ignore[no-untyped-def]
        codes = codes_of(matrix, scales, zeros, groups, bits)
        ctx.save_for_backward(matrix, scales, zeros, groups, codes)
        ctx.bits, ctx.gain = bits, gain
        return (codes - zeros[:, groups]) * scales[:, groups]

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        matrix, scales, zeros, groups, codes = ctx.saved_tensors
        scale, level = scales[:, groups], codes - zeros[:, groups]
        steps = torch.where(scale == 0, 0.0, matrix / torch.where(scale == 0, 1.0, scale))
        raw = (steps + zeros[:, groups]).round()
        inside = (raw >= 0) & (raw <= 2**ctx.bits - 1)
        of_scale = torch.where(inside, level - steps, level) * gradient
        of_zero = torch.where(inside, 0.0, -scale) * gradient
        summed = (ctx.gain * torch.zeros_like(scales).index_add_(1, groups, part) for part in (of_scale, of_zero))
        return torch.where(inside, gradient, 0.0), *summed, None, None, None


def fake_quantize(matrix: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor, bits: int) -> Tensor:
    """`(code - zero) * scale`, float32 `[rows, columns]`, with gradients for the matrix, the scales and the zero points.

    Arguments as in `codes_of`.
    """
    group_size = matrix.shape[1] / max(scales.shape[1], 1)
    gain = 1 / math.sqrt(group_size * max(2 ** (bits - 1) - 1, 1))
    return _FakeQuantize.apply(matrix, scales, zeros, groups, bits, gain)
