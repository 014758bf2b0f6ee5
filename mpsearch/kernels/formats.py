"""Number formats and shapes as named tuples: of packed weights, of convolutions and of quantized inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

Pair = tuple[int, int]


class WeightFormat(NamedTuple):
    """Shape and number format of a weight `[rows, columns]` that is packed for the products.

    group_size   columns that share a scale, at most `columns`
    half_scales  whether scales are float16 (else float32)
    symmetric    whether zero points are the implied ones
    """

    rows: int
    columns: int
    bits: int
    group_size: int
    half_scales: bool
    symmetric: bool

    @property
    def scale_dtype(self) -> torch.dtype:
        """float16 or float32."""
        return torch.float16 if self.half_scales else torch.float32


class ConvFormat(NamedTuple):
    """Shape and number format of a weight `[rows, columns // taps, *kernel_size]` that is packed for the convolutions.

    columns  of the weight as a matrix: channels of a group times `taps`
    groups   of the convolution

    All else is as in `WeightFormat`.
    """

    rows: int
    columns: int
    bits: int
    group_size: int
    half_scales: bool
    symmetric: bool
    groups: int
    kernel_size: tuple[int, ...]

    @classmethod
    def from_list(cls, numbers: Sequence[int]) -> ConvFormat:
        """The inverse of `to_list`."""
        rows, columns, bits, group_size, half_scales, symmetric, groups, *kernel_size = numbers
        return cls(rows, columns, bits, group_size, bool(half_scales), bool(symmetric), groups, tuple(kernel_size))

    def to_list(self) -> list[int]:
        """One list of integers, which an operator of PyTorch takes in less time than eight arguments."""
        return [*self[:7], *self.kernel_size]

    @property
    def kernel(self) -> Pair:
        """Height and width of the kernel."""
        return pair(self.kernel_size, 1)

    @property
    def taps(self) -> int:
        """Weights of the kernel for each pair of an input and an output channel."""
        return self.kernel[0] * self.kernel[1]

    @property
    def scale_dtype(self) -> torch.dtype:
        """float16 or float32."""
        return torch.float16 if self.half_scales else torch.float32


class Geometry(NamedTuple):
    """How a kernel moves over its input, one number for each dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def pairs(self) -> tuple[Pair, Pair, Pair]:
        """The same in two dimensions."""
        return pair(self.stride, 1), pair(self.padding, 0), pair(self.dilation, 1)


class InputFormat(NamedTuple):
    """How an input is quantized to int8.

    scale         the step; `None`: each token (of a convolution each sample) has its own
    largest_code  1 to 127; to 254 where the zero point is given
    zero_point    0 to `largest_code`; -1: codes are symmetric
    """

    scale: float | None = None
    largest_code: int = 127
    zero_point: int = -1


def pair(numbers: Sequence[int], missing: int) -> Pair:
    """One dimension as two: `(width,)` becomes `(missing, width)`."""
    return (numbers[0], numbers[1]) if len(numbers) == 2 else (missing, numbers[0])
