"""The kernels in plain PyTorch: the specification that every compiled backend equals bit for bit.

All arithmetic is float32, each operation rounded by itself (no fused multiply-add), rounding to integers is half to even.
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

Products y = x W^T of packed weights, `weight` as above, sums over the columns c (of group g):

    linear       y[m, r] = (sum of weight[r, c] * x[m, c]) + bias[r]
    linear_a8    x8, token_scale as below
                 D[m, r, g] = sum of (2 * code[r, c] - 2 * zero[r, g]) * x8[m, c]    exact, then rounded to float32
                 y[m, r] = ((token_scale[m] * 0.5) * sum of D[m, r, g] * scale[r, g] over g in ascending order) + bias[r]

Without a bias nothing is added. The backends equal `linear_a8` bit for bit. `linear` is float64 here, rounded at the end; they
keep their sums in float32 in an order of their own, add the bias last, and are within
`(columns + 8) * 2**-24 * (|bias| + sum of |weight * x|)` of it.

Input is quantized to int8 by token, with `low` and `high` those of x[m] as above and codes up to `largest`, 1 to 127:

    symmetric     scale = max(-low, high) / largest           zero = 0                                     codes from -largest
    asymmetric    scale = high / largest - low / largest      zero = rint(clamp(-low * inverse, 0, largest))     codes from 0

    inverse = 1 / scale, or 0 where that is below 2**-126
    x8[m, c] = rint(clamp(x[m, c] * inverse, least code - zero, largest - zero))         a code less its zero point

or scale and zero point are given; either way the scale is NaN where x[m] is not finite. Asymmetric codes up to 254 are taken too,
scale and zero point being given; their x8 is the code less 127, also in what pads a convolution's input.

The products read weights in a streaming layout, uint8 `[n_tiles, n_groups, record]`: a tile is 16 rows, a record a group of them,
its columns padded to blocks of 32. Rows and columns that are only padding have codes, scales and zero points of 0. A record is

    16 scales, 16 doubled zero points (int16; those of symmetric 1-bit codes are 1), zeros up to a multiple of 64 bytes, blocks

and a block 8 quads: quad q holds columns 4q to 4q + 3, the code of row i and column 4q + k at byte 4i + k. The bytes at one place
in the 8 quads are stored in `bits` bytes, each at that place in a vector of 64. Byte i has `n = 8 // bits` whole fields, field f
(from bit `bits * f`) with the code of quad `i + bits * f`. The bits above the fields, of byte 0 first and in each the lowest
first, are a stream in which the codes of the last `8 - n * bits` quads lie end to end.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from mpsearch.kernels.formats import InputFormat

LANES = 8  # of the error sum
TILE_ROWS = 16
BLOCK_COLUMNS = 32
QUADS = 8  # of a block
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
    groups = split_groups(weight, group_size)  # [rows, n_groups, size]
    low = groups.amin(-1).clamp(max=0.0)
    high = groups.amax(-1).clamp(min=0.0)
    if ratios is None:
        ratio = torch.ones_like(low)
    else:
        counts = torch.ones(1, columns, device=weight.device) if importance is None else importance
        ratio = _best_ratios(groups, low, high, ratios, split_groups(counts, group_size), bits, symmetric, scale_dtype)
    scale, inverse, zero = _grid(low, high, ratio, bits, symmetric, scale_dtype)
    position = groups * inverse[..., None] + zero[..., None]
    codes = _nearest_code(position, bits).to(torch.uint8)
    finite = bool(torch.isfinite(weight).all() and torch.isfinite(scale).all())
    zero_points = None if symmetric else zero.to(torch.uint8)
    return join_groups(codes, columns, group_size), scale.to(scale_dtype), zero_points, finite


def dequantize_codes(
    codes: Tensor,  # [rows, columns] uint8
    scales: Tensor,  # [rows, n_groups] float16 or float32
    zero_points: Tensor | None,  # [rows, n_groups] uint8; None: symmetric
    bits: int,
    group_size: int,
) -> Tensor:
    """`(code - zero) * scale` as float32 `[rows, columns]`."""
    zero = torch.full_like(scales, _implied_zero(bits), dtype=torch.float32) if zero_points is None else zero_points.float()
    groups = split_groups(codes.float(), group_size)
    return join_groups((groups - zero[..., None]) * scales.float()[..., None], codes.shape[1], group_size)


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


def dequantize_doubled(codes: Tensor, scales: Tensor, doubled_zeros: Tensor, group_size: int) -> Tensor:
    """`(code - zero) * scale` as float32 `[rows, columns]`, from doubled zero points."""
    centred = split_groups(codes.float(), group_size) - 0.5 * doubled_zeros.float()[..., None]
    return join_groups(centred * scales.float()[..., None], codes.shape[1], group_size)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x `[tokens, columns]` times `weight` `[rows, columns]` transposed, plus `bias` `[rows]`, in float64, as float32."""
    product = x.double() @ weight.double().T
    return (product if bias is None else product + bias.double()).float()


