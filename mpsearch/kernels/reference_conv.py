"""The specification of convolutions and embeddings of packed weights in plain PyTorch, written to be read; see `reference.py`.

A weight `[rows, channels / groups, *kernel]` is the matrix `[rows, columns]`; x and y have two dimensions, `[n, channels, h, w]`,
one dimension being a height of 1. `window[n, c, p]` is the value of x under column c of the window of output position p, 0 in the
padding. Of sample n, row r and position p, summed over the columns c (of scale group g):

    conv       y[n, r, p] = (sum of weight[r, c] * window[n, c, p]) + bias[r]
    conv_a8    x8 = x quantized as `linear_a8` does, a sample being a token; its windows are window8
               D[n, r, g, p] = sum of (2 * code[r, c] - 2 * zero[r, g]) * window8[n, c, p]     exact, then rounded to float32
               y[n, r, p] = ((sample_scale[n] * 0.5) * sum of D * scale[r, g] over g in ascending order) + bias[r]

Without a bias nothing is added. The backends equal `conv_a8` bit for bit, and are within
`(columns + 8) * 2**-24 * (|bias| + sum of |weight * window|)` of `conv`, which is float64 here, rounded at the end.

A packed convolution is scales `[rows, n_groups]`, zero points `[rows, n_groups]` unless symmetric, and for each tile of up to 16
rows the bit stream of its codes up to a whole byte. In each scale group, one after the other, codes go by units of columns, in a
unit by rows, in a row by columns. A unit is, by the `order`,

    WHOLE       up to 4 channels at one kernel position, where a scale covers whole channels; by kernel position, then channel
    GATHERED    up to 4 consecutive columns
    LANES       1 column, where the convolution's groups have fewer than 16 rows; then tiles may span several of them
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mpsearch.kernels.formats import ConvFormat, Geometry, InputFormat
from mpsearch.kernels.reference import TILE_ROWS, input_shift, pack, quantize_tokens, unpack

UNIT_COLUMNS = 4
WHOLE, GATHERED, LANES = range(3)


def conv(x: Tensor, weight: Tensor, bias: Tensor | None, format: ConvFormat, geometry: Geometry) -> Tensor:
    """x `[n, channels, h, w]` convolved with `weight` `[rows, columns]`, in float64, as float32."""
    kernels = weight.double().reshape(format.rows, -1, *format.kernel)
    bias = None if bias is None else bias.double()
    stride, padding, dilation = geometry.pairs
    return F.conv2d(x.double(), kernels, bias, stride, padding, dilation, format.groups).float()


def conv_a8(
    x: Tensor,  # [n, channels, h, w] float32
    codes: Tensor,  # [rows, columns] uint8
    scales: Tensor,  # [rows, n_groups]
    zero_points: Tensor | None,  # [rows, n_groups] uint8; None: symmetric
    bias: Tensor | None,  # [rows] float32
    format: ConvFormat,
    geometry: Geometry,
    input: InputFormat,
) -> Tensor:
    """x, quantized to int8, convolved with a quantized weight: float32 `[n, rows, positions]`."""
    bits, group_size, groups = format.bits, format.group_size, format.groups
    stride, padding, dilation = geometry.pairs
    (rows, columns), n = codes.shape, len(x)
    x8, sample_scale = quantize_tokens(x.flatten(1), *input)
    sides, shift = (padding[1], padding[1], padding[0], padding[0]), float(input_shift(input.largest_code, input.zero_point))
    padded = F.pad(x8.reshape(x.shape).double(), sides, value=shift)
    windows = F.unfold(padded, format.kernel, dilation, 0, stride)
    windows = windows.reshape(n, groups, columns, -1)
    doubled_zeros = torch.full_like(scales, 1 if bits == 1 else 2**bits) if zero_points is None else 2 * zero_points.double()
    total = x.new_zeros(n, rows, windows.shape[-1])
    for group in range(scales.shape[1]):
        columns_of = slice(group * group_size, (group + 1) * group_size)
        doubled = 2 * codes[:, columns_of].double() - doubled_zeros[:, group, None].double()
        exact = doubled.reshape(groups, rows // groups, -1) @ windows[:, :, columns_of]
        total = total + exact.reshape(total.shape).float() * scales[:, group, None].float()
    y = (sample_scale[:, :, None] * 0.5) * total
    return y if bias is None else y + bias[:, None]


def order_of(format: ConvFormat) -> int:
    """The order in which a convolution's codes are packed."""
    if format.groups > 1 and format.rows // format.groups < TILE_ROWS:
        return LANES
    whole_channels = format.group_size >= format.columns or format.group_size % (UNIT_COLUMNS * format.taps) == 0
    return WHOLE if whole_channels else GATHERED


