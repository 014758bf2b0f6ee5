"""A weight packed for the convolutions: made, unpacked and checked."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.kernels import reference_conv
from mpsearch.kernels.checks import dtype_of, readable
from mpsearch.kernels.formats import ConvFormat
from mpsearch.kernels.packed_weight import MOST_GROUP_COLUMNS, MOST_SIZE, check_fields, check_values, checked_parts


@dataclass(frozen=True)
class PackedConv:
    """A weight as the convolutions read it: uint8 `[nbytes]`, whose layout `reference_conv.py` describes."""

    data: Tensor
    format: ConvFormat

    def __post_init__(self) -> None:
        check_fields(self.data, self.format)
        kernel_size = self.format.kernel_size
        if not isinstance(kernel_size, tuple) or any(type(size) is not int for size in kernel_size):
            raise InputError(f"kernel_size must be a tuple of 1 or 2 integers; got {kernel_size!r}.")
        check_packed_conv(self.data, self.format)

    @property
    def nbytes(self) -> int:
        """Bytes in memory: scales, zero points and dense codes, those of each tile of up to 16 rows in whole bytes."""
        return self.data.numel()


def pack_conv(
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    *,
    bits: int,
    group_size: int,
    kernel_size: tuple[int, ...],
    groups: int,
) -> PackedConv:
    """Prepare a quantized weight, as `quantize` gives it, for `conv` and `conv_a8`.

    Parameters
    ----------
    codes
        uint8 `[rows, columns]`, below `2**bits`: a weight `[rows, channels / groups, *kernel_size]`, all but its rows flattened.
    scales
        float16 or float32 `[rows, n_groups]`, finite, `n_groups = ceil(columns / group_size)`.
    zero_points
        uint8 `[rows, n_groups]`; `None` for symmetric codes, whose zero point is `2**(bits-1)`, at 1 bit 0.5.
    bits
        1 to 8.
    group_size
        Columns per group, up to 32,768; fastest where it is all columns or whole channels, 4 or a multiple of 4.
    kernel_size
        `(width,)` or `(height, width)`.
    groups
        Of the convolution, dividing the rows.

    The packed weight takes no more bytes than codes packed densely, scales and zero points, but for the last byte of each tile:
    codes are padded to whole bytes at the end of each 16 rows and, where groups have 16 rows or more, of each group. (A call
    unpacks it into memory that its thread keeps for the next one: 1 or 2 bytes a weight for int8 input, 4 for floats.)

    Raises
    ------
    InputError
        Anything differs from that.
    """
    codes, scales, zero_points, group_size = checked_parts(codes, scales, zero_points, bits, group_size)
    check_values(codes, scales, bits)
    (rows, columns), kernel_size = codes.shape, tuple(kernel_size)
    if len(kernel_size) not in (1, 2) or min(kernel_size) < 1:
        raise InputError(f"kernel_size must be 1 or 2 integers of 1 or more; got {kernel_size}.")
    format = ConvFormat(rows, columns, bits, group_size, scales.dtype == torch.float16, zero_points is None, groups, kernel_size)
    if columns % format.taps:
        raise InputError(f"codes have {columns} columns, which a kernel of {format.taps} weights a channel does not divide.")
    if groups < 1 or rows % groups:
        raise InputError(f"groups must divide the weight's {rows} rows; got {groups}.")
    return PackedConv(reference_conv.pack_conv(codes, scales, zero_points, format), format)


def unpack_conv(weight: PackedConv) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and zero points, exactly as `pack_conv` took them, contiguous; zero points `None` where symmetric."""
    check_packed_conv(weight.data, weight.format)
    return reference_conv.unpack_conv(readable("the packed weight", weight.data), weight.format)


def check_packed_conv(data: Tensor, format: ConvFormat) -> None:
    """Raise `InputError` where `data` is not a weight in the convolutions' layout."""
    n_bytes = expected_sizes(format)[0]
    if data.dtype is not torch.uint8 or data.shape != (n_bytes,) or not data.is_contiguous():
        raise InputError(
            f"The packed weight must be contiguous uint8 [{n_bytes}] for {format.bits} bits [{format.rows}, {format.columns}] in "
            f"groups of {format.group_size}, kernel {list(format.kernel_size)} and {format.groups} groups of the convolution; "
            f"got {dtype_of(data.dtype)} {list(data.shape)}. Make it with pack_conv."
        )


@functools.lru_cache(maxsize=4096)
def expected_sizes(format: ConvFormat) -> tuple[int, int]:
    """Bytes of a packed weight, -1 where the format is invalid, and the channels that x must have."""
    rows, columns, bits, group_size, _, _, groups, kernel_size = format
    sizes_fit = 0 <= rows <= MOST_SIZE and 0 <= columns <= MOST_SIZE and groups >= 1
    kernel_fits = len(kernel_size) in (1, 2) and 1 <= min(kernel_size) <= max(kernel_size) <= MOST_SIZE
    if not sizes_fit or not kernel_fits or not 1 <= bits <= 8 or not 1 <= group_size <= MOST_GROUP_COLUMNS:
        return -1, -1
    if rows % groups or columns % format.taps:
        return -1, -1
    return reference_conv.packed_bytes(format), columns // format.taps * groups