def quantize_tokens(x: Tensor, input_scale: float | None, largest: int, zero_point: int) -> tuple[Tensor, Tensor]:
    """Each row of x as int8 (in float32) and its scale `[tokens, 1]`; -1 is the zero point of symmetric codes."""
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    if input_scale is not None:
        scale = torch.full_like(low, input_scale)
    else:
        scale = torch.maximum(-low, high) / largest if zero_point < 0 else high / largest - low / largest
    scale = torch.where(torch.isfinite(x).all(1, keepdim=True), scale, torch.nan)
    inverse = torch.where(scale >= SMALLEST_NORMAL, 1.0 / scale, 0.0)
    least = torch.full_like(low, -largest if zero_point < 0 else -zero_point)
    if input_scale is None and zero_point >= 0:
        least = -(-low * inverse).nan_to_num(0.0).clamp(0, largest).round()
    most = -least if zero_point < 0 else least + largest
    steps = torch.minimum(torch.maximum((x * inverse).nan_to_num(-254.0), least), most).round()
    return steps + input_shift(largest, zero_point), scale


def input_shift(largest: int, zero_point: int) -> int:
    """The number added to a code less its zero point so that it fits int8."""
    return zero_point - 127 if largest > 127 else 0


def linear_a8(
    x: Tensor,  # [tokens, columns] float32
    codes: Tensor,  # [rows, columns] uint8
    scales: Tensor,  # [rows, n_groups]
    doubled_zeros: Tensor,  # [rows, n_groups] int16
    group_size: int,
    bias: Tensor | None,  # [rows] float32
    input: InputFormat,
) -> Tensor:
    """x, quantized to int8, times the weight transposed, plus the bias: float32 `[tokens, rows]`."""
    x8, token_scale = quantize_tokens(x, *input)
    total = x.new_zeros(len(x), len(codes))
    for group in range(scales.shape[1]):
        columns = slice(group * group_size, (group + 1) * group_size)
        doubled = 2 * codes[:, columns].double() - doubled_zeros[:, group, None].double()
        exact = x8[:, columns].double() @ doubled.T
        total = total + exact.float() * scales[:, group].float()
    y = (token_scale * 0.5) * total
    return y if bias is None else y + bias