def pack_conv(
    codes: Tensor,  # [rows, columns] uint8
    scales: Tensor,  # [rows, n_groups] float16 or float32
    zero_points: Tensor | None,  # [rows, n_groups] uint8; None: symmetric
    format: ConvFormat,
) -> Tensor:
    """The weight as the convolutions read it: uint8, one dimension."""
    if codes.numel() == 0:
        return codes.new_empty(0)
    parts = [scales.contiguous().flatten().view(torch.uint8)]
    if zero_points is not None:
        parts.append(zero_points.flatten())
    for tile, by_unit, place in _places(format, codes.device):
        stream = codes.new_empty(place.numel())
        stream[place] = codes[tile][:, by_unit]
        parts.append(pack(stream, format.bits))
    return torch.cat(parts)


def unpack_conv(data: Tensor, format: ConvFormat) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inverse of `pack_conv`: codes, scales and zero points."""
    rows, columns, bits, group_size, _, symmetric, _, _ = format
    scale_dtype = format.scale_dtype
    n_groups = -(-columns // group_size)
    codes = data.new_empty(rows, columns)
    if codes.numel() == 0:
        empty = data.new_empty(rows, n_groups)
        return codes, empty.to(scale_dtype), None if symmetric else empty
    n_scales = rows * n_groups
    at = n_scales * scale_dtype.itemsize
    scales = data[:at].clone().view(scale_dtype).reshape(rows, n_groups)
    zero_points = None if symmetric else data[at : at + n_scales].reshape(rows, n_groups).clone()
    at += 0 if symmetric else n_scales
    for tile, by_unit, place in _places(format, data.device):
        end = at + -(-place.numel() * bits // 8)
        stream = unpack(data[at:end], bits, place.numel())
        codes[tile, by_unit] = stream[place]
        at = end
    return codes, scales, zero_points


def packed_bytes(format: ConvFormat) -> int:
    """The bytes of `pack_conv`'s result."""
    rows, columns, bits, group_size, _, symmetric, _, _ = format
    if rows == 0 or columns == 0:
        return 0
    run = _run(format)
    n_full, rest = divmod(run, TILE_ROWS)
    codes = rows // run * (n_full * (TILE_ROWS * columns * bits // 8) + -(-rest * columns * bits // 8))
    return rows * -(-columns // group_size) * (format.scale_dtype.itemsize + (not symmetric)) + codes


def _run(format: ConvFormat) -> int:
    """Rows that are cut into tiles together: those of one group of the convolution, or all."""
    return format.rows if order_of(format) == LANES else format.rows // format.groups


def _tiles(format: ConvFormat) -> list[slice]:
    """The rows of each tile."""
    run = _run(format)
    firsts = [row for begin in range(0, format.rows, run) for row in range(begin, begin + run, TILE_ROWS)]
    return [slice(first, min(first + TILE_ROWS, (first // run + 1) * run)) for first in firsts]


def _units(format: ConvFormat) -> Iterator[list[int]]:
    """The columns of each unit."""
    order, taps = order_of(format), format.taps
    for begin in range(0, format.columns, format.group_size):
        end = min(begin + format.group_size, format.columns)
        if order == WHOLE:
            for tap in range(taps):
                at_tap = range(begin + tap, end, taps)
                yield from (list(at_tap[i : i + UNIT_COLUMNS]) for i in range(0, len(at_tap), UNIT_COLUMNS))
        else:
            n = 1 if order == LANES else UNIT_COLUMNS
            yield from (list(range(i, min(i + n, end))) for i in range(begin, end, n))


def _places(format: ConvFormat, device: torch.device) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Of each tile its rows, the columns by unit `[columns]`, and where in its stream codes so sorted lie `[rows, columns]`."""
    units = list(_units(format))
    sizes = torch.tensor([len(unit) for unit in units], device=device)
    by_unit = torch.tensor([column for unit in units for column in unit], device=device)
    size = sizes.repeat_interleave(sizes)
    start = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)  # of a column's unit
    within = torch.arange(format.columns, device=device) - start
    for tile in _tiles(format):
        row = torch.arange(tile.stop - tile.start, device=device)[:, None]
        yield tile, by_unit, start * len(row) + row * size + within
