"""Inputs in small floating-point numbers: FP8 with per-token or per-tensor scales, and the block formats MX and NVFP4.

Values are rounded to the nearest of a table of `levels` times a scale, ties to even; beyond the largest they saturate. GPUs
multiply E4M3 inputs with a dynamic per-token scale or a static one by FP8 weights (FP8 of vLLM and TensorRT-LLM,
https://arxiv.org/abs/2209.05433). MX are blocks of 32 with a power of two (MX v1.0, sections 5 and 6.3), NVFP4 blocks of 16 with
an E4M3 scale and one float32 scale of the whole input, found by calibration as in ModelOpt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mpsearch.errors import InputError, check_choice
from mpsearch.schemes.histogram import Histogram
from mpsearch.schemes.input import SMALLEST_NORMAL, InputFormat, IntegerInput, check_not_zero, scale_axes
from mpsearch.schemes.levels import LEVELS, Levels, scale_for

BLOCKS = {"mx": (32, "e8m0"), "nv": (16, "e4m3")}  # values in a block, format of its scale
SCALES = ("token", "tensor", "static", *BLOCKS)
INPUT_LEVELS = tuple(name for name in LEVELS if name not in ("nf4", "ternary"))  # symmetric about 0


@dataclass(frozen=True)
class LevelInput(InputFormat):
    """Codes of a table's values times a scale.

    Parameters
    ----------
    levels
        A name in `INPUT_LEVELS`.
    scale
        "token" or "tensor": found when the input is there; "static": found by calibration; tokens are those of `IntegerInput`.
        "mx" and "nv": per block of a token's values, of neighbours in a Linear layer's input, of channels at one position in a
        convolution's. The last block may be shorter.

    Examples
    --------
    Input `[8, 100]`, `levels="e4m3"`, `scale="mx"` is MXFP8: 4 blocks a token, and as many bytes of scales.
    """

    levels: str = "e4m3"
    scale: Literal["token", "tensor", "static", "mx", "nv"] = "token"

    def __post_init__(self) -> None:
        check_choice("input.levels", self.levels, INPUT_LEVELS)
        check_choice("input.scale", self.scale, SCALES)

    @property
    def table(self) -> Levels:
        """The values."""
        return LEVELS[self.levels]

    @property
    def bits(self) -> int:
        """The table's."""
        return self.table.bits

    @property
    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """A float32 scale where it is static, and for "nv", whose scale of the whole input is found by calibration."""
        return {"input_scale": (torch.float32, (1,))} if self.scale in ("static", "nv") else {}

    def scale_bytes(self, values: int, tokens: int) -> int:
        """A float32 number per token, or a byte per block (of a convolution's input: a lower bound)."""
        if self.scale in BLOCKS:
            return tokens * math.ceil(values / max(tokens, 1) / BLOCKS[self.scale][0])
        return 4 * tokens if self.scale == "token" else 0

    def stored(self, histogram: Histogram | None) -> dict[str, Tensor]:
        """`input_scale` float32 `[1]` where static: it maps the largest magnitude of calibration to the largest level, in "nv" to
        that times the largest scale of a block.
        """
        if not self.has_static_scale:
            return {}
        check_not_zero(histogram)
        largest = 1.0 if histogram is None else max(-histogram.low, histogram.high)
        block_scale = LEVELS["e4m3"].largest if self.scale == "nv" else 1.0
        scale = torch.tensor([largest], dtype=torch.float32) / (self.table.largest * block_scale)
        return {"input_scale": scale.clamp_(min=SMALLEST_NORMAL)}

    def fake_quantize(self, x: Tensor, n_inner: int, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """See `InputFormat`: a token, tensor or block with a NaN or infinite value becomes all NaN."""
        if x.numel() == 0:
            return x.clone()
        static = tensors["input_scale"].to(x.device) if tensors and self.has_static_scale else None
        if self.scale in BLOCKS:
            return self._by_blocks(x, x.dim() - n_inner, static)
        largest = x.abs().amax(scale_axes(self.scale, x, n_inner), keepdim=True)
        scale = largest / self.table.largest if static is None else static
        return self._rounded(x, torch.where(scale >= SMALLEST_NORMAL, scale, 0.0), largest)

    def _by_blocks(self, x: Tensor, axis: int, static: Tensor | None) -> Tensor:
        """`fake_quantize` in blocks along `axis`."""
        size, kind = BLOCKS[self.scale]
        rows = x.movedim(axis, -1)
        n = rows.shape[-1]
        blocks = F.pad(rows, (0, -n % size)).unflatten(-1, (-1, size))
        blocks = blocks if static is None else blocks / static
        largest = blocks.abs().amax(-1, keepdim=True)
        scale = scale_for(largest.nan_to_num(0.0, 0.0), self.table, kind)
        rounded = self._rounded(blocks, scale, largest)
        rounded = rounded if static is None else rounded * static
        return rounded.flatten(-2)[..., :n].movedim(-1, axis)

    def _rounded(self, x: Tensor, scale: Tensor, largest: Tensor) -> Tensor:
        """The nearest levels times the scale, 0 where that is 0; NaN where `largest` is not finite."""
        steps = torch.where((scale > 0) & torch.isfinite(largest), x / scale, 0.0)
        return self.table.nearest(steps) * torch.where(torch.isfinite(largest), scale, torch.nan)

    def describe(self) -> str:
        """For example "e4m3 input, per-token scale"."""
        if self.scale in BLOCKS:
            size, kind = BLOCKS[self.scale]
            return f"{self.levels} input, {kind} scale per {size} values"
        return f"{self.levels} input, {'static' if self.scale == 'static' else f'per-{self.scale}'} scale"


def input_from(value: Any) -> InputFormat | None:
    """A scheme's `input`, from a config or from `fields`; `InputError` for anything else."""
    if value is None or isinstance(value, IntegerInput | LevelInput):
        return value
    if not isinstance(value, Mapping):
        raise InputError(
            "input must be null, or bits and scale: {bits: 8, scale: token}, or levels and scale: {levels: e4m3, scale: token}; "
            f"got {value!r}."
        )
    cls = LevelInput if "levels" in value else IntegerInput
    known = [field.name for field in fields(cls)]
    if unknown := set(value) - set(known):
        raise InputError(f"input takes {', '.join(known)}; got {', '.join(sorted(unknown))}.")
    return cls(**value)