def pack_weight(
    codes: Tensor,  # [rows, columns] uint8
    scales: Tensor,  # [rows, n_groups] float16 or float32
    zero_points: Tensor | None,  # [rows, n_groups] uint8; None: symmetric
    bits: int,
    group_size: int,
) -> Tensor:
    """The weight in the streaming layout: uint8, one dimension."""
    rows, columns = codes.shape
    if codes.numel() == 0:
        return codes.new_empty(0)
    n_tiles, n_groups, n_blocks = packed_grid(rows, columns, group_size)
    implied = round(2 * _implied_zero(bits))
    doubled = scales.new_full(scales.shape, implied, dtype=torch.int16) if zero_points is None else 2 * zero_points.short()
    per_group = [pad(x, (0, 0, 0, -rows % TILE_ROWS)).reshape(n_tiles, TILE_ROWS, n_groups) for x in (scales, doubled)]
    header = torch.cat([x.transpose(1, 2).contiguous().view(torch.uint8) for x in per_group], -1)
    header = pad(header, (0, -header.shape[-1] % 64))

    whole = pad(codes, (0, n_groups * group_size - columns, 0, -rows % TILE_ROWS))
    groups = pad(whole.reshape(-1, n_groups, group_size), (0, -group_size % BLOCK_COLUMNS))
    quads = groups.reshape(n_tiles, TILE_ROWS, n_groups, n_blocks, QUADS, 4).permute(4, 0, 2, 3, 1, 5)
    vectors = codes.new_zeros(bits, n_tiles, n_groups, n_blocks, TILE_ROWS, 4)
    for quad, at, vector, to, width in _pieces(bits):
        vectors[vector] |= ((quads[quad] >> at) & (2**width - 1)) << to
    blocks = vectors.permute(1, 2, 3, 0, 4, 5).flatten(2)
    return torch.cat([header, blocks], -1).flatten()


def unpack_weight(
    packed: Tensor, rows: int, columns: int, bits: int, group_size: int, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 `[rows, columns]`, scales and doubled zero points (int16) `[rows, n_groups]` of a streaming layout."""
    n_tiles, n_groups, n_blocks = packed_grid(rows, columns, group_size)
    records = packed.reshape(n_tiles, n_groups, -1)
    of_scales = TILE_ROWS * scale_dtype.itemsize
    scales = records[..., :of_scales].contiguous().view(scale_dtype)
    doubled = records[..., of_scales : of_scales + 2 * TILE_ROWS].contiguous().view(torch.int16)
    scales, doubled = (x.transpose(1, 2).reshape(-1, n_groups)[:rows] for x in (scales, doubled))

    vectors = records[..., header_bytes(scale_dtype) :].reshape(n_tiles, n_groups, n_blocks, bits, TILE_ROWS, 4)
    quads = packed.new_zeros(QUADS, n_tiles, n_groups, n_blocks, TILE_ROWS, 4)
    for quad, at, vector, to, width in _pieces(bits):
        quads[quad] |= ((vectors[:, :, :, vector] >> to) & (2**width - 1)) << at
    groups = quads.permute(1, 4, 2, 3, 0, 5).reshape(n_tiles * TILE_ROWS, n_groups, -1)
    return join_groups(groups, columns, group_size)[:rows], scales, doubled


def packed_grid(rows: int, columns: int, group_size: int) -> tuple[int, int, int]:
    """Tiles, groups a row, and blocks a group."""
    return -(-rows // TILE_ROWS), -(-columns // group_size), -(-group_size // BLOCK_COLUMNS)


def header_bytes(scale_dtype: torch.dtype) -> int:
    """Bytes before a record's blocks."""
    return -(-TILE_ROWS * (scale_dtype.itemsize + 2) // 64) * 64


def _pieces(bits: int) -> Iterator[tuple[int, int, int, int, int]]:
    """(quad, from bit, vector, to bit, width): where each piece of the codes of a block lies."""
    fields = 8 // bits
    left_over = 8 - fields * bits
    for vector in range(bits):
        for field in range(fields):
            yield vector + bits * field, 0, vector, bits * field, bits
        for bit in range(left_over):  # bit by bit of the stream
            quad, at = divmod(vector * left_over + bit, bits)
            yield 8 - left_over + quad, at, vector, fields * bits + bit, 1


def split_groups(matrix: Tensor, group_size: int) -> Tensor:
    """`[rows, columns]` -> `[rows, n_groups, size]`, zeros behind a shorter last group and up to a multiple of `LANES`."""
    rows, columns = matrix.shape
    n_groups = -(-columns // group_size)
    whole = pad(matrix, (0, n_groups * group_size - columns)).reshape(rows, n_groups, group_size)
    return pad(whole, (0, -group_size % LANES))


def join_groups(groups: Tensor, columns: int, group_size: int) -> Tensor:
    """The inverse of `split_groups`."""
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
    """The integer nearest to `position` in `[0, 2**bits - 1]`; adding 0 makes -0 into +0."""
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
