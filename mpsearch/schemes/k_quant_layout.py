"""The bytes of llama.cpp's block formats: what they are, and how codes and integer scales lie in them.

Layouts are those of ggml/src/ggml-common.h (`block_q4_1`, `block_q2_K`, ...; https://github.com/ggml-org/llama.cpp), as the
decoders in gguf-py/gguf/quants.py read them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpsearch.schemes.levels import IQ4_NL, Levels


@dataclass(frozen=True)
class Plane:
    """Some bits of numbers, in bytes: `bits` of each, from bit `shift` on.

    Bytes are taken `chunk` at a time: first come the numbers in the lowest bits of each byte of a chunk, then those above them.
    """

    bits: int
    chunk: int
    shift: int = 0

    def unpack(self, stored: Tensor) -> Tensor:
        """uint8 `[..., n_bytes]` -> these bits of the numbers, at their place: uint8 `[..., n_bytes * 8 / bits]`."""
        parts = stored.unflatten(-1, (-1, 1, self.chunk)) >> self._places(stored)
        return ((parts & (2**self.bits - 1)) << self.shift).flatten(-3)

    def pack(self, numbers: Tensor) -> Tensor:
        """The inverse, of uint8 `[..., n]`."""
        parts = ((numbers >> self.shift) & (2**self.bits - 1)).unflatten(-1, (-1, 8 // self.bits, self.chunk))
        return (parts << self._places(numbers)).sum(-2, dtype=torch.uint8).flatten(-2)

    def _places(self, like: Tensor) -> Tensor:
        return torch.arange(0, 8, self.bits, dtype=torch.uint8, device=like.device)[:, None]


class SixBits:
    """Eight scales and eight minima of 6 bits in 12 bytes, as Q4_K and Q5_K have them.

    Bytes 0 to 7 hold scales 0 to 3 and minima 0 to 3, and in their two upper bits those of scales and minima 4 to 7, whose four
    lower bits are in bytes 8 to 11.
    """

    def unpack(self, stored: Tensor) -> Tensor:
        """uint8 `[..., 12]` -> uint8 `[..., 16]`, all scales first."""
        first, last = stored[..., :8], stored[..., 8:]
        upper, lower = (first >> 6) << 4, torch.cat([last & 15, last >> 4], dim=-1)
        first, later = first & 63, upper | lower
        return torch.cat([first[..., :4], later[..., :4], first[..., 4:], later[..., 4:]], dim=-1)

    def pack(self, numbers: Tensor) -> Tensor:
        """The inverse."""
        scales, minima = numbers[..., :8], numbers[..., 8:]
        first = torch.cat([scales[..., :4], minima[..., :4]], dim=-1)
        later = torch.cat([scales[..., 4:], minima[..., 4:]], dim=-1)
        return torch.cat([first | ((later >> 4) << 6), (later[..., :4] & 15) | ((later[..., 4:] & 15) << 4)], dim=-1)


@dataclass(frozen=True)
class Bytes:
    """Consecutive bytes of a block: `what` is "d", "dmin", "m" (-dmin), "codes" or "integers" (all scales, then all minima)."""

    what: str
    n_bytes: int
    plane: Plane | SixBits | None = None


@dataclass(frozen=True)
class BlockFormat:
    """A block of `block` weights, `group` of which share integers.

    Attributes
    ----------
    bits
        Of a code.
    fields
        The bytes of a block, in order.
    middle
        The code that stands for 0; 0 with minima.
    scales
        The least and the largest integer scale that quantizers choose; (1, 1) where there are none. With minima it is not 0: a
        group of equal weights needs none.
    offset
        What is added to integer scales to store them.
    largest_minimum
        The largest integer minimum; 1 where it is implied, 0 where there are no minima.
    table
        The values of codes; `None`: integers.
    """

    bits: int
    block: int
    group: int
    fields: tuple[Bytes, ...]
    middle: int = 0
    scales: tuple[int, int] = (1, 1)
    offset: int = 0
    largest_minimum: int = 0
    table: Levels | None = None

    @property
    def n_groups(self) -> int:
        """Groups of a block."""
        return self.block // self.group

    @property
    def n_bytes(self) -> int:
        """Bytes of a block."""
        return sum(field.n_bytes for field in self.fields)

    @property
    def has_integers(self) -> bool:
        """Whether groups have integer scales."""
        return self.scales != (1, 1)

    def unpack(self, stored: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes uint8 `[..., block]`, scales and minima float32 `[..., 1 + n_groups]`: d and the integers, dmin and those.

        `stored` is uint8 `[..., n_bytes]`. Without minima dmin and its integers are 0.
        """
        floats: dict[str, Tensor] = {}
        numbers = dict.fromkeys(("codes", "integers"), torch.zeros((), dtype=torch.uint8, device=stored.device))
        for field, part in zip(self.fields, stored.split([f.n_bytes for f in self.fields], dim=-1), strict=True):
            if field.plane is None:
                floats[field.what] = part.contiguous().view(torch.float16).float()
            else:
                numbers[field.what] = numbers[field.what] | field.plane.unpack(part)
        d = floats["d"]
        dmin = floats["dmin"] if "dmin" in floats else -floats["m"] if "m" in floats else torch.zeros_like(d)
        scales, minima = torch.ones_like(d), torch.full_like(d, self.largest_minimum)
        if self.has_integers:
            signed = numbers["integers"].int() - self.offset  # Q6_K has all 8 bits, in two's complement
            integers = (((signed + 128) & 255) - 128).float()
            scales = integers[..., : self.n_groups]
            minima = integers[..., self.n_groups :] if self.largest_minimum else torch.zeros_like(scales)
        return numbers["codes"], torch.cat([d, scales], dim=-1), torch.cat([dmin, minima], dim=-1)

    def pack(self, codes: Tensor, scales: Tensor, minima: Tensor) -> Tensor:
        """The inverse of `unpack`; d and dmin are float16 numbers already."""
        floats = {"d": scales[..., :1], "dmin": minima[..., :1], "m": -minima[..., :1]}
        integers = scales[..., 1:] + self.offset
        if self.largest_minimum:
            integers = torch.cat([integers, minima[..., 1:]], dim=-1)
        numbers = {"codes": codes, "integers": (integers.int() & 255).to(torch.uint8)}
        return torch.cat(
            [
                floats[f.what].half().contiguous().view(torch.uint8) if f.plane is None else f.plane.pack(numbers[f.what])
                for f in self.fields
            ],
            dim=-1,
        )


