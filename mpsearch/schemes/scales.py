"""The formats in which scales are stored: float16, float32, E8M0 (a power of two in a byte), E4M3."""

from __future__ import annotations

import torch
from torch import Tensor

from mpsearch.schemes.levels import LEVELS, Levels

# The stored dtype of each format: E8M0 and E4M3 as their bytes.
SCALE_DTYPES = {"float16": torch.float16, "float32": torch.float32, "e8m0": torch.uint8, "e4m3": torch.uint8}
E8M0_BIAS = 127


def scale_for(largest: Tensor, table: Levels, kind: str) -> Tensor:
    """The scale with which magnitudes up to `largest` (float32, any shape) fit `table`, rounded to the format `kind`: float32.

    E8M0: 2^(floor(log2(largest)) - emax), so that up to half an octave saturates (MX v1.0, section 6.3).
    """
    if kind == "e8m0":
        exponent = torch.frexp(largest).exponent - 1 - table.exponent
        exponent = torch.where(largest > 0, exponent, -E8M0_BIAS).clamp(-E8M0_BIAS, E8M0_BIAS)
        return torch.ldexp(torch.ones_like(largest), exponent)
    return nearest_scale(largest / table.largest, kind)


def nearest_scale(scales: Tensor, kind: str) -> Tensor:
    """`scales` (float32, not negative) rounded to the format `kind`; powers of two to the nearest in octaves."""
    if kind == "e8m0":
        exponent = torch.where(scales > 0, scales.log2().round(), -E8M0_BIAS).clamp(-E8M0_BIAS, E8M0_BIAS)
        return torch.ldexp(torch.ones_like(scales), exponent.int())
    if kind == "e4m3":
        return LEVELS["e4m3"].nearest(scales)
    return scales.half().float() if kind == "float16" else scales
