"""The kernels in plain PyTorch: the specification that every compiled backend equals bit for bit.

All arithmetic is float32, each operation rounded by itself (no fused multiply-add), rounding to whole numbers is half to even.
`top = 2**bits - 1` is the largest code, `round_scale` rounds to float16 (or not at all) and makes scales below float32's
smallest normal number 0. Of a group's weights x, `low = min(min x, 0)` and `high = max(max x, 0)`:

    symmetric     step = max(-low, high) / max(2**(bits-1) - 1, 0.5)      zero = 2**(bits-1), at 1 bit 0.5
    asymmetric    step = (high - low) / top                               zero = rint(clamp(-(ratio * low) * inverse, 0, top))

    scale    = round_scale(ratio * step)
    inverse  = 1 / scale, or 0 where scale is 0
    position = x * inverse + zero
    code     = rint(clamp(position, 0, top))
    weight   = (code - zero) * scale                                      what the code stands for

At 1 bit the symmetric levels are -scale / 2 and +scale / 2. A negative ratio (symmetric only) makes the scale negative, so that
the side with the extra level is the positive one.

Clip search: of the given ratios the first with the strictly smallest

    error = (scale * scale) * sum over the columns of (code - position)**2 * importance

infinite where scale is 0 (the whole group is lost there, which `position` does not show) and never chosen where it is NaN; if
none is below infinity, the first ratio. The sum has one order: column j of the group is added to lane j % 8 in ascending
order, then the lanes as ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)). Where `scale * scale` leaves float32's range (scales below
1e-19 or above 1e19) errors tie at 0 or infinity and the first ratio wins.

Packed codes are a dense little-endian bit stream: bit b of code i is bit `i * bits + b` of the stream, bit k of the stream is
bit `k % 8` (0 the lowest) of byte `k // 8`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

LANES = 8  # of the error sum
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def quantize(
    weight: Tensor,  # [rows, columns] float32
    bits: int,
    group_size: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
    ratios: Tensor | None,  # [n] float32
    importance: Tensor | None,  # [k, columns] float32
) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    """Codes `[rows, columns]`, scales and zero points `[rows, n_groups]`, and whether all weights and scales are finite."""
    columns = weight.shape[1]
    groups = _split(weight, group_size)  # [rows, n_groups, size]
    low = groups.amin(-1).clamp(max=0.0)
    high = groups.amax(-1).clamp(min=0.0)
    if ratios is None:
        ratio = torch.ones_like(low)
    else:
        counts = torch.ones(1, columns, device=weight.device) if importance is None else importance
        ratio = _best_ratios(groups, low, high, ratios, _split(counts, group_size), bits, symmetric, scale_dtype)
    scale, inverse, zero = _grid(low, high, ratio, bits, symmetric, scale_dtype)
    position = groups * inverse[..., None] + zero[..., None]
    codes = _nearest_code(position, bits).to(torch.uint8)
    finite = bool(torch.isfinite(weight).all() and torch.isfinite(scale).all())
    zero_points = None if symmetric else zero.to(torch.uint8)
    return _join(codes, columns, group_size), scale.to(scale_dtype), zero_points, finite


def dequantize_codes(
    codes: Tensor,  # [rows, columns] uint8
    scales: Tensor,  # [rows, n_groups] float16 or float32
    zero_points: Tensor | None,  # [rows, n_groups] uint8; None: symmetric
    bits: int,
    group_size: int,
) -> Tensor:
    """`(code - zero) * scale` as float32 `[rows, columns]`."""
    zero = torch.full_like(scales, _implied_zero(bits), dtype=torch.float32) if zero_points is None else zero_points.float()
    groups = _split(codes.float(), group_size)
    return _join((groups - zero[..., None]) * scales.float()[..., None], codes.shape[1], group_size)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes of any shape as `ceil(numel * bits / 8)` bytes."""
    numel = codes.numel()
    eights = pad(codes.reshape(-1), (0, -numel % 8)).reshape(-1, 8)  # 8 codes fill `bits` bytes
    packed = codes.new_zeros(len(eights), bits)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        packed[:, byte] |= eights[:, i] << shift
        if shift + bits > 8:
            packed[:, byte + 1] |= eights[:, i] >> (8 - shift)
    return packed.reshape(-1)[: (numel * bits + 7) // 8].contiguous()


def unpack(packed: Tensor, bits: int, numel: int) -> Tensor:
    """The first `numel` codes of a bit stream, one byte each."""
    stream = pad(packed, (0, -len(packed) % bits)).reshape(-1, bits)
    eights = packed.new_empty(len(stream), 8)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        eights[:, i] = stream[:, byte] >> shift
        if shift + bits > 8:
            eights[:, i] |= stream[:, byte + 1] << (8 - shift)
    eights &= 2**bits - 1
    return eights.reshape(-1)[:numel].contiguous()


def _split(matrix: Tensor, group_size: int) -> Tensor:
    """`[rows, columns]` -> `[rows, n_groups, size]`, zeros behind a shorter last group and up to a multiple of `LANES`."""
    rows, columns = matrix.shape
    n_groups = -(-columns // group_size)
    whole = pad(matrix, (0, n_groups * group_size - columns)).reshape(rows, n_groups, group_size)
    return pad(whole, (0, -group_size % LANES))


def _join(groups: Tensor, columns: int, group_size: int) -> Tensor:
    """The inverse of `_split`."""
    return groups[..., :group_size].flatten(1)[:, :columns].contiguous()


def _implied_zero(bits: int) -> float:
    return 0.5 if bits == 1 else float(2 ** (bits - 1))


def _grid(
    low: Tensor, high: Tensor, ratio: Tensor, bits: int, symmetric: bool, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, inverse and zero point of each group, all float32 `[rows, n_groups]`."""
    reach, steps = (torch.maximum(-low, high), max(2 ** (bits - 1) - 1, 0.5)) if symmetric else (high - low, 2**bits - 1)
    step = reach / steps
    scale = (ratio * step).to(scale_dtype).float()
    vanishes = scale.abs() < SMALLEST_NORMAL
    scale = torch.where(vanishes, 0.0, scale)
    inverse = torch.where(vanishes, 0.0, 1.0 / scale)
    zero = torch.full_like(scale, _implied_zero(bits)) if symmetric else _nearest_code(-(ratio * low) * inverse, bits)
    return scale, inverse, zero


def _nearest_code(position: Tensor, bits: int) -> Tensor:
    """The whole number nearest to `position` in `[0, 2**bits - 1]`; adding 0 makes -0 into +0."""
    return position.clamp(0, 2**bits - 1).round() + 0.0


def _best_ratios(
    groups: Tensor,  # [rows, n_groups, size]
    low: Tensor,
    high: Tensor,
    ratios: Tensor,
    importance: Tensor,  # [k, n_groups, size], 0 where a group has no column
    bits: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
) -> Tensor:
    """The ratio with the least error of each group, `[rows, n_groups]`."""
    rows, n_groups, size = groups.shape
    importance = importance.repeat_interleave(max(rows // len(importance), 1), 0) if len(importance) else importance
    best = torch.full_like(low, float(ratios[0]))
    least = torch.full_like(low, torch.inf)
    for ratio in ratios:
        scale, inverse, zero = _grid(low, high, ratio.expand_as(low), bits, symmetric, scale_dtype)
        position = groups * inverse[..., None] + zero[..., None]
        off = _nearest_code(position, bits) - position
        squares = (off * off * importance).reshape(rows, n_groups, size // LANES, LANES)
        lanes = torch.zeros(rows, n_groups, LANES, device=groups.device)
        for step in range(size // LANES):
            lanes = lanes + squares[:, :, step]
        while lanes.shape[-1] > 1:
            lanes = lanes[..., 0::2] + lanes[..., 1::2]
        error = torch.where(scale == 0, torch.inf, (scale * scale) * lanes[..., 0])
        better = error < least
        best = torch.where(better, ratio, best)
        least = torch.where(better, error, least)
    return best
