"""Rotation of a Linear layer's input, and of its weight with it, before they are quantized: `x W^T = (x Q) (W Q)^T`.

Q is orthonormal, a Hadamard matrix with signs for each block of columns (`kernels.rotate`). An outlier in one column of the input
or in one weight is spread over its block, so that ranges are narrower and nearly alike (Ashkboos et al. 2024, QuaRot,
https://arxiv.org/abs/2404.00456; Tseng et al. 2024, QuIP#, https://arxiv.org/abs/2402.04396). Q follows from the number of
columns and takes no bytes. Its cost is time: costs count the `input_additions`, kernels perform them.

Convolutions are left out: their columns are pairs of a channel and an offset, of which only the channels could be rotated, at
each position and across the memory's layout. Embeddings have no input to rotate.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mpsearch import kernels
from mpsearch.schemes.base import FindCodes, Layout, QuantizedTensor
from mpsearch.schemes.dense import DenseScheme, WrappedScheme
from mpsearch.schemes.histogram import Histogram
from mpsearch.schemes.input import InputFormat


@dataclass(frozen=True)
class Rotated(WrappedScheme):
    """The rotated weight as `dense` stores it, whose input format is that of the rotated input.

    Parameters
    ----------
    dense
        An `Integer` or a `Codebook`.

    Examples
    --------
    Weight `[64, 384]`: each row is rotated in blocks of 256 and 128 columns, and a token takes 256 x 8 + 128 x 7 additions; the
    bytes are those of `dense`.
    """

    dense: DenseScheme

    def takes(self, kind: str, shape: tuple[int, ...]) -> bool:
        """Linear layers."""
        return kind == "linear"

    @property
    def input_format(self) -> InputFormat | None:
        """That of `dense`, for the rotated input; `None` where it stays float: the rotation alone changes no value."""
        return None if self.dense.input is None else RotatedInput(self.dense.input)

    def input_additions(self, shape: tuple[int, ...]) -> int:
        """Per column, log2 of its block."""
        return sum(size * (size.bit_length() - 1) for size in kernels.blocks_of(math.prod(shape[1:])))

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """That of `dense`."""
        return self.dense.layout(shape)

    def quantize(
        self, weight: Tensor, find_codes: FindCodes, importance: Tensor | None, histogram: Histogram | None = None
    ) -> QuantizedTensor:
        """`dense` of the rotated weight; `importance` and `histogram` are of the rotated input (`InputMoments.for_scheme`)."""
        rotated = kernels.rotate(weight.flatten(1)).reshape(weight.shape) if weight.dim() > 1 else weight
        return dataclasses.replace(self.dense.quantize(rotated, find_codes, importance, histogram), scheme=self)

    def dequantize(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """Rotated back: its product with x is that of the stored weight with the rotated x."""
        weight = self.dense.dequantize(tensors, shape)
        return kernels.rotate(weight.flatten(1), back=True).reshape(shape) if len(shape) > 1 else weight

    def describe(self) -> str:
        """For example "rotated 4-bit integer, symmetric, per-channel float16 scale"."""
        return f"rotated {self.dense.describe()}"


@dataclass(frozen=True)
class RotatedInput(InputFormat):
    """The format `inner` of the rotated input."""

    inner: InputFormat

    @property
    def bits(self) -> int:
        """Those of `inner`."""
        return self.inner.bits

    @property
    def is_integer(self) -> bool:
        """As `inner`."""
        return self.inner.is_integer

    @property
    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """That of `inner`."""
        return self.inner.layout

    def scale_bytes(self, values: int, tokens: int) -> int:
        """Those of `inner`."""
        return self.inner.scale_bytes(values, tokens)

    def stored(self, histogram: Histogram | None) -> dict[str, Tensor]:
        """Those of `inner`; the histogram is of the rotated input."""
        return self.inner.stored(histogram)

    def fake_quantize(self, x: Tensor, n_inner: int, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """Rotated, quantized, and rotated back; x is a Linear layer's input, `n_inner` 1."""
        return kernels.rotate(self.inner.fake_quantize(kernels.rotate(x), n_inner, tensors), back=True)

    def describe(self) -> str:
        """For example "rotated 8-bit input, per-token scale"."""
        return f"rotated {self.inner.describe()}"
