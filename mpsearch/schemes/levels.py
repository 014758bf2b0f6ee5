"""The number formats of codebooks and of their scales: the value of each code, and the nearest code to a value.

Small floating-point numbers (sign, exponent, mantissa; exponent 0 is subnormal) as the OCP defines them: E4M3 and E5M2 of "OFP8"
(2023, https://www.opencompute.org/documents/ocp-8-bit-floating-point-specification-ofp8-revision-1-0-2023-12-01-pdf-1), E3M2,
E2M3, E2M1 and INT8 of the Microscaling formats (MX v1.0, 2023, section 5.3,
https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf). NF4 of QLoRA (Dettmers et al. 2023,
appendix E, https://arxiv.org/abs/2305.14314). The table of llama.cpp's IQ4_NL and IQ4_XS (ggml/src/ggml-common.h,
`kvalues_iq4nl`). Ternary weights: -1, 0, 1 (Li et al. 2016, https://arxiv.org/abs/1605.04711).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Levels:
    """A table of 2**bits values or fewer.

    Attributes
    ----------
    values
        float32 `[2**bits]`, the value of each code (NaN for a code that is no finite number).
    ascending, codes
        The values from the least to the largest, and their codes, among which `encode` looks.
    bounds
        A value at or below `bounds[i]` and above `bounds[i - 1]` is nearest to `ascending[i]`.
    sign_bit
        Whether the topmost bit of a code is the sign, and `ascending` are magnitudes.
    mantissa_bits
        Of floating-point formats.
    """

    bits: int
    values: Tensor
    ascending: Tensor
    codes: Tensor
    bounds: Tensor
    sign_bit: bool
    mantissa_bits: int | None = None

    @property
    def largest(self) -> float:
        """The largest magnitude with both signs: 448 for E4M3."""
        return float(self.ascending[-1])

    @property
    def exponent(self) -> int:
        """Of the largest power of two among the values, MX's emax: 8 for E4M3."""
        return math.floor(math.log2(self.largest))

    def encode(self, x: Tensor) -> Tensor:
        """uint8, shaped like x (float32, finite): the code of the nearest value, for floats with ties to even; saturates."""
        index = torch.bucketize(x.abs() if self.sign_bit else x, self.bounds.to(x.device), out_int32=True)
        codes = self.codes.to(x.device)[index]
        return codes | (torch.signbit(x).to(torch.uint8) << (self.bits - 1)) if self.sign_bit else codes

    def nearest(self, x: Tensor) -> Tensor:
        """float32, shaped like x (float32, finite): the nearest value, as `decode(encode(x))`; of floats by arithmetic."""
        if self.mantissa_bits is None:
            return self.decode(self.encode(x))
        magnitude = x.abs().clamp_(max=self.largest)
        octave = (magnitude.view(torch.int32) & 0x7F800000).view(torch.float32)
        octave.clamp_(min=float(self.ascending[1]) * 2**self.mantissa_bits)  # of the subnormal numbers
        shift = octave.mul_(2.0 ** (23 - self.mantissa_bits))  # a sum with it has no bits beyond the mantissa
        return torch.copysign(magnitude.add_(shift).sub_(shift), x)

    def decode(self, codes: Tensor) -> Tensor:
        """float32, shaped like `codes` (uint8)."""
        return self.values.to(codes.device)[codes.int()]


def _levels(bits: int, pairs: list[tuple[int, float]], *, sign_bit: bool, ties_to_even: bool) -> Levels:
    """From the (code, value) pairs, of the codes without their sign bit where there is one."""
    pairs = sorted(pairs, key=lambda pair: pair[1])
    bounds = []
    for (code, low), (_, high) in itertools.pairwise(pairs):
        middle = torch.tensor((low + high) / 2, dtype=torch.float32)
        # A value just at the middle goes down, or up where the upper code is even: there the bound lies below the middle.
        up = ties_to_even and code % 2 == 1
        bounds.append(torch.nextafter(middle, torch.tensor(-torch.inf)) if up else middle)
    values = torch.full((2**bits,), torch.nan)
    for code, value in pairs:
        values[code] = value
        if sign_bit:
            values[code + 2 ** (bits - 1)] = -value
    codes = torch.tensor([code for code, _ in pairs], dtype=torch.uint8)
    return Levels(bits, values, torch.tensor([value for _, value in pairs]), codes, torch.stack(bounds), sign_bit)


def _floats(exponent_bits: int, mantissa_bits: int, bias: int, largest: float) -> Levels:
    """Sign, exponent, mantissa; codes beyond `largest` are NaN or infinite."""
    pairs = []
    for exponent, mantissa in itertools.product(range(2**exponent_bits), range(2**mantissa_bits)):
        normal = exponent > 0
        value = math.ldexp(normal + mantissa / 2**mantissa_bits, max(exponent, 1) - bias)
        pairs.append((exponent * 2**mantissa_bits + mantissa, value))
    finite = [pair for pair in pairs if pair[1] <= largest]
    levels = _levels(1 + exponent_bits + mantissa_bits, finite, sign_bit=True, ties_to_even=True)
    return replace(levels, mantissa_bits=mantissa_bits)


# The values as the paper prints them; those of bitsandbytes' kernels are the same in float32.
_NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334]
_NF4 += [-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
_NF4 += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]

_IQ4_NL = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]

IQ4_NL = _levels(4, list(enumerate(map(float, _IQ4_NL))), sign_bit=False, ties_to_even=False)  # without 0, so no codebook
LEVELS = {
    "nf4": _levels(4, list(enumerate(_NF4)), sign_bit=False, ties_to_even=False),
    "ternary": _levels(2, [(0, -1.0), (1, 0.0), (2, 1.0)], sign_bit=False, ties_to_even=False),
    "e2m1": _floats(2, 1, 1, 6.0),
    "e2m3": _floats(2, 3, 1, 7.5),
    "e3m2": _floats(3, 2, 3, 28.0),
    "e4m3": _floats(4, 3, 7, 448.0),
    "e5m2": _floats(5, 2, 15, 57344.0),
    # Two's complement in units of 2^-6; -2 is left out, as the standard allows, so that both sides are alike.
    "int8": _levels(8, [(k & 0xFF, k / 64) for k in range(-127, 128)], sign_bit=False, ties_to_even=True),
}

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
