"""Plain floating-point storage: float16, bfloat16, float32, rounded to nearest without a quantizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mpsearch.errors import InputError, check_choice
from mpsearch.schemes.base import FindCodes, Layout, QuantizedTensor, QuantScheme
from mpsearch.schemes.histogram import Histogram

FORMATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Float(QuantScheme):
    """A weight stored in the floating-point `format`."""

    format: Literal["float16", "bfloat16", "float32"]

    def __post_init__(self) -> None:
        check_choice("format of a float scheme", self.format, FORMATS)

    @property
    def weight_bits(self) -> int:
        """The format's bits."""
        return 8 * FORMATS[self.format].itemsize

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """The weight in the format."""
        return {"values": (FORMATS[self.format], tuple(shape))}

    def quantize(
        self,
        weight: Tensor,
        find_codes: FindCodes | None = None,
        importance: Tensor | None = None,
        histogram: Histogram | None = None,
    ) -> QuantizedTensor:
        """`weight` (float32, any shape) rounded to nearest; a value beyond float16's 65,504 is an `InputError`."""
        values = weight.to(FORMATS[self.format], copy=True)
        if not torch.isfinite(values).all():
            raise InputError(
                f"A weight of {float(weight.abs().max()):g} does not fit in {self.format}. Use bf16 or fp32 for this layer."
            )
        return QuantizedTensor(self, tuple(weight.shape), {"values": values})

    def dequantize(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """The values in float32."""
        return tensors["values"].to(torch.float32).reshape(shape)

    def describe(self) -> str:
        """The format's name."""
        return self.format
