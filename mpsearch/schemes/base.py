"""The contract of the schemes: how a layer is stored, what that weighs, and the tensor that comes of it.

A scheme says what is stored; how the codes and scales are found is the quantizer's affair. Size has one definition:
`storage_bits(shape)` is what a budget counts, and `QuantizedTensor.nbytes` weighs the same, to the byte.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class QuantScheme(ABC):
    """How a layer's weight is stored; a frozen dataclass whose fields are all there is to know."""

    @abstractmethod
    def storage_bits(self, shape: tuple[int, ...]) -> int:
        """Bits of a weight of `shape` (output channels first) as stored: codes, scales, zero points, padding to bytes."""

    @abstractmethod
    def dequantize(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """The stored `tensors` as a float32 weight of `shape`."""

    @abstractmethod
    def describe(self) -> str:
        """A short phrase for people: "4-bit integer, symmetric, one scale a channel"."""

    def fields(self) -> dict[str, Any]:
        """The fields with the class, JSON-able: two schemes are the same exactly if these are equal."""
        return {"class": type(self).__name__, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight of `shape` (output channels first) as its scheme stores it; `tensors` hold every byte that counts."""

    scheme: QuantScheme
    shape: tuple[int, ...]
    tensors: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors; equal to `scheme.storage_bits(shape) / 8`."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def dequantize(self) -> Tensor:
        """The weight that these codes stand for: float32, `shape`."""
        return self.scheme.dequantize(self.tensors, self.shape)
