"""A Linear layer whose input is rotated before it is quantized and multiplied, and its weight with it: `x W^T = (x Q) (W Q)^T`.

Q is orthonormal, a Hadamard matrix with signs for each block of columns (`kernels.rotate`): what stands out in one column of
the input or in one weight is spread over its block, so that ranges are narrower and nearly alike (Ashkboos et al. 2024, QuaRot,
https://arxiv.org/abs/2404.00456; Tseng et al. 2024, QuIP#, https://arxiv.org/abs/2402.04396). Q follows from the number of
columns and takes no byte. It is paid for when the layer runs: the costs count its `input_additions`, the kernels make them.

Convolutions are left out: their columns are pairs of a channel and an offset, of which only the channels could be rotated, at
each position and across the memory's layout. Embeddings have no input to rotate.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpsearch import kernels
from mpsearch.errors import InputError
from mpsearch.schemes.base import FindCodes, Layout, QuantizedTensor, QuantScheme, scheme_from_fields
from mpsearch.schemes.codebook import Codebook
from mpsearch.schemes.histogram import Histogram
from mpsearch.schemes.input import InputFormat
from mpsearch.schemes.integer import Integer


@dataclass(frozen=True)
class Rotated(QuantScheme):
    """The rotated weight as `dense` stores it, an `Integer` or a `Codebook`, whose input format is that of the rotated input.

    Example: weight `[64, 384]`: each row is rotated in blocks of 256 and 128 columns, and a token takes 256 x 8 + 128 x 7
    additions; the bytes are those of `dense`.
    """

    dense: QuantScheme

    def __post_init__(self) -> None:
        if isinstance(self.dense, Mapping):  # from what `fields` gave
            object.__setattr__(self, "dense", scheme_from_fields(self.dense))
        if not isinstance(self.dense, Integer | Codebook):
            raise InputError(f"What is rotated is stored as an Integer or a Codebook; dense={self.dense!r} came.")

    def takes(self, kind: str) -> bool:
        """Linear layers."""
        return kind == "linear"

    @property
    def weight_bits(self) -> int:
        """Of `dense`."""
        return self.dense.weight_bits

    @property
    def input_format(self) -> InputFormat | None:
        """That of `dense`, of the rotated input; `None` where it stays float: as a function of x, nothing happens to it then."""
        return None if self.dense.input_format is None else RotatedInput(self.dense.input_format)

    def input_additions(self, shape: tuple[int, ...]) -> int:
        """log2 of its block for each column."""
        return sum(size * (size.bit_length() - 1) for size in kernels.blocks_of(math.prod(shape[1:])))

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """That of `dense`."""
        return self.dense.layout(shape)

    def quantize(
        self, weight: Tensor, codes: FindCodes, importance: Tensor | None, seen: Histogram | None = None
    ) -> QuantizedTensor:
        """`dense` of the rotated weight; `importance` and `seen` are of the rotated input (`InputMoments.for_scheme`)."""
        rotated = kernels.rotate(weight.flatten(1)).reshape(weight.shape) if weight.dim() > 1 else weight
        return dataclasses.replace(self.dense.quantize(rotated, codes, importance, seen), scheme=self)

    def dequantize(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """Rotated back: the weight that does to x what the stored one does to the rotated x."""
        weight = self.dense.dequantize(tensors, shape)
        return kernels.rotate(weight.flatten(1), back=True).reshape(shape) if len(shape) > 1 else weight

    def describe(self) -> str:
        """For example "rotated 4-bit integer, symmetric, a float16 scale a channel"."""
        return f"rotated {self.dense.describe()}"

    def fields(self) -> dict[str, Any]:
        """With the fields of `dense`, its class among them."""
        return {"class": type(self).__name__, "dense": self.dense.fields()}


@dataclass(frozen=True)
class RotatedInput(InputFormat):
    """`inner` of the rotated input."""

    inner: InputFormat

    @property
    def bits(self) -> int:
        """Of `inner`."""
        return self.inner.bits

    @property
    def is_integer(self) -> bool:
        """Of `inner`."""
        return self.inner.is_integer

    @property
    def has_static_scale(self) -> bool:
        """Of `inner`."""
        return self.inner.has_static_scale

    @property
    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Of `inner`."""
        return self.inner.layout

    def scale_bytes(self, values: int, tokens: int) -> int:
        """Of `inner`."""
        return self.inner.scale_bytes(values, tokens)

    def stored(self, seen: Histogram | None) -> dict[str, Tensor]:
        """Of `inner`; `seen` is of the rotated input."""
        return self.inner.stored(seen)

    def fake_quantize(self, x: Tensor, n_inner: int, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """Rotated, quantized, and rotated back; x is a Linear layer's input, `n_inner` 1."""
        return kernels.rotate(self.inner.fake_quantize(kernels.rotate(x), n_inner, tensors), back=True)

    def describe(self) -> str:
        """For example "rotated 8-bit input, a scale a token"."""
        return f"rotated {self.inner.describe()}"
