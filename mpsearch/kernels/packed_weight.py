"""A weight packed for the matrix products: made, unpacked and checked."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import get_type_hints

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.kernels import reference
from mpsearch.kernels.arguments import WeightArguments, addresses
from mpsearch.kernels.backends import backend_of, run
from mpsearch.kernels.checks import SCALE_DTYPES, check_range, checked, dtype_of, readable
from mpsearch.kernels.formats import ConvFormat, WeightFormat

MOST_SIZE = 2**31 - 1  # of an integer field of a packed weight
MOST_GROUP_COLUMNS = 32_768  # of a group: 2 * 255 * 127 * 32,768 is the largest such sum in int32


@dataclass(frozen=True)
class PackedWeight:
    """A weight `[rows, columns]` as the products read it: uint8 `[nbytes]`, whose layout `reference.py` describes."""

    data: Tensor
    format: WeightFormat

    def __post_init__(self) -> None:
        check_fields(self.data, self.format)
        check_packed_weight(self.data, self.format)

    @property
    def nbytes(self) -> int:
        """Bytes in memory: codes, scales and zero points, rows padded to 16 and groups to a multiple of 32 columns."""
        return self.data.numel()


def pack_weight(codes: Tensor, scales: Tensor, zero_points: Tensor | None, *, bits: int, group_size: int) -> PackedWeight:
    """Prepare a quantized weight, as `quantize` gives it, for `linear` and `linear_a8`.

    Parameters
    ----------
    codes
        uint8 `[rows, columns]`, below `2**bits`.
    scales
        float16 or float32 `[rows, n_groups]`, finite, `n_groups = ceil(columns / group_size)`.
    zero_points
        uint8 `[rows, n_groups]`; `None` for symmetric codes, whose zero point is `2**(bits-1)`, at 1 bit 0.5.
    bits
        1 to 8.
    group_size
        Columns per group, fastest where it is a multiple of 32 or all columns; groups of up to 32,768 columns.

    Raises
    ------
    InputError
        Anything differs from that.
    """
    codes, scales, zero_points, group_size = checked_parts(codes, scales, zero_points, bits, group_size)
    rows, columns = codes.shape
    format = WeightFormat(rows, columns, bits, group_size, scales.dtype == torch.float16, zero_points is None)
    backend = backend_of(codes, on_cuda=False)
    if backend == "reference":
        data, seen = reference.pack_weight(codes, scales, zero_points, bits, group_size), None
    else:
        codes, scales = codes.contiguous(), scales.contiguous()
        zero_points = None if zero_points is None else zero_points.contiguous()
        data, flags = codes.new_empty(_packed_bytes(format)), codes.new_zeros(1, dtype=torch.int32)
        run("pack_weight", backend, codes, _arguments(codes, scales, zero_points, data, format, flags))
        seen = int(flags)
    check_values(codes, scales, bits, seen)
    return PackedWeight(data, format)


def unpack_weight(packed: PackedWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and zero points, exactly as `pack_weight` took them, contiguous; zero points `None` where symmetric."""
    format = packed.format
    check_packed_weight(packed.data, format)
    data = readable("the packed weight", packed.data)
    backend = backend_of(data, on_cuda=False)
    if backend == "reference" and format.rows and format.columns:
        codes, scales, doubled_zeros = reference.unpack_weight(data, *format[:4], format.scale_dtype)
        zero_points = None if format.symmetric else (doubled_zeros.contiguous() // 2).to(torch.uint8)
        return codes, scales.contiguous(), zero_points
    codes = data.new_empty(format.rows, format.columns)
    scales = data.new_empty(format.rows, -(-format.columns // format.group_size), dtype=format.scale_dtype)
    zero_points = None if format.symmetric else torch.empty_like(scales, dtype=torch.uint8)
    if backend != "reference":
        run("unpack_weight", backend, data, _arguments(codes, scales, zero_points, data, format))
    return codes, scales, zero_points


def _arguments(
    codes: Tensor, scales: Tensor, zero_points: Tensor | None, data: Tensor, format: WeightFormat, seen: Tensor | None = None
) -> WeightArguments:
    return WeightArguments(
        **addresses(codes=codes, scales=scales, zero_points=zero_points, packed=data, seen=seen),
        packed_bytes=data.numel(),
        format=format,
    )


def check_fields(data: object, format: WeightFormat | ConvFormat) -> None:
    """Raise `InputError` where a field of a packed weight is not of its type, or an integer is out of range."""
    if not isinstance(data, Tensor):
        raise InputError(f"data must be a tensor; got {type(data).__name__}.")
    for name, kind in get_type_hints(type(format)).items():
        value = getattr(format, name)
        if kind is int and (type(value) is not int or not 0 <= value <= MOST_SIZE):
            raise InputError(f"{name} must be an integer from 0 to {MOST_SIZE}; got {value!r}.")
        if kind is bool and type(value) is not bool:
            raise InputError(f"{name} must be True or False; got {value!r}.")


def checked_parts(
    codes: Tensor, scales: Tensor, zero_points: Tensor | None, bits: int, group_size: int
) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """The readable parts of a quantized weight, and its group size, at most the columns; `InputError` where they do not fit."""
    check_range("bits", bits, 1, 8)
    check_range("group_size", group_size, 1)
    codes = checked("codes", codes, torch.uint8, ("rows", "columns"), contiguous=False)
    rows, columns = codes.shape
    group_size = min(group_size, max(columns, 1))
    if group_size > MOST_GROUP_COLUMNS:
        raise InputError(f"group_size must be at most {MOST_GROUP_COLUMNS} for products; got {group_size}. Use smaller groups.")
    per_group = (rows, -(-columns // group_size))
    scales = checked("scales", scales, SCALE_DTYPES, per_group, codes.device, contiguous=False)
    zero_points = checked("zero_points", zero_points, torch.uint8, per_group, codes.device, contiguous=False)
    return codes, scales, zero_points, group_size


def check_values(codes: Tensor, scales: Tensor, bits: int, seen: int | None = None) -> None:
    """Raise `InputError` for too large codes and scales that are not finite; `seen`: codes or-ed, + 256 if a scale is not."""
    if seen is None:
        seen = (int(codes.max()) if codes.numel() else 0) | (0 if torch.isfinite(scales).all() else 256)
    if seen >= 256:
        bad = int((~torch.isfinite(scales)).sum())
        raise InputError(f"{bad} of {scales.numel()} scales are NaN or infinite. Quantize a sound weight.")
    if seen >= 2**bits:
        raise InputError(f"The largest code is {int(codes.max())}, but {bits} bits hold 0 to {2**bits - 1}.")


def check_packed_weight(data: Tensor, format: WeightFormat) -> None:
    """Raise `InputError` where `data` is not a weight in the products' layout."""
    n_bytes = _packed_bytes(format)
    if data.dtype is not torch.uint8 or data.shape != (n_bytes,) or not data.is_contiguous():
        rows, columns, bits, group_size, *_ = format
        raise InputError(
            f"The packed weight must be contiguous uint8 [{n_bytes}] for {bits} bits [{rows}, {columns}] in groups of "
            f"{group_size}; got {dtype_of(data.dtype)} {list(data.shape)}. Make it with pack_weight."
        )


@functools.lru_cache(maxsize=4096)
def _packed_bytes(format: WeightFormat) -> int:
    """Bytes of a packed weight, -1 where the format is invalid."""
    rows, columns, bits, group_size, *_ = format
    sizes_fit = 0 <= rows <= MOST_SIZE and 0 <= columns <= MOST_SIZE
    if not sizes_fit or not 1 <= bits <= 8 or not 1 <= group_size <= MOST_GROUP_COLUMNS:
        return -1
    n_tiles, n_groups, n_blocks = reference.packed_grid(rows, columns, group_size)
    header = reference.header_bytes(format.scale_dtype)
    return n_tiles * n_groups * (header + n_blocks * bits * 2 * reference.BLOCK_COLUMNS)
