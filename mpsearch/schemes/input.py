"""How a layer's input is quantized before the product: part of a scheme, as what a kernel computes is what the scheme says.

Integers `x ~ (code - zero_point) * scale` (Jacob et al. 2018, section 2). Symmetric ones have no zero point and codes from
-(2**(bits-1) - 1) to 2**(bits-1) - 1; rounding is that of `kernels.linear_a8`, code for code. Asymmetric ones have codes from 0,
so that what is never negative (behind a ReLU) uses all of them; 0 is always a code, as padding must be exact.

What is quantized is the input of a layer alone, just before its product. Its output is float32, and so is all that lies
between layers: activations, pooling, normalization, residual additions. No two operations pass integers on.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mpsearch.errors import InputError
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
    @abstractmethod
    def is_integer(self) -> bool:
        """Whether a product with integer weights is integer arithmetic."""

    @property
    @abstractmethod
    def has_static_scale(self) -> bool:
        """Whether the scale is stored with the weight."""

    @property
    @abstractmethod
    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name, dtype and shape of the tensors of `stored`."""

    @abstractmethod
    def scale_bytes(self, values: int, tokens: int) -> int:
        """Bytes of the scales of an input of `values` numbers in `tokens` tokens, that are not stored with the weight."""

    @abstractmethod
    def stored(self, seen: Histogram | None) -> dict[str, Tensor]:
        """What is stored with the weight, names beginning with `input_`; `seen` is what calibration saw of the input."""

    @abstractmethod
    def fake_quantize(self, x: Tensor, n_inner: int, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """float32, shaped like x (float32): what its codes stand for. The last `n_inner` dimensions of x are one token.

        `tensors` are those of `stored`. Of values that are not finite NaN comes, at least for all of their block.
        """

    @abstractmethod
    def describe(self) -> str:
        """A short phrase for people."""


@dataclass(frozen=True)
class IntegerInput(InputFormat):
    """`bits`-wide integers with a scale for each "token" or "tensor", found when it comes, or one "static" one of calibration.

    A token is a row of a Linear layer's input and a sample's whole feature map of a convolution's: no result depends on the
    other samples of its batch. Where it is to be as in runtimes that take one scale for the whole tensor, batch and all, "tensor"
    does so. A static scale, and the zero point where not `symmetric`, are stored with the weight; values beyond its range
    saturate. `range` says how that is chosen: all that was seen ("minmax"), "percentile", "mse" or "entropy" (`schemes.ranges`).
    """

    bits: int = 8
    scale: Literal["token", "tensor", "static"] = "token"
    symmetric: bool = True
    range: Literal["minmax", "percentile", "mse", "entropy"] = "minmax"

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 2 <= self.bits <= 16:
            raise InputError(f"A quantized input has 2 to 16 bits; input.bits={self.bits} came. Give input=null for float input.")
        if self.scale not in SCALES:
            raise InputError(f"input.scale is one of {', '.join(SCALES)}; {self.scale!r} came.")
        if type(self.symmetric) is not bool:
            raise InputError(f"input.symmetric is true or false; {self.symmetric!r} came.")
        if self.range not in RANGES:
            raise InputError(f"input.range is one of {', '.join(RANGES)}; {self.range!r} came.")
        if self.range != "minmax" and self.scale != "static":
            raise InputError(
                f"input.range={self.range} is found by calibration, but input.scale={self.scale} finds its range when the input "
                "comes. Use input.scale=static, or input.range=minmax."
            )

    @property
    def largest_code(self) -> int:
        """127 for 8 symmetric bits, 15 for 4 asymmetric ones; 254 for 8, which a kernel's signed codes can hold."""
        if self.symmetric:
            return 2 ** (self.bits - 1) - 1
        return 254 if self.bits == 8 else 2**self.bits - 1

    @property
    def is_integer(self) -> bool:
        """Yes."""
        return True

    @property
    def has_static_scale(self) -> bool:
        """Whether the scale is stored with the weight."""
        return self.scale == "static"

    def scale_bytes(self, values: int, tokens: int) -> int:
        """A float32 number a token."""
        return 4 * tokens if self.scale == "token" else 0

    @property
    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Where static, a float32 scale and, asymmetric, a zero point of one byte (four above 8 bits)."""
        if not self.has_static_scale:
            return {}
        zero_point = {} if self.symmetric else {"input_zero_point": (torch.uint8 if self.bits <= 8 else torch.int32, (1,))}
        return {"input_scale": (torch.float32, (1,)), **zero_point}

    def stored(self, seen: Histogram | None) -> dict[str, Tensor]:
        """`input_scale` float32 `[1]` and, asymmetric, `input_zero_point` uint8 `[1]` (int32 above 8 bits), where static.

        The range is found from what calibration has `seen`; from -1 to 1 where that is `None`. `InputError` where all was 0.
        """
        if not self.has_static_scale:
            return {}
        check_seen(seen)
        low, high = (-1.0, 1.0) if seen is None else _static_range(self, seen)
        scale, zero = self.grid(*(torch.tensor([end], dtype=torch.float32) for end in (low, high)))
        tensors = {"input_scale": scale.clamp_(min=SMALLEST_NORMAL)}
        if not self.symmetric:
            tensors["input_zero_point"] = zero.to(torch.uint8 if self.bits <= 8 else torch.int32)
        return tensors

    def grid(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zero points (whole numbers) of ranges that hold `low`, `high` and 0; symmetric: the zero points are 0."""
        if self.symmetric:
            scale = torch.maximum(-low, high) / self.largest_code
            return scale, torch.zeros_like(scale)
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        scale = high / self.largest_code - low / self.largest_code
        return scale, (-low * _inverse(scale)).round_().clamp_(0, self.largest_code)

    def codes(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """`code - zero_point` of x as whole numbers, in x's dtype."""
        lowest = -self.largest_code if self.symmetric else 0
        steps = (x * _inverse(scale)).nan_to_num_(lowest)
        return steps.clamp_(lowest - zero_point, self.largest_code - zero_point).round_()

    def fake_quantize(self, x: Tensor, n_inner: int, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """float32, shaped like x: `(code - zero_point) * scale`. See `split`."""
        codes, scale = self.split(x, n_inner, tensors)
        return codes.mul_(scale)

    def split(self, x: Tensor, n_inner: int, tensors: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """`code - zero_point`, whole numbers in float32, shaped like x, and the scales, which broadcast.

        The last `n_inner` dimensions of x are one token. `tensors` are those of `stored`, needed where static. The scale of a
        token (or tensor) with a NaN or infinite value is NaN.
        """
        if x.numel() == 0:
            return x.clone(), x.new_ones(())
        inner = tuple(range(0 if self.scale == "tensor" else x.dim() - n_inner, x.dim()))
        low, high = x.amin(inner, keepdim=True), x.amax(inner, keepdim=True)
        if self.has_static_scale:
            assert tensors is not None
            scale = tensors["input_scale"].to(x.device)
            zero_point = tensors.get("input_zero_point", torch.zeros(1)).to(x)
        else:
            scale, zero_point = self.grid(low, high)
        scale = torch.where(torch.isfinite(low) & torch.isfinite(high), scale, torch.nan)
        return self.codes(x, scale, zero_point), scale

    def rounded(self, values: Tensor, low: float, high: float) -> tuple[Tensor, Tensor, float]:
        """(codes - zero point, what they stand for, step) under a range."""
        scale, zero_point = self.grid(*(values.new_tensor([end]) for end in (low, high)))
        codes = self.codes(values, scale, zero_point)
        return codes, codes * scale, scale.item()

    def describe(self) -> str:
        """For example "8-bit input, a scale a token"."""
        of = {"token": "a scale a token", "tensor": "a scale a tensor", "static": f"a static scale ({self.range})"}[self.scale]
        return f"{self.bits}-bit {'' if self.symmetric else 'asymmetric '}input, {of}"


def check_seen(seen: Histogram | None) -> None:
    """`InputError` where calibration saw nothing but 0."""
    if seen is not None and seen.low == seen.high:
        raise InputError(
            "its input is 0 in all of the calibration data, so that no static range can be found. Use input.scale=token, "
            "give other calibration data, or pin the layer to another scheme."
        )


@functools.lru_cache(maxsize=1024)
def _static_range(of: IntegerInput, seen: Histogram) -> tuple[float, float]:
    """Found once for all the schemes that differ in their weights alone."""
    return RANGES[of.range](seen, of.rounded, of.symmetric)


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale; 0 where that is below the smallest normal number, or NaN."""
    return torch.where(scale >= SMALLEST_NORMAL, 1.0 / scale, 0.0)
