"""The contract of the schemes: how a layer is stored, what that weighs, and the tensor that comes of it.

A scheme says what is stored; how the codes and scales are found is the quantizer's affair. Size has one definition:
`storage_bits(shape)` is what a budget counts, and `QuantizedTensor.nbytes` weighs the same, to the byte.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.schemes.histogram import Histogram
from mpsearch.schemes.input import InputFormat


class FindCodes(Protocol):
    """The quantizer's algorithm, as a scheme calls it that leaves a choice: an `Integer` or a `Codebook`."""

    def __call__(
        self, matrix: Tensor, scheme: Any, group_size: int, importance: Tensor | None, fixed: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes uint8, scales, and zero points or `None`, of a float32 matrix `[rows, columns]`.

        `fixed`, bool for each value of the matrix in its order, marks weights that are stored elsewhere and are 0 in the matrix.
        Their codes are not used: they have no error to make up for, and cannot make up for those of others.
        """


# Tensor name -> (dtype, shape).
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class QuantScheme(ABC):
    """How a layer's weight is stored, and its input quantized; a frozen dataclass whose fields are all there is to know."""

    @property
    def input_format(self) -> InputFormat | None:
        """How the layer's input is quantized before the product; `None`: it stays float."""
        return None

    @property
    @abstractmethod
    def weight_bits(self) -> int:
        """Bits of one weight as a product reads it, without scales and padding: 4 for w4, 16 for fp16."""

    @property
    def input_bits(self) -> int:
        """Bits of one value of the layer's input as a product reads it: those of its format, 32 where it stays float."""
        return 32 if self.input_format is None else self.input_format.bits

    def takes(self, kind: str) -> bool:
        """Whether a layer of this kind (a word of `layer.KINDS`) can be stored and run so."""
        return True

    def input_additions(self, shape: tuple[int, ...]) -> int:
        """Float32 additions that each token costs before the product with a weight of `shape`, beside its quantization."""
        return 0

    @abstractmethod
    def layout(self, shape: tuple[int, ...]) -> Layout:
        """Name, dtype and shape of every tensor that is stored for a weight of `shape` (output channels first)."""

    def storage_bits(self, shape: tuple[int, ...]) -> int:
        """Bits of the tensors in `layout`: codes, scales, zero points, padding to bytes, static input ranges."""
        return sum(8 * dtype.itemsize * math.prod(size) for dtype, size in self.layout(shape).values())

    def check(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> None:
        """Raise `InputError` where `tensors` are not those of `layout`; for tensors that were read from a file."""
        layout = self.layout(shape)
        if tensors.keys() != layout.keys():
            raise InputError(f"it must have the tensors {', '.join(sorted(layout))}; got {', '.join(sorted(tensors))}")
        for name, (dtype, size) in layout.items():
            tensor = tensors[name]
            if tensor.dtype != dtype or tuple(tensor.shape) != size:
                raise InputError(f"'{name}' must be {dtype} {list(size)}; got {tensor.dtype} {list(tensor.shape)}")

    @abstractmethod
    def quantize(
        self, weight: Tensor, codes: FindCodes, importance: Tensor | None, seen: Histogram | None = None
    ) -> QuantizedTensor:
        """`weight` (float32, output channels first) as stored; `codes` is the quantizer's, for schemes that leave a choice.

        `importance` float32 `[k, columns]` (output channels divide by k) weighs squared errors; `None` weighs all alike.
        `seen` is what calibration saw of the layer's input, for schemes with a static input range.
        """

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

    @property
    def input_params(self) -> dict[str, Tensor]:
        """`input_scale` and `input_zero_point`, where the scheme has static ones (`InputFormat.stored`)."""
        return {name: tensor for name, tensor in self.tensors.items() if name.startswith("input_")}

    def dequantize(self) -> Tensor:
        """The weight that these codes stand for: float32, `shape`."""
        return self.scheme.dequantize(self.tensors, self.shape)


def scheme_from_fields(fields: Mapping[str, Any]) -> QuantScheme:
    """The scheme whose `fields()` these are: a class of this shelf, or any other that has been imported; else `InputError`."""
    package = importlib.import_module("mpsearch.schemes")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"mpsearch.schemes.{module.name}")
    classes = {cls.__name__: cls for cls in QuantScheme.__subclasses__()}
    if fields["class"] not in classes:
        raise InputError(f"'{fields['class']}' is no known scheme. Import the module that defines it first, or pass schemes=.")
    return classes[fields["class"]](**{key: value for key, value in fields.items() if key != "class"})
