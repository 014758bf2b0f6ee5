"""Weights as one of a table's values times a scale: NF4, FP8, FP4 and FP6 with scales of any granularity, MX, NVFP4, ternary.

The tables are `levels.LEVELS`. A group's scale is stored as float16 or float32, as E8M0 (a power of two in a byte; MX v1.0,
section 5.4), or as E4M3 beside one float32 scale of the whole tensor, its largest magnitude over 6 x 448 (NVFP4, as NVIDIA's
ModelOpt has it in `NVFP4QTensor`). Codes are packed densely, three-valued ones five to a byte (3^5 = 243 of 256).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mpsearch import kernels
from mpsearch.errors import InputError, did_you_mean
from mpsearch.schemes.base import FindCodes, Layout, QuantizedTensor, QuantScheme
from mpsearch.schemes.grid import GroupSize, check_group_size, each_of, grid_of, importance_of
from mpsearch.schemes.histogram import Histogram
from mpsearch.schemes.input import InputFormat
from mpsearch.schemes.level_input import input_from
from mpsearch.schemes.levels import LEVELS, Levels
from mpsearch.schemes.scales import E8M0_BIAS, SCALE_DTYPES, nearest_scale, scale_for

TRITS = 5  # in a byte


@dataclass(frozen=True)
class Codebook(QuantScheme):
    """One of the `levels` (a name in `LEVELS`) times the scale, stored as `scale`, of each `group_size` weights of a row.

    `input` says how the layer's input is quantized, if it is (an embedding's, which is indices, never is).

    Example: weight `[64, 3, 3, 3]`, `levels="e2m1"`, `group_size=32`, `scale="e8m0"` is MXFP4: 64 rows of 27 columns, one ragged
    block a row; 864 bytes of codes and 64 of scales.
    """

    levels: str
    group_size: GroupSize = "channel"
    scale: Literal["float16", "float32", "e8m0", "e4m3"] = "float16"
    input: InputFormat | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "input", input_from(self.input))
        if self.levels not in LEVELS:
            raise InputError(f"There are no levels {self.levels!r}.{did_you_mean(str(self.levels), LEVELS)}")
        check_group_size(self.group_size)
        if self.scale not in SCALE_DTYPES:
            raise InputError(f"scale is one of {', '.join(SCALE_DTYPES)}; {self.scale!r} came.")

    @property
    def table(self) -> Levels:
        """The values."""
        return LEVELS[self.levels]

    @property
    def symmetric(self) -> bool:
        """Scales alone, no zero points: what is clipped is |w|."""
        return True

    @property
    def input_format(self) -> InputFormat | None:
        """`input`."""
        return self.input

    @property
    def weight_bits(self) -> int:
        """The table's bits; 2 for ternary."""
        return self.table.bits

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(rows, columns, group size) of the matrix that is quantized."""
        return grid_of(shape, self.group_size)

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Dense codes padded to a byte (ternary: five in a byte), a scale for each group, with E4M3 scales the tensor's, and a
        static input range.
        """
        rows, columns, group_size = self.grid(shape)
        n_bytes = -(-rows * columns // TRITS) if self.levels == "ternary" else -(-rows * columns * self.weight_bits // 8)
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "codes": (torch.uint8, (n_bytes,)),
            "scales": (SCALE_DTYPES[self.scale], (rows, -(-columns // group_size))),
        }
        if self.scale == "e4m3":
            tensors["tensor_scale"] = (torch.float32, (1,))
        return {**tensors, **(self.input.layout if self.input else {})}

    def scale_for(self, largest: Tensor) -> Tensor:
        """The scale with which magnitudes up to `largest` (float32, any shape) fit, as it is stored: float32, not negative."""
        return scale_for(largest, self.table, self.scale)

    def nearest_scale(self, scales: Tensor) -> Tensor:
        """`scales` (float32, not negative) as they are stored; of powers of two the nearest in octaves."""
        return nearest_scale(scales, self.scale)

    def quantize(
        self, weight: Tensor, codes: FindCodes, importance: Tensor | None, seen: Histogram | None = None
    ) -> QuantizedTensor:
        """The quantizer's codes, packed, with its scales; where these are E4M3 it is given the weight over the tensor's scale."""
        shape = tuple(weight.shape)
        rows, columns, group_size = self.grid(shape)
        matrix, tensors = weight.reshape(rows, columns).contiguous(), {}
        if self.scale == "e4m3":
            largest = matrix.abs().amax() if matrix.numel() else torch.zeros(())
            tensor_scale = largest / (self.table.largest * LEVELS["e4m3"].largest)
            tensor_scale = torch.where(tensor_scale >= torch.finfo(torch.float32).smallest_normal, tensor_scale, 1.0)
            matrix, tensors = matrix / tensor_scale, {"tensor_scale": tensor_scale.reshape(1)}
        found, scales, _ = codes(matrix, self, group_size, importance_of(importance, shape, self.group_size))
        input_params = {} if self.input is None else self.input.stored(seen)
        return self.stored(found, scales, tensors.get("tensor_scale"), input_params, shape)

    def stored(
        self,
        codes: Tensor,
        scales: Tensor,
        tensor_scale: Tensor | None,
        input_params: Mapping[str, Tensor],
        shape: tuple[int, ...],
    ) -> QuantizedTensor:
        """A weight of `shape` from its codes (uint8, one each) and `nearest_scale`s, over the tensor's where there is one."""
        packed = _pack_trits(codes) if self.levels == "ternary" else kernels.pack(codes, self.weight_bits)
        of_tensor = {} if tensor_scale is None else {"tensor_scale": tensor_scale}
        return QuantizedTensor(self, shape, {"codes": packed, "scales": self._stored(scales), **of_tensor, **input_params})

    def dequantize(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """`value * scale`, float32; where there is a tensor's scale, `scale` is its product with the group's."""
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

    def _stored(self, scales: Tensor) -> Tensor:
        if self.scale == "e8m0":
            return (torch.frexp(scales).exponent - 1 + E8M0_BIAS).to(torch.uint8)
        if self.scale == "e4m3":
            return LEVELS["e4m3"].encode(scales)
        return scales.to(torch.float16 if self.scale == "float16" else torch.float32).contiguous()

    def describe(self) -> str:
        """For example "e2m1 levels, an e8m0 scale for 32 weights"."""
        scale = f"{'an' if self.scale.startswith('e') else 'a'} {self.scale} scale {each_of(self.group_size)}"
        weight = f"{self.levels} levels, {scale}{', a float32 scale a tensor' if self.scale == 'e4m3' else ''}"
        return weight if self.input is None else f"{weight}; {self.input.describe()}"


MXFP4 = Codebook("e2m1", 32, "e8m0")


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
