"""The contract of the schemes: the tensors in which a weight is stored, and how they are computed and read.

A scheme is a frozen dataclass. It says which tensors are stored; a quantizer finds the codes and scales. Size has one definition:
`storage_bits(shape)` is what a budget counts, and `QuantizedTensor.nbytes` is the same number of bytes.

To add a scheme: write `schemes/<name>.py` with a subclass of `QuantScheme`, and `conf/scheme/<name>.yaml` with its `_target_`.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.schemes.histogram import Histogram
from mpsearch.schemes.input import InputFormat

Codes = tuple[Tensor, Tensor, Tensor | None]
"""Codes uint8 `[rows, columns]`, scales `[rows, n_groups]`, and zero points uint8 `[rows, n_groups]` or `None`.

The scales of a `KQuant` are the steps of its blocks (`KQuant.stored`).
"""


class FindCodes(Protocol):
    """A quantizer's algorithm, as a scheme calls it."""

    def __call__(
        self, matrix: Tensor, scheme: Any, group_size: int, importance: Tensor | None, fixed: Tensor | None = None
    ) -> Codes:
        """Find codes and scales.

        Parameters
        ----------
        matrix
            float32 `[rows, columns]`.
        scheme
            The scheme that asks: an `Integer`, a `Codebook` or a `KQuant`.
        group_size
            Columns that share a scale.
        importance
            float32 `[k, columns]`, k a divisor of the rows: weights of the squared errors; `None` weighs all alike.
        fixed
            bool, a value for each of the matrix in its order: weights that are stored in another tensor and are 0 in the matrix.
            Their codes are not used: they have no error, and cannot compensate for those of others.
        """


# Tensor name -> (dtype, shape).
Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class QuantScheme(ABC):
    """How a layer's weight is stored and its input is quantized; equal fields are the same scheme."""

    @property
    def input_format(self) -> InputFormat | None:
        """How the layer's input is quantized before the product; `None`: it stays float."""
        return None

    @property
    @abstractmethod
    def weight_bits(self) -> int:
        """Bits of one weight in a product, without scales and padding: 4 for w4, 16 for fp16."""

    @property
    def input_bits(self) -> int:
        """Bits of one input value in a product: those of its format, 32 where it stays float."""
        return 32 if self.input_format is None else self.input_format.bits

    def takes(self, kind: str, shape: tuple[int, ...]) -> bool:
        """Whether layers of this kind (a value of `layer.KINDS`), with a weight of `shape`, can have the scheme."""
        return True

    def input_additions(self, shape: tuple[int, ...]) -> int:
        """Float32 additions per token before the product with a weight of `shape`, in addition to those of quantization."""
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
        self, weight: Tensor, find_codes: FindCodes, importance: Tensor | None, histogram: Histogram | None = None
    ) -> QuantizedTensor:
        """Quantize a weight.

        Parameters
        ----------
        weight
            float32, output channels first.
        find_codes
            The quantizer's algorithm, for schemes with codes.
        importance
            float32 `[k, columns]`, k a divisor of the output channels: weights of the squared errors; `None` weighs all alike.
        histogram
            The layer's input in the calibration data, for schemes with a static input range.
        """

    @abstractmethod
    def dequantize(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """The stored `tensors` as a float32 weight of `shape`."""

    @abstractmethod
    def describe(self) -> str:
        """A short phrase for reports: "4-bit integer, symmetric, per-channel float16 scale"."""

    def fields(self) -> dict[str, Any]:
        """The fields and the class name, JSON-able: two schemes are the same exactly if these are equal."""
        return {"class": type(self).__name__, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight of `shape` (output channels first) in the tensors of its scheme's `layout`."""

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
        """The weight that the tensors stand for: float32, `shape`."""
        return self.scheme.dequantize(self.tensors, self.shape)


def scheme_from_fields(fields: Mapping[str, Any]) -> QuantScheme:
    """The scheme with these `fields()`: of a class of this package or of any other that has been imported; else `InputError`."""
    package = importlib.import_module("mpsearch.schemes")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"mpsearch.schemes.{module.name}")
    classes = {cls.__name__: cls for cls in _subclasses(QuantScheme) if not inspect.isabstract(cls)}
    if fields["class"] not in classes:
        raise InputError(f"'{fields['class']}' is no known scheme. Import the module that defines it first, or pass schemes=.")
    return classes[fields["class"]](**{key: value for key, value in fields.items() if key != "class"})


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)
