"""Integers of 1 to 8 bits with per-tensor, per-channel or per-group scales and zero points.

A weight is `(code - zero_point) * scale`, codes unsigned and packed densely. Symmetric schemes store no zero point: it is the
middle code; for one bit the two levels are -scale/2 and +scale/2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mpsearch import kernels
from mpsearch.errors import check_choice, check_flag, check_integer
from mpsearch.schemes.base import FindCodes, Layout, QuantizedTensor
from mpsearch.schemes.dense import DenseScheme, GroupSize
from mpsearch.schemes.histogram import Histogram
from mpsearch.schemes.input import InputFormat

SCALE_DTYPES = {"float16": torch.float16, "float32": torch.float32}


def signed_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes, or zero points, uint8 counted from 0, as int8 around the middle code."""
    return (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)


@dataclass(frozen=True)
class Integer(DenseScheme):
    """Integer codes with a scale for each group of weights in a row.

    Parameters
    ----------
    bits
        Width of a code, 1 to 8.
    group_size
        Weights of a row that share a scale, or "channel" (a row), or "tensor".
    symmetric
        No zero points; else uint8 ones, one per scale.
    scale_dtype
        "float16" or "float32".
    input
        How the layer's input is quantized; `None`: it stays float, as an embedding's, which is indices, always does.

    Examples
    --------
    Weight `[64, 3, 3, 3]`, `bits=4`, `group_size=9`: 64 rows of 27 columns, 3 groups a row, scales `[64, 3]`; 864 bytes of codes
    + 384 of float16 scales, and 192 of uint8 zero points where not `symmetric`.
    """

    bits: int
    group_size: GroupSize = "channel"
    symmetric: bool = True
    scale_dtype: Literal["float16", "float32"] = "float16"
    input: InputFormat | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("bits of an integer scheme", self.bits, 1, 8, " For more, use fp16, bf16 or fp32.")
        check_flag("symmetric", self.symmetric)
        check_choice("scale_dtype", self.scale_dtype, SCALE_DTYPES)

    @property
    def weight_bits(self) -> int:
        """`bits`."""
        return self.bits

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Dense codes padded to a byte, a scale and, where not symmetric, a zero point per group, a static input range."""
        rows, columns, group_size = self.grid(shape)
        zero_points = {} if self.symmetric else {"zero_points": (torch.uint8, (rows, -(-columns // group_size)))}
        n_bytes = -(-rows * columns * self.bits // 8)
        return self._dense_layout(shape, n_bytes, SCALE_DTYPES[self.scale_dtype], zero_points)

    def quantize(
        self, weight: Tensor, find_codes: FindCodes, importance: Tensor | None, histogram: Histogram | None = None
    ) -> QuantizedTensor:
        """Pack the quantizer's codes, with its scales and zero points, and the static range of the input if it has one."""
        matrix, group_size, importance = self._matrix(weight, importance)
        codes, scales, zero_points = find_codes(matrix, self, group_size, importance)
        return self.stored(codes, scales, zero_points, self._input_params(histogram), tuple(weight.shape))

    def stored(
        self,
        codes: Tensor,
        scales: Tensor,
        zero_points: Tensor | None,
        input_params: Mapping[str, Tensor],
        shape: tuple[int, ...],
    ) -> QuantizedTensor:
        """A weight of `shape` from its codes (uint8, one per weight), scales and zero points; the inverse of `unpacked`."""
        if self.group_size == "tensor":
            scales, zero_points = scales[:1], None if zero_points is None else zero_points[:1]
        offsets = {} if zero_points is None else {"zero_points": zero_points}
        tensors = {"codes": kernels.pack(codes, self.bits), "scales": scales.contiguous(), **offsets, **input_params}
        return QuantizedTensor(self, shape, tensors)

    def unpacked(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor | None, int]:
        """Codes uint8 `[out, columns]`, scales and zero points `[out, n_groups]`, and the columns of a group.

        Rows are output channels, whatever the granularity: a per-tensor scale is repeated for each.
        """
        rows, columns = shape[0], math.prod(shape[1:])
        codes = kernels.unpack(tensors["codes"], self.bits, rows * columns).reshape(rows, columns)
        scales, zero_points = tensors["scales"], tensors.get("zero_points")
        if self.group_size == "tensor":
            scales = scales.expand(rows, 1).contiguous()
            zero_points = None if zero_points is None else zero_points.expand(rows, 1).contiguous()
        return codes, scales, zero_points, max(columns, 1) if isinstance(self.group_size, str) else self.group_size

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
        """For example "4-bit integer, symmetric, per-channel float16 scale"."""
        return self._describe(f"{self.bits}-bit integer, {'symmetric' if self.symmetric else 'asymmetric'}", self.scale_dtype)
