"""How a layer's input is quantized before the product: part of a scheme, as what a kernel computes is what the scheme says.

Symmetric integers, `x ~ code * scale` with codes from -(2**(bits-1) - 1) to 2**(bits-1) - 1, so that the products of 8-bit inputs
run in integers (Jacob et al. 2018, section 2, without zero points). Rounding is that of `kernels.linear_a8`, code for code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mpsearch.errors import InputError

SMALLEST_NORMAL = torch.finfo(torch.float32).smallest_normal
SCALES = ("token", "static")


@dataclass(frozen=True)
class IntegerInput:
    """`bits`-wide integers with a scale for each "token", found when it comes, or one "static" scale from calibration.

    A token is a row of a Linear layer's input and a sample's whole feature map of a convolution's: no result depends on the
    other samples of its batch. The static scale is max|x| of the calibration data over the largest code, four bytes that are
    stored with the weight; values beyond it saturate.
    """

    bits: int = 8
    scale: Literal["token", "static"] = "token"

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 2 <= self.bits <= 8:
            raise InputError(f"A quantized input has 2 to 8 bits; input.bits={self.bits} came. Give input=null for float input.")
        if self.scale not in SCALES:
            raise InputError(f"input.scale is one of {', '.join(SCALES)}; {self.scale!r} came.")

    @property
    def largest_code(self) -> int:
        """127 for 8 bits."""
        return 2 ** (self.bits - 1) - 1

    def static_scale(self, largest: float) -> Tensor:
        """float32 `[1]`: the scale under which inputs up to `largest` do not saturate, a normal number."""
        return (torch.tensor([largest], dtype=torch.float32) / self.largest_code).clamp_(min=SMALLEST_NORMAL)

    def fake_quantize(self, x: Tensor, n_inner: int, static_scale: Tensor | None = None) -> Tensor:
        """float32, shaped like x: `code * scale`. The last `n_inner` dimensions of x are one token.

        `static_scale` float32 `[1]`, needed where `scale` is "static". A token with a NaN or infinite value becomes all NaN.
        """
        if x.numel() == 0:
            return x.clone()
        largest = x.abs().amax(tuple(range(x.dim() - n_inner, x.dim())), keepdim=True)
        if self.scale == "static":
            assert static_scale is not None
            scale = static_scale.to(x.device)
        else:
            scale = largest / self.largest_code
        scale = torch.where(torch.isfinite(largest), scale, torch.nan)
        inverse = torch.where(scale >= SMALLEST_NORMAL, 1.0 / scale, 0.0)
        codes = (x * inverse).nan_to_num_(-self.largest_code).clamp_(-self.largest_code, self.largest_code).round_()
        return codes.mul_(scale)

    def describe(self) -> str:
        """For example "8-bit input, a scale a token"."""
        return f"{self.bits}-bit input, {'a static scale' if self.scale == 'static' else 'a scale a token'}"
