"""Inputs in small floating-point numbers: FP8 with a scale for each token or tensor, and the block formats MX and NVFP4.

Values are rounded to the nearest of a table of `levels` times a scale, of two as near to the even one; beyond the largest they
saturate. E4M3 with a dynamic scale a token or a static one is what GPUs multiply with FP8 weights (vLLM's and TensorRT-LLM's FP8,
https://arxiv.org/abs/2209.05433); MX are blocks of 32 with a power of two (MX v1.0, sections 5 and 6.3), NVFP4 blocks of 16 with
an E4M3 scale beside one float32 scale of the whole input, found by calibration as in ModelOpt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.schemes.histogram import Histogram
from mpsearch.schemes.input import SMALLEST_NORMAL, InputFormat, IntegerInput, check_seen
from mpsearch.schemes.levels import LEVELS, Levels
from mpsearch.schemes.scales import scale_for

BLOCKS = {"mx": (32, "e8m0"), "nv": (16, "e4m3")}  # values, and how their scale is stored
SCALES = ("token", "tensor", "static", *BLOCKS)
INPUT_LEVELS = tuple(name for name in LEVELS if name not in ("nf4", "ternary"))  # those with as much on both sides of 0


@dataclass(frozen=True)
class LevelInput(InputFormat):
    """One of the `levels` times a `scale`: of each "token" or "tensor" when it comes, or one "static" one of calibration.

    Tokens and tensors are those of `IntegerInput`. "mx" and "nv" have a scale for each block of a token's values: of neighbours
    in a Linear layer's input, of channels at one position in a convolution's. The last block may be shorter.

    Example: input `[8, 100]`, `levels="e4m3"`, `scale="mx"` is MXFP8: 4 blocks a token, and as many bytes of scales.
    """

    levels: str = "e4m3"
    scale: Literal["token", "tensor", "static", "mx", "nv"] = "token"

    def __post_init__(self) -> None:
        if self.levels not in INPUT_LEVELS:
            raise InputError(f"input.levels is one of {', '.join(INPUT_LEVELS)}; {self.levels!r} came.")
        if self.scale not in SCALES:
            raise InputError(f"input.scale is one of {', '.join(SCALES)}; {self.scale!r} came.")

    @property
    def table(self) -> Levels:
        """The values."""
        return LEVELS[self.levels]

    @property
    def bits(self) -> int:
        """The table's."""
        return self.table.bits

    @property
    def is_integer(self) -> bool:
        """No."""
        return False

    @property
    def has_static_scale(self) -> bool:
        """Also "nv", whose scale of the whole input is found by calibration."""
        return self.scale in ("static", "nv")

    @property
    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """A float32 scale, where it is static."""
        return {"input_scale": (torch.float32, (1,))} if self.has_static_scale else {}

    def scale_bytes(self, values: int, tokens: int) -> int:
        """A float32 number a token, or a byte a block (of a convolution's input: of at least so many)."""
        if self.scale in BLOCKS:
            return tokens * math.ceil(values / max(tokens, 1) / BLOCKS[self.scale][0])
        return 4 * tokens if self.scale == "token" else 0

    def stored(self, seen: Histogram | None) -> dict[str, Tensor]:
        """`input_scale` float32 `[1]` where static: with it the largest magnitude of what calibration has `seen` (1 for `None`)
        is the largest level, in "nv" times the largest scale of a block. `InputError` where all was 0.
        """
        if not self.has_static_scale:
            return {}
        check_seen(seen)
        largest = 1.0 if seen is None else max(-seen.low, seen.high)
        of_blocks = LEVELS["e4m3"].largest if self.scale == "nv" else 1.0
        scale = torch.tensor([largest], dtype=torch.float32) / (self.table.largest * of_blocks)
        return {"input_scale": scale.clamp_(min=SMALLEST_NORMAL)}

    def fake_quantize(self, x: Tensor, n_inner: int, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """See `InputFormat`: a token, tensor or block with a NaN or infinite value becomes all NaN."""
        if x.numel() == 0:
            return x.clone()
        static = tensors["input_scale"].to(x.device) if tensors and self.has_static_scale else None
        if self.scale in BLOCKS:
            return self._by_blocks(x, x.dim() - n_inner, static)
        inner = tuple(range(0 if self.scale == "tensor" else x.dim() - n_inner, x.dim()))
        largest = x.abs().amax(inner, keepdim=True)
        scale = largest / self.table.largest if static is None else static
        return self._rounded(x, torch.where(scale >= SMALLEST_NORMAL, scale, 0.0), largest)

    def _by_blocks(self, x: Tensor, axis: int, static: Tensor | None) -> Tensor:
        """The blocks lie along `axis`."""
        size, kind = BLOCKS[self.scale]
        rows = x.movedim(axis, -1)
        n = rows.shape[-1]
        blocks = F.pad(rows, (0, -n % size)).unflatten(-1, (-1, size))
        blocks = blocks if static is None else blocks / static
        largest = blocks.abs().amax(-1, keepdim=True)
        scale = scale_for(largest.nan_to_num(0.0, 0.0), self.table, kind)
        found = self._rounded(blocks, scale, largest)
        found = found if static is None else found * static
        return found.flatten(-2)[..., :n].movedim(-1, axis)

    def _rounded(self, x: Tensor, scale: Tensor, largest: Tensor) -> Tensor:
        """The nearest levels times the scale, 0 where that is 0; NaN where `largest` is not finite."""
        steps = torch.where((scale > 0) & torch.isfinite(largest), x / scale, 0.0)
        return self.table.nearest(steps) * torch.where(torch.isfinite(largest), scale, torch.nan)

    def describe(self) -> str:
        """For example "e4m3 input, a scale a token"."""
        if self.scale in BLOCKS:
            size, kind = BLOCKS[self.scale]
            return f"{self.levels} input, an {kind} scale for {size} values"
        of = {"token": "a scale a token", "tensor": "a scale a tensor", "static": "a static scale"}[self.scale]
        return f"{self.levels} input, {of}"


def input_from(value: Any) -> InputFormat | None:
    """A scheme's `input`, from a config or from what `fields` gave; `InputError` for what is none."""
    if value is None or isinstance(value, IntegerInput | LevelInput):
        return value
    if not isinstance(value, Mapping):
        raise InputError(
            f"input is null, or bits and scale: {{bits: 8, scale: token}}, or levels and scale: {{levels: e4m3, scale: token}}; "
            f"{value!r} came."
        )
    cls = LevelInput if "levels" in value else IntegerInput
    known = [field.name for field in fields(cls)]
    if unknown := set(value) - set(known):
        raise InputError(f"input takes {', '.join(known)}; {', '.join(sorted(unknown))} came.")
    return cls(**value)
