"""Integers of 1 to 8 bits with a scale (and a zero point) for each tensor, channel, or group of weights in a row.

A weight is a matrix `[rows, columns]`, one row an output channel. `w ~ (code - zero_point) * scale`, codes unsigned and packed
densely; symmetric schemes store no zero point (it is the middle code; for one bit the two levels are -scale/2 and +scale/2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mpsearch import kernels
from mpsearch.errors import InputError
from mpsearch.schemes.base import FindCodes, Layout, QuantizedTensor, QuantScheme
from mpsearch.schemes.grid import GroupSize, check_group_size, each_of, grid_of, importance_of
from mpsearch.schemes.histogram import Histogram
from mpsearch.schemes.input import InputFormat
from mpsearch.schemes.level_input import input_from

SCALE_DTYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Integer(QuantScheme):
    """`bits`-wide integer codes; one scale for each `group_size` weights of a row, or for a "channel", or for the "tensor".

    `input` says how the layer's input is quantized, if it is (an embedding's, which is indices, never is).

    Example: weight `[64, 3, 3, 3]`, `bits=4`, `group_size=9`: 64 rows of 27 columns, 3 groups a row, scales `[64, 3]`;
    864 bytes of codes + 384 of float16 scales, and 192 of uint8 zero points where not `symmetric`.
    """

    bits: int
    group_size: GroupSize = "channel"
    symmetric: bool = True
    scale_dtype: Literal["float16", "float32"] = "float16"
    input: InputFormat | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "input", input_from(self.input))
        if not isinstance(self.bits, int) or isinstance(self.bits, bool) or not 1 <= self.bits <= 8:
            raise InputError(f"An integer scheme has 1 to 8 bits; bits={self.bits} came. For more, use fp16, bf16 or fp32.")
        check_group_size(self.group_size)
        if not isinstance(self.symmetric, bool):
            raise InputError(f"symmetric is true or false; got {self.symmetric!r}.")
        if self.scale_dtype not in SCALE_DTYPES:
            raise InputError(f"scale_dtype is 'float16' or 'float32'; {self.scale_dtype!r} came.")

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(rows, columns, group size) of the matrix that is quantized: one row for the whole tensor, else one a channel."""
        return grid_of(shape, self.group_size)

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Dense codes padded to a byte, a scale and, where not symmetric, a zero point for each group, a static input range."""
        rows, columns, group_size = self.grid(shape)
        groups = (rows, -(-columns // group_size))
        tensors = {
            "codes": (torch.uint8, (-(-rows * columns * self.bits // 8),)),
            "scales": (SCALE_DTYPES[self.scale_dtype], groups),
        }
        if not self.symmetric:
            tensors["zero_points"] = (torch.uint8, groups)
        return {**tensors, **(self.input.layout if self.input else {})}

    @property
    def weight_bits(self) -> int:
        """`bits`."""
        return self.bits

    @property
    def input_format(self) -> InputFormat | None:
        """`input`."""
        return self.input

    def quantize(
        self, weight: Tensor, codes: FindCodes, importance: Tensor | None, seen: Histogram | None = None
    ) -> QuantizedTensor:
        """The quantizer's codes, packed, with its scales and zero points, and the static range of the input if it has one."""
        shape = tuple(weight.shape)
        rows, columns, group_size = self.grid(shape)
        importance = importance_of(importance, shape, self.group_size)
        found, scales, zero_points = codes(weight.reshape(rows, columns).contiguous(), self, group_size, importance)
        input_params = {} if self.input is None else self.input.stored(seen)
        return self.stored(found, scales, zero_points, input_params, shape)

    def stored(
        self,
        codes: Tensor,
        scales: Tensor,
        zero_points: Tensor | None,
        input_params: Mapping[str, Tensor],
        shape: tuple[int, ...],
    ) -> QuantizedTensor:
        """A weight of `shape` from its codes (uint8, one each); scales and zero points have a row for each row of the matrix.

        The inverse of `unpacked`.
        """
        if self.group_size == "tensor":
            scales, zero_points = scales[:1], None if zero_points is None else zero_points[:1]
        tensors = {"codes": kernels.pack(codes, self.bits), "scales": scales.contiguous()}
        if zero_points is not None:
            tensors["zero_points"] = zero_points
        return QuantizedTensor(self, shape, {**tensors, **input_params})

    def unpacked(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor | None, int]:
        """Codes uint8 `[out, columns]`, scales and zero points `[out, n_groups]`, and the columns of a group.

        Rows are output channels, whatever the granularity: a scale of the whole tensor is repeated for each.
        """
        rows, columns = shape[0], math.prod(shape[1:])
        codes = kernels.unpack(tensors["codes"], self.bits, rows * columns).reshape(rows, columns)
        scales, zero_points = tensors["scales"], tensors.get("zero_points")
        if self.group_size == "tensor":
            scales = scales.expand(rows, 1).contiguous()
            zero_points = None if zero_points is None else zero_points.expand(rows, 1).contiguous()
        whole = isinstance(self.group_size, str)
        return codes, scales, zero_points, max(columns, 1) if whole else int(self.group_size)

    def dequantize(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """`(code - zero_point) * scale`, float32."""
        rows, columns, group_size = self.grid(shape)
        matrix = kernels.dequantize(
            tensors["codes"],
            tensors["scales"],
            tensors.get("zero_points"),
            bits=self.bits,
            rows=rows,
            columns=columns,
            group_size=group_size,
        )
        return matrix.reshape(shape)

    def describe(self) -> str:
        """For example "4-bit integer, symmetric, a float16 scale a channel"."""
        kind = "symmetric" if self.symmetric else "asymmetric"
        weight = f"{self.bits}-bit integer, {kind}, a {self.scale_dtype} scale {each_of(self.group_size)}"
        return weight if self.input is None else f"{weight}; {self.input.describe()}"