_D, _DMIN, _M = Bytes("d", 2), Bytes("dmin", 2), Bytes("m", 2)
_SIX = Bytes("integers", 12, SixBits())


def _codes(count: int, bits: int, chunk: int, shift: int = 0) -> Bytes:
    return Bytes("codes", count, Plane(bits, chunk, shift))


def _integers(count: int, bits: int, chunk: int, shift: int = 0) -> Bytes:
    return Bytes("integers", count, Plane(bits, chunk, shift))


_Q3_SCALES = Bytes("integers", 8, Plane(4, 8)), Bytes("integers", 4, Plane(2, 4, 4))

FORMATS = {
    "q4_1": BlockFormat(4, 32, 32, (_D, _M, _codes(16, 4, 16)), largest_minimum=1),
    "q5_1": BlockFormat(5, 32, 32, (_D, _M, _codes(4, 1, 1, 4), _codes(16, 4, 16)), largest_minimum=1),
    "q2_k": BlockFormat(2, 256, 16, (_integers(16, 4, 16), _codes(64, 2, 32), _D, _DMIN), scales=(1, 15), largest_minimum=15),
    "q3_k": BlockFormat(
        3, 256, 16, (_codes(32, 1, 32, 2), _codes(64, 2, 32), *_Q3_SCALES, _D), middle=4, scales=(-32, 31), offset=32
    ),
    "q4_k": BlockFormat(4, 256, 32, (_D, _DMIN, _SIX, _codes(128, 4, 32)), scales=(1, 63), largest_minimum=63),
    "q5_k": BlockFormat(
        5, 256, 32, (_D, _DMIN, _SIX, _codes(32, 1, 32, 4), _codes(128, 4, 32)), scales=(1, 63), largest_minimum=63
    ),
    "q6_k": BlockFormat(
        6, 256, 16, (_codes(128, 4, 64), _codes(64, 2, 32, 4), _integers(16, 8, 16), _D), middle=32, scales=(-128, 127)
    ),
    "iq4_nl": BlockFormat(4, 32, 32, (_D, _codes(16, 4, 16)), table=IQ4_NL),
    "iq4_xs": BlockFormat(
        4,
        256,
        32,
        (_D, _integers(2, 2, 1, 4), _integers(4, 4, 1), _codes(128, 4, 16)),
        scales=(-32, 31),
        offset=32,
        table=IQ4_NL,
    ),
}
