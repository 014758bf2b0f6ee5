"""Formats of a layer's quantized input: part of a scheme, as a kernel computes what the scheme says.

Integers `x ~ (code - zero_point) * scale` (Jacob et al. 2018, section 2). Symmetric ones have no zero point and codes from
-(2**(bits-1) - 1) to 2**(bits-1) - 1; rounding is that of `kernels.linear_a8`, code for code. Asymmetric ones have codes from 0,
so that non-negative values (behind a ReLU) use all of them; 0 is always a code, as padding must be exact.

Only the input of a layer is quantized, just before its product. Its output is float32, and so is everything between layers:
activations, pooling, normalization, residual additions. No two operations pass integers on.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mpsearch.errors import InputError, check_choice, check_flag, check_integer
from mpsearch.schemes.histogram import Histogram
from mpsearch.schemes.ranges import RANGES

SMALLEST_NORMAL = torch.finfo(torch.float32).smallest_normal
SCALES = ("token", "tensor", "static")


class InputFormat(ABC):
    """How a layer's input is quantized; a frozen dataclass."""

    @property
    @abstractmethod
    def bits(self) -> int:
        """Of a value, without scales."""

    @property
    def is_integer(self) -> bool:
        """Whether a product with integer weights is integer arithmetic."""
        return False

    @property
    def has_static_scale(self) -> bool:
        """Whether the scale is found by calibration and stored with the weight."""
        return bool(self.layout)

    @property
    @abstractmethod
    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name, dtype and shape of the tensors of `stored`."""

    @abstractmethod
    def scale_bytes(self, values: int, tokens: int) -> int:
        """Bytes of the scales that are not stored with the weight, of an input of `values` numbers in `tokens` tokens."""

    @abstractmethod
    def stored(self, histogram: Histogram | None) -> dict[str, Tensor]:
        """The tensors that are stored with the weight, names beginning with `input_`.

        Parameters
        ----------
        histogram
            The input in the calibration data; `None` stands for values from -1 to 1.

        Raises
        ------
        InputError
            Where all of the input is 0 and the scale is static.
        """

    @abstractmethod
    def fake_quantize(self, x: Tensor, n_inner: int, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """Quantize and dequantize an input.

        Parameters
        ----------
        x
            float32.
        n_inner
            The last dimensions of x that are one token.
        tensors
            Those of `stored`; needed where the scale is static.

        Returns
        -------
        Tensor
            float32, shaped like x. A value that is not finite becomes NaN, and with it at least all of its block.
        """

    @abstractmethod
    def describe(self) -> str:
        """A short phrase for reports."""


def scale_axes(scale: str, x: Tensor, n_inner: int) -> tuple[int, ...]:
    """The dimensions of x that share a scale: all for "tensor", else the last `n_inner`, one token."""
    return tuple(range(0 if scale == "tensor" else x.dim() - n_inner, x.dim()))


@dataclass(frozen=True)
class IntegerInput(InputFormat):
    """Integer codes.

    A token is a row of a Linear layer's input and a sample's whole feature map of a convolution's: no result depends on the
    other samples of its batch. "tensor" is for runtimes that take one scale for the whole tensor, batch and all. A static scale,
    and the zero point where not `symmetric`, are stored with the weight; values beyond its range saturate.

    Parameters
    ----------
    bits
        Width of a code, 2 to 16.
    scale
        "token" or "tensor": found when the input is there; "static": found by calibration.
    symmetric
        No zero point.
    range
        How a static range is chosen (`schemes.ranges`): "minmax", "percentile", "mse" or "entropy".
    """

    bits: int = 8
    scale: Literal["token", "tensor", "static"] = "token"
    symmetric: bool = True
    range: Literal["minmax", "percentile", "mse", "entropy"] = "minmax"
    is_integer = True

    def __post_init__(self) -> None:
        check_integer("input.bits", self.bits, 2, 16, " Give input=null for float input.")
        check_choice("input.scale", self.scale, SCALES)
        check_flag("input.symmetric", self.symmetric)
        check_choice("input.range", self.range, RANGES)
        if self.range != "minmax" and self.scale != "static":
            raise InputError(
                f"input.range={self.range} is found by calibration, but input.scale={self.scale} finds its range at run time. "
                "Use input.scale=static, or input.range=minmax."
            )

    @property
    def largest_code(self) -> int:
        """127 for 8 symmetric bits, 15 for 4 asymmetric ones; 254 for 8, which a kernel's signed codes can hold."""
        if self.symmetric:
            return 2 ** (self.bits - 1) - 1
        return 254 if self.bits == 8 else 2**self.bits - 1

    def scale_bytes(self, values: int, tokens: int) -> int:
        """A float32 number per token."""
        return 4 * tokens if self.scale == "token" else 0

    @property
    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Where static, a float32 scale and, asymmetric, a zero point of one byte (four above 8 bits)."""
        if self.scale != "static":
            return {}
        zero_point = {} if self.symmetric else {"input_zero_point": (torch.uint8 if self.bits <= 8 else torch.int32, (1,))}
        return {"input_scale": (torch.float32, (1,)), **zero_point}

    def stored(self, histogram: Histogram | None) -> dict[str, Tensor]:
        """`input_scale` float32 `[1]` and, asymmetric, `input_zero_point` uint8 `[1]` (int32 above 8 bits), where static."""
        if self.scale != "static":
            return {}
        check_not_zero(histogram)
        low, high = (-1.0, 1.0) if histogram is None else _static_range(self, histogram)
        scale, zero = self.grid(*(torch.tensor([end], dtype=torch.float32) for end in (low, high)))
        tensors = {"input_scale": scale.clamp_(min=SMALLEST_NORMAL), "input_zero_point": zero}
        return {name: tensors[name].to(dtype) for name, (dtype, _) in self.layout.items()}

    def grid(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zero points (integers) of ranges that hold `low`, `high` and 0; symmetric: the zero points are 0."""
        if self.symmetric:
            scale = torch.maximum(-low, high) / self.largest_code
            return scale, torch.zeros_like(scale)
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        scale = high / self.largest_code - low / self.largest_code
        return scale, (-low * _inverse(scale)).round_().clamp_(0, self.largest_code)

    def codes(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """`code - zero_point` of x: integers in x's dtype."""
        lowest = -self.largest_code if self.symmetric else 0
        steps = (x * _inverse(scale)).nan_to_num_(lowest)
        return steps.clamp_(lowest - zero_point, self.largest_code - zero_point).round_()

    def fake_quantize(self, x: Tensor, n_inner: int, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """float32, shaped like x: `(code - zero_point) * scale`. See `split`."""
        codes, scale = self.split(x, n_inner, tensors)
        return codes.mul_(scale)

    def split(self, x: Tensor, n_inner: int, tensors: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """`code - zero_point`, integers in float32, shaped like x, and the scales, which broadcast; arguments of `fake_quantize`.

        The scale of a token (or tensor) with a NaN or infinite value is NaN.
        """
        if x.numel() == 0:
            return x.clone(), x.new_ones(())
        axes = scale_axes(self.scale, x, n_inner)
        low, high = x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
        if self.has_static_scale:
            assert tensors is not None
            scale = tensors["input_scale"].to(x.device)
            zero_point = tensors.get("input_zero_point", torch.zeros(1)).to(x)
        else:
            scale, zero_point = self.grid(low, high)
        scale = torch.where(torch.isfinite(low) & torch.isfinite(high), scale, torch.nan)
        return self.codes(x, scale, zero_point), scale

    def rounded(self, values: Tensor, low: float, high: float) -> tuple[Tensor, Tensor, float]:
        """(codes - zero point, the values they stand for, step) under a range."""
        scale, zero_point = self.grid(*(values.new_tensor([end]) for end in (low, high)))
        codes = self.codes(values, scale, zero_point)
        return codes, codes * scale, scale.item()

    def describe(self) -> str:
        """For example "8-bit input, per-token scale"."""
        scale = f"static scale ({self.range})" if self.scale == "static" else f"per-{self.scale} scale"
        return f"{self.bits}-bit {'' if self.symmetric else 'asymmetric '}input, {scale}"


def check_not_zero(histogram: Histogram | None) -> None:
    """`InputError` where calibration saw only 0."""
    if histogram is not None and histogram.low == histogram.high:
        raise InputError(
            "its input is 0 in all of the calibration data, so that no static range can be found. Use input.scale=token, "
            "give other calibration data, or pin the layer to another scheme."
        )


@functools.lru_cache(maxsize=1024)
def _static_range(input_format: IntegerInput, histogram: Histogram) -> tuple[float, float]:
    """Cached for all the schemes that differ in their weights alone."""
    return RANGES[input_format.range](histogram, input_format.rounded, input_format.symmetric)


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale; 0 where that is below the smallest normal number, or NaN."""
    return torch.where(scale >= SMALLEST_NORMAL, 1.0 / scale, 0.0)
