"""A weight packed for the convolutions: made, unpacked and checked."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.kernels import reference_conv
from mpsearch.kernels.memory import readable
from mpsearch.kernels.packed_weight import MOST_GROUP_COLUMNS, MOST_SIZE, check_fields, check_format, check_values, dtype_of

# The fields of PackedConv after `data`, all numbers, the kernel size last: an operator takes one list in less time than nine
# arguments.
Format = tuple[int, ...]
KERNEL_SIZE = 7  # where it begins


@dataclass(frozen=True)
class PackedConv:
    """A weight `[rows, columns // taps, *kernel_size]`, `taps` the product of `kernel_size`, as the convolutions read it.

    data         uint8 `[nbytes]`, whose layout `reference_conv.py` describes
    columns      of the weight as a matrix: channels of a group times `taps`
    group_size   columns that share a scale, at most `columns`
    half_scales  whether scales are float16 (else float32)
    symmetric    whether zero points are the implied ones
    groups       of the convolution
    """

    data: Tensor
    rows: int
    columns: int
    bits: int
    group_size: int
    half_scales: bool
    symmetric: bool
    kernel_size: tuple[int, ...]
    groups: int

    def __post_init__(self) -> None:
        check_fields(self)
        if not isinstance(self.kernel_size, tuple) or any(type(size) is not int for size in self.kernel_size):
            raise InputError(f"kernel_size is {self.kernel_size!r}, but must be a tuple of 1 or 2 integers.")
        check_packed_conv(self.data, format_of(self))

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

    codes        uint8 `[rows, columns]`, below `2**bits`: a weight `[rows, channels / groups, *kernel_size]`, all but its rows
                 flattened
    scales       float16 or float32 `[rows, n_groups]`, finite, `n_groups = ceil(columns / group_size)`
    zero_points  uint8 `[rows, n_groups]`; `None` for symmetric codes, whose zero point is `2**(bits-1)`, at 1 bit 0.5
    bits         1 to 8
    group_size   columns per group, up to 32,768; fastest where it is all columns or whole channels, 4 or a multiple of 4
    kernel_size  `(width,)` or `(height, width)`
    groups       of the convolution, dividing the rows

    The packed weight takes no more bytes than codes packed densely, scales and zero points, but for the last byte of each tile:
    codes are padded to whole bytes at the end of each 16 rows and, where groups have 16 rows or more, of each group. (A call
    unpacks it into memory that its thread keeps for the next one: 1 or 2 bytes a weight for int8 input, 4 for floats.) Raises
    `InputError` where anything differs from that.
    """
    group_size = check_format(codes, scales, zero_points, bits, group_size)
    codes, scales, zero_points = (
        readable("codes", codes),
        readable("scales", scales.detach()),
        readable("zero_points", zero_points),
    )
    check_values(codes, scales, bits)
    (rows, columns), kernel_size = codes.shape, tuple(kernel_size)
    if len(kernel_size) not in (1, 2) or min(kernel_size) < 1:
        raise InputError(f"kernel_size is {kernel_size}, but must be 1 or 2 whole numbers of 1 or more.")
    height, width = pair_of(kernel_size, 1)
    if columns % (height * width):
        raise InputError(f"codes have {columns} columns, which a kernel of {height * width} weights a channel does not divide.")
    if groups < 1 or rows % groups:
        raise InputError(f"groups is {groups}, which does not divide the weight's {rows} rows.")
    data = reference_conv.pack_conv(codes, scales, zero_points, bits, group_size, (height, width), groups)
    half_scales = scales.dtype == torch.float16
    return PackedConv(data, rows, columns, bits, group_size, half_scales, zero_points is None, kernel_size, groups)


def unpack_conv(weight: PackedConv) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and zero points, exactly as they came to `pack_conv`, contiguous; zero points `None` where symmetric."""
    format = format_of(weight)
    check_packed_conv(weight.data, format)
    return unpacked_of(readable("the packed weight", weight.data), format)


def format_of(weight: PackedConv) -> Format:
    """Its fields as an operator takes them."""
    return (
        weight.rows,
        weight.columns,
        weight.bits,
        weight.group_size,
        weight.half_scales,
        weight.symmetric,
        weight.groups,
        *weight.kernel_size,
    )


def unpacked_of(data: Tensor, format: Format) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and zero points of `PackedConv.data`."""
    rows, columns, bits, group_size, half_scales, symmetric, groups, *kernel_size = format
    scale_dtype = torch.float16 if half_scales else torch.float32
    return reference_conv.unpack_conv(
        data, rows, columns, bits, group_size, scale_dtype, bool(symmetric), pair_of(kernel_size, 1), groups
    )


def pair_of(of: Sequence[int], missing: int) -> tuple[int, int]:
    """One dimension as two."""
    return (of[0], of[1]) if len(of) == 2 else (missing, of[0])


def check_packed_conv(data: Tensor, format: Format) -> None:
    """Refuse what is not a weight in the convolutions' layout."""
    n_bytes = expected_of(format)[0]
    if data.shape != (n_bytes,) or data.dtype != torch.uint8 or not data.is_contiguous():
        rows, columns, bits, group_size, _, _, groups, *kernel_size = format
        raise InputError(
            f"the packed weight is {dtype_of(data)} {list(data.shape)}, but {bits} bits [{rows}, {columns}] in groups of "
            f"{group_size}, kernel {kernel_size} and {groups} groups of the convolution are uint8 [{n_bytes}], contiguous. "
            "Make it with pack_conv."
        )


@functools.lru_cache(maxsize=4096)
def expected_of(format: Format) -> tuple[int, int]:
    """Bytes of a packed weight, -1 where there is none such, and the channels that x must have."""
    rows, columns, bits, group_size, half_scales, symmetric, groups, *kernel_size = format
    sound = (
        0 <= rows <= MOST_SIZE
        and 0 <= columns <= MOST_SIZE
        and 1 <= bits <= 8
        and 1 <= group_size <= MOST_GROUP_COLUMNS
        and groups >= 1
    )
    if not sound or len(kernel_size) not in (1, 2) or not 1 <= min(kernel_size) <= max(kernel_size) <= MOST_SIZE or rows % groups:
        return -1, -1
    height, width = pair_of(kernel_size, 1)
    if columns % (height * width):
        return -1, -1
    scale_bytes = 2 if half_scales else 4
    n_bytes = reference_conv.packed_bytes(rows, columns, bits, group_size, scale_bytes, bool(symmetric), (height, width), groups)
    return n_bytes, columns // (height * width) * groups
