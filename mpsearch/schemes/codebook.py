"""Codebooks: a weight is one of a table's values times a scale. NF4, FP8, FP4, FP6, MX, NVFP4, ternary.

The tables are `levels.LEVELS`. A group's scale is stored as float16 or float32, as E8M0 (a power of two in a byte; MX v1.0,
section 5.4), or as E4M3 with one float32 scale of the whole tensor (NVFP4, as in `NVFP4QTensor` of NVIDIA's ModelOpt): its
largest magnitude over 6 x 448, rounded up to a power of two, so that layers which a runtime fuses can be given one tensor scale
without rounding their blocks' scales again. Codes are packed densely, three-valued ones five to a byte (3^5 = 243 of 256).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mpsearch import kernels
from mpsearch.errors import InputError, check_choice, did_you_mean
from mpsearch.schemes.base import FindCodes, Layout, QuantizedTensor
from mpsearch.schemes.dense import DenseScheme, GroupSize
from mpsearch.schemes.histogram import Histogram
from mpsearch.schemes.input import SMALLEST_NORMAL, InputFormat
from mpsearch.schemes.levels import E8M0_BIAS, LEVELS, SCALE_DTYPES, Levels, nearest_scale, scale_for

TRITS = 5  # in a byte


@dataclass(frozen=True)
class Codebook(DenseScheme):
    """Codes of a table's values with a scale for each group of weights in a row; always symmetric (no zero points).

    Parameters
    ----------
    levels
        A name in `LEVELS`.
    group_size
        Weights of a row that share a scale, or "channel" (a row), or "tensor".
    scale
        How a scale is stored: "float16", "float32", "e8m0" or "e4m3".
    input
        How the layer's input is quantized; `None`: it stays float, as an embedding's, which is indices, always does.

    Examples
    --------
    Weight `[64, 3, 3, 3]`, `levels="e2m1"`, `group_size=32`, `scale="e8m0"` is MXFP4: 64 rows of 27 columns, one shorter block a
    row; 864 bytes of codes and 64 of scales.
    """

    levels: str
    group_size: GroupSize = "channel"
    scale: Literal["float16", "float32", "e8m0", "e4m3"] = "float16"
    input: InputFormat | None = None
    symmetric = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.levels not in LEVELS:
            raise InputError(f"There are no levels {self.levels!r}.{did_you_mean(str(self.levels), LEVELS)}")
        check_choice("scale", self.scale, SCALE_DTYPES)

    @property
    def table(self) -> Levels:
        """The values."""
        return LEVELS[self.levels]

    @property
    def weight_bits(self) -> int:
        """The table's bits; 2 for ternary."""
        return self.table.bits

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Dense codes padded to a byte (ternary: five in a byte), a scale per group, with E4M3 scales one of the tensor, and a
        static input range.
        """
        numel = math.prod(shape)
        n_bytes = -(-numel // TRITS) if self.levels == "ternary" else -(-numel * self.weight_bits // 8)
        tensor_scale: Layout = {"tensor_scale": (torch.float32, (1,))} if self.scale == "e4m3" else {}
        return self._dense_layout(shape, n_bytes, SCALE_DTYPES[self.scale], tensor_scale)

    def scale_for(self, largest: Tensor) -> Tensor:
        """The scale for magnitudes up to `largest` (float32, any shape), rounded as it is stored: float32, not negative."""
        return scale_for(largest, self.table, self.scale)

    def nearest_scale(self, scales: Tensor) -> Tensor:
        """`scales` (float32, not negative) rounded as they are stored; powers of two to the nearest in octaves."""
        return nearest_scale(scales, self.scale)

    def quantize(
        self, weight: Tensor, find_codes: FindCodes, importance: Tensor | None, histogram: Histogram | None = None
    ) -> QuantizedTensor:
        """Pack the quantizer's codes, with its scales; with E4M3 scales the quantizer gets the weight over the tensor's scale."""
        matrix, group_size, importance = self._matrix(weight, importance)
        tensor_scale = None
        if self.scale == "e4m3":
            largest = matrix.abs().amax() if matrix.numel() else torch.zeros(())
            tensor_scale = largest / (self.table.largest * LEVELS["e4m3"].largest)
            tensor_scale = torch.where(tensor_scale >= SMALLEST_NORMAL, _next_power_of_two(tensor_scale), 1.0)
            matrix, tensor_scale = matrix / tensor_scale, tensor_scale.reshape(1)
        codes, scales, _ = find_codes(matrix, self, group_size, importance)
        return self.stored(codes, scales, tensor_scale, self._input_params(histogram), tuple(weight.shape))

    def stored(
        self,
        codes: Tensor,
        scales: Tensor,
        tensor_scale: Tensor | None,
        input_params: Mapping[str, Tensor],
        shape: tuple[int, ...],
    ) -> QuantizedTensor:
        """A weight of `shape` from its codes (uint8, one per weight), `nearest_scale`s, and the tensor's scale for E4M3 ones."""
        packed = _pack_trits(codes) if self.levels == "ternary" else kernels.pack(codes, self.weight_bits)
        if self.scale == "e8m0":
            scales = (torch.frexp(scales).exponent - 1 + E8M0_BIAS).to(torch.uint8)
        elif self.scale == "e4m3":
            scales = LEVELS["e4m3"].encode(scales)
        else:
            scales = scales.to(SCALE_DTYPES[self.scale]).contiguous()
        of_tensor = {} if tensor_scale is None else {"tensor_scale": tensor_scale}
        return QuantizedTensor(self, shape, {"codes": packed, "scales": scales, **of_tensor, **input_params})

    def dequantize(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """`value * scale`, float32; with a per-tensor scale, `scale` is its product with the group's."""
        codes, scales = self.unpacked(tensors, shape)
        _, columns, group_size = self.grid(shape)
        each = scales if scales.shape[1] <= 1 else scales.repeat_interleave(group_size, dim=1)[:, :columns]
        return (self.table.decode(codes) * each).reshape(shape)

    def unpacked(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Codes uint8 `[rows, columns]` and scales float32 `[rows, n_groups]` of the matrix."""
        rows, columns, _ = self.grid(shape)
        if self.levels == "ternary":
            codes = _unpack_trits(tensors["codes"], rows * columns)
        else:
            codes = kernels.unpack(tensors["codes"], self.weight_bits, rows * columns)
        scales = tensors["scales"]
        if self.scale == "e8m0":
            scales = torch.ldexp(torch.ones(scales.shape, device=scales.device), scales.int() - E8M0_BIAS)
        elif self.scale == "e4m3":
            scales = LEVELS["e4m3"].decode(scales) * tensors["tensor_scale"]
        return codes.reshape(rows, columns), scales.float()

    def describe(self) -> str:
        """For example "e2m1 levels, e8m0 scale per 32 weights"."""
        tensor_scale = " with a per-tensor float32 scale" if self.scale == "e4m3" else ""
        return self._describe(f"{self.levels} levels{tensor_scale}", self.scale)


MXFP4 = Codebook("e2m1", 32, "e8m0")


def _next_power_of_two(x: Tensor) -> Tensor:
    """The least power of two that is not below x (float32, positive)."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.ones_like(x), exponent - (mantissa == 0.5).int())


def _pack_trits(codes: Tensor) -> Tensor:
    """Codes 0 to 2 as the digits of bytes, the first the least: uint8 `[ceil(numel / 5)]`."""
    digits = codes.new_zeros(-(-codes.numel() // TRITS), TRITS)
    digits.view(-1)[: codes.numel()] = codes.flatten()
    return (digits * _powers(codes)).sum(1, dtype=torch.uint8)


def _unpack_trits(packed: Tensor, numel: int) -> Tensor:
    """The `numel` codes, uint8 `[numel]`."""
    return (packed[:, None] // _powers(packed) % 3).flatten()[:numel]


def _powers(like: Tensor) -> Tensor:
    return torch.tensor([3**i for i in range(TRITS)], dtype=torch.uint8, device=like.device)
