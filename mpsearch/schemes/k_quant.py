"""The block formats of llama.cpp: Q4_1, Q5_1, the K-quants Q2_K to Q6_K, and the tables IQ4_NL and IQ4_XS.

A row is divided into blocks, a block into groups. With q the code of a weight, it is

    d * scale * value(q) - dmin * minimum        value(q) = q - middle, or the entry q of a table

d and dmin are float16 numbers of the block, `scale` and `minimum` integers of the group. The formats without such integers (Q4_1,
Q5_1, IQ4_NL) have one group in a block, and they are 1.

Q4_0, Q5_0, Q8_0 and MXFP4 are an `Integer` or a `Codebook` of groups of 32. So are two newer formats: Q1_0, whose levels are -d
and d, is `Integer(1, 128)` with d half its scale; Q2_0, (code - 1) * d, is `Integer(2, 64)` with d its negative scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mpsearch.errors import InputError, check_choice
from mpsearch.schemes.base import FindCodes, Layout, QuantizedTensor, QuantScheme
from mpsearch.schemes.histogram import Histogram
from mpsearch.schemes.integer import Integer
from mpsearch.schemes.k_quant_layout import FORMATS, BlockFormat


@dataclass(frozen=True)
class KQuant(QuantScheme):
    """A weight in llama.cpp's blocks, byte by byte as a GGUF file has them.

    Parameters
    ----------
    format
        "q4_1", "q5_1", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl" or "iq4_xs".

    Examples
    --------
    Weight `[64, 512]` in "q4_k": two blocks of 144 bytes a row, 18,432 bytes, 4.5 bits a weight.
    """

    format: str

    def __post_init__(self) -> None:
        check_choice("format of llama.cpp's blocks", self.format, FORMATS)

    @property
    def blocks(self) -> BlockFormat:
        """The layout of a block."""
        return FORMATS[self.format]

    @property
    def weight_bits(self) -> int:
        """Bits of a code."""
        return self.blocks.bits

    @property
    def ggml_type(self) -> str:
        """The name in ggml: "Q4_K"."""
        return self.format.upper()

    @property
    def dense(self) -> Integer:
        """The scheme that differs in its scales alone: one float32 number, and a zero point, for each group.

        Of a table it is the integers that come nearest to a sixteenth of its values.
        """
        blocks = self.blocks
        return Integer(blocks.bits, blocks.group, not blocks.largest_minimum, "float32")

    def takes(self, kind: str, shape: tuple[int, ...]) -> bool:
        """Linear layers and embeddings, in rows of whole blocks."""
        return kind in ("linear", "embedding") and math.prod(shape[1:]) % self.blocks.block == 0

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(rows, columns, group size); `InputError` where rows are not whole blocks."""
        rows, columns = shape[0], math.prod(shape[1:])
        if columns % self.blocks.block:
            raise InputError(
                f"{self.ggml_type} stores rows in blocks of {self.blocks.block} weights; got rows of {columns}. Pin the layer to "
                "a scheme of smaller groups, or leave it float."
            )
        return rows, columns, self.blocks.group

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """The blocks of each row, the last of which is whole: tables of sizes have layers that the scheme does not take, too."""
        n_blocks = -(-math.prod(shape[1:]) // self.blocks.block)
        return {"blocks": (torch.uint8, (shape[0], n_blocks * self.blocks.n_bytes))}

    def check(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> None:
        """Also `InputError` where a weight is not finite: the float16 numbers of its block are damaged."""
        super().check(tensors, shape)
        if bad := int((~torch.isfinite(self.dequantize(tensors, shape))).sum()):
            raise InputError(f"'blocks' must stand for finite weights; {bad} of {math.prod(shape)} are not")

    def quantize(
        self, weight: Tensor, find_codes: FindCodes, importance: Tensor | None, histogram: Histogram | None = None
    ) -> QuantizedTensor:
        """Pack the quantizer's codes and steps: `Codes` whose scales are the `steps` of `stored`, without zero points."""
        rows, columns, group_size = self.grid(tuple(weight.shape))
        codes, steps, _ = find_codes(weight.reshape(rows, columns).contiguous(), self, group_size, importance)
        return self.stored(codes, steps, tuple(weight.shape))

    def stored(self, codes: Tensor, steps: Tensor, shape: tuple[int, ...]) -> QuantizedTensor:
        """A weight of `shape` from codes uint8 `[rows, columns]` and steps float32 `[rows, n_blocks * 2 * (1 + n_groups)]`.

        The steps of a block are d and the scales of its groups, then dmin and their minima.
        """
        scales, minima = self.split(steps).unbind(-2)
        packed = self.blocks.pack(codes.unflatten(-1, (-1, self.blocks.block)), scales, minima)
        return QuantizedTensor(self, shape, {"blocks": packed.flatten(-2)})

    def unpacked(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Codes and steps, the inverse of `stored`."""
        rows, columns, _ = self.grid(shape)
        stored = tensors["blocks"].reshape(rows, columns // self.blocks.block, self.blocks.n_bytes)
        codes, scales, minima = self.blocks.unpack(stored)
        return codes.reshape(rows, columns), torch.stack([scales, minima], dim=-2).flatten(1)

    def split(self, steps: Tensor) -> Tensor:
        """Steps of `stored` as `[rows, n_blocks, 2, 1 + n_groups]`."""
        return steps.unflatten(-1, (-1, 2, 1 + self.blocks.n_groups))

    def effective(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """What a group's values are multiplied by, and what is subtracted then: float32 `[rows, n_groups of a row]`."""
        scales, minima = self.split(steps).unbind(-2)
        return (scales[..., :1] * scales[..., 1:]).flatten(1), (minima[..., :1] * minima[..., 1:]).flatten(1)

    def values(self, codes: Tensor) -> Tensor:
        """What codes stand for before they are scaled, float32."""
        table = self.blocks.table
        return codes.float() - self.blocks.middle if table is None else table.decode(codes)

    def decode(self, codes: Tensor, steps: Tensor) -> Tensor:
        """The weights of codes and steps, float32 `[rows, columns]`."""
        scales, minima = self.effective(steps)
        values = self.values(codes).unflatten(-1, (-1, self.blocks.group))
        return (scales[..., None] * values - minima[..., None]).flatten(1)

    def dequantize(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """As llama.cpp: products are exact, the difference is rounded to float32."""
        return self.decode(*self.unpacked(tensors, shape)).reshape(shape)

    def ggml_blocks(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
        """The bytes of a GGUF file, `[rows, bytes of a row]`."""
        self.check(tensors, shape)
        return tensors["blocks"].cpu().numpy()

    def describe(self) -> str:
        """For example "Q4_K: 4-bit codes, 6-bit scales per 32 weights, float16 scale per 256"."""
        blocks = self.blocks
        codes = "codes of a table" if blocks.table else "codes"
        minimum = " and minimum" if blocks.largest_minimum else ""
        integers = f", integer scale{minimum} per {blocks.group} weights" if blocks.has_integers else ""
        return f"{self.ggml_type}: {blocks.bits}-bit {codes}{integers}, float16 scale{minimum} per {blocks.block} weights"
