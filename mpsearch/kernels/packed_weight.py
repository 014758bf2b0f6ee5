"""A weight packed for the matrix products: made, unpacked and checked."""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.kernels import reference
from mpsearch.kernels.backends import backend_index, backend_of, compiled
from mpsearch.kernels.memory import readable

MOST_SIZE = 2**31 - 1  # of an integer field of a packed weight
MOST_GROUP_COLUMNS = 32_768  # of a group: 2 * 255 * 127 * 32,768 is the largest such sum in int32


@dataclass(frozen=True)
class PackedWeight:
    """A weight `[rows, columns]` as the products read it.

    data         uint8 `[nbytes]`, whose layout `reference.py` describes
    group_size   columns that share a scale, at most `columns`
    half_scales  whether scales are float16 (else float32)
    symmetric    whether zero points are the implied ones
    """

    data: Tensor
    rows: int
    columns: int
    bits: int
    group_size: int
    half_scales: bool
    symmetric: bool

    def __post_init__(self) -> None:
        check_fields(self)
        check_packed_weight(self.data, self.rows, self.columns, self.bits, self.group_size, self.half_scales)

    @property
    def nbytes(self) -> int:
        """Bytes in memory: codes, scales and zero points, rows padded to 16 and groups to a multiple of 32 columns."""
        return self.data.numel()


def pack_weight(codes: Tensor, scales: Tensor, zero_points: Tensor | None, *, bits: int, group_size: int) -> PackedWeight:
    """Prepare a quantized weight, as `quantize` gives it, for `linear` and `linear_a8`.

    codes        uint8 `[rows, columns]`, below `2**bits`
    scales       float16 or float32 `[rows, n_groups]`, finite, `n_groups = ceil(columns / group_size)`
    zero_points  uint8 `[rows, n_groups]`; `None` for symmetric codes, whose zero point is `2**(bits-1)`, at 1 bit 0.5
    bits         1 to 8
    group_size   columns per group, fastest where it is a multiple of 32 or all columns; groups of up to 32,768 columns

    Raises `InputError` where anything differs from that.
    """
    group_size = check_format(codes, scales, zero_points, bits, group_size)
    codes, scales, zero_points = (
        readable("codes", codes),
        readable("scales", scales.detach()),
        readable("zero_points", zero_points),
    )
    (rows, columns), half_scales = codes.shape, scales.dtype == torch.float16
    backend = backend_of(codes, on_cuda=False)
    if backend == "reference":
        seen = None
        data = reference.pack_weight(codes, scales, zero_points, bits, group_size)
    else:
        codes, scales = codes.contiguous(), scales.contiguous()
        zero_points = None if zero_points is None else zero_points.contiguous()
        data = torch.empty(_packed_bytes(rows, columns, bits, group_size, half_scales), dtype=torch.uint8)
        seen = compiled.pack_weight(
            backend_index(backend),
            codes.data_ptr(),
            scales.data_ptr(),
            0 if zero_points is None else zero_points.data_ptr(),
            data.data_ptr(),
            data.numel(),
            rows,
            columns,
            group_size,
            bits,
            half_scales,
            torch.get_num_threads(),
        )
    check_values(codes, scales, bits, seen)
    return PackedWeight(data, rows, columns, bits, group_size, half_scales, zero_points is None)


def unpack_weight(packed: PackedWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and zero points, exactly as they came to `pack_weight`, contiguous; zero points `None` where symmetric."""
    rows, columns, bits, group_size, half_scales = packed.rows, packed.columns, packed.bits, packed.group_size, packed.half_scales
    check_packed_weight(packed.data, rows, columns, bits, group_size, half_scales)
    data = readable("the packed weight", packed.data)
    scale_dtype = torch.float16 if half_scales else torch.float32
    backend = backend_of(data, on_cuda=False)
    if backend == "reference" and rows and columns:
        codes, scales, doubled_zeros = reference.unpack_weight(data, rows, columns, bits, group_size, scale_dtype)
        zero_points = None if packed.symmetric else (doubled_zeros.contiguous() // 2).to(torch.uint8)
        return codes, scales.contiguous(), zero_points
    codes = data.new_empty(rows, columns)
    zero_points = data.new_empty(rows, -(-columns // group_size))
    scales = zero_points.to(scale_dtype)
    zero_points = None if packed.symmetric else zero_points
    if backend != "reference":
        compiled.unpack_weight(
            backend_index(backend),
            codes.data_ptr(),
            scales.data_ptr(),
            0 if zero_points is None else zero_points.data_ptr(),
            data.data_ptr(),
            rows,
            columns,
            group_size,
            bits,
            half_scales,
            torch.get_num_threads(),
        )
    return codes, scales, zero_points


def check_fields(packed: Any) -> None:
    """Refuse a field of a packed weight (a dataclass) that is not of its type, or an integer out of range."""
    for field in fields(packed):
        value = getattr(packed, field.name)
        if field.type == "Tensor" and not isinstance(value, Tensor):
            raise InputError(f"{field.name} is a {type(value).__name__}, but must be a tensor.")
        if field.type == "int" and (type(value) is not int or not 0 <= value <= MOST_SIZE):
            raise InputError(f"{field.name} is {value!r}, but must be an integer from 0 to {MOST_SIZE}.")
        if field.type == "bool" and type(value) is not bool:
            raise InputError(f"{field.name} is {value!r}, but must be True or False.")


def check_format(codes: Tensor, scales: Tensor, zero_points: Tensor | None, bits: int, group_size: int) -> int:
    """Refuse codes, scales and zero points that do not fit together; the group size, at most the columns."""
    if not 1 <= bits <= 8:
        raise InputError(f"bits is {bits}, but must be 1 to 8.")
    if group_size < 1:
        raise InputError(f"group_size is {group_size}, but must be 1 or more.")
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise InputError(f"codes are {dtype_of(codes)} {list(codes.shape)}, but must be uint8 [rows, columns].")
    rows, columns = codes.shape
    group_size = min(group_size, max(columns, 1))
    if group_size > MOST_GROUP_COLUMNS:
        raise InputError(f"A group has {group_size} columns, but products take up to {MOST_GROUP_COLUMNS}. Use smaller groups.")
    per_group = [rows, -(-columns // group_size)]
    if scales.dtype not in (torch.float16, torch.float32):
        raise InputError(f"scales are {dtype_of(scales)}, but must be float16 or float32.")
    if zero_points is not None and zero_points.dtype != torch.uint8:
        raise InputError(f"zero_points are {dtype_of(zero_points)}, but must be uint8.")
    for name, tensor in {"scales": scales, "zero_points": zero_points}.items():
        if tensor is not None and list(tensor.shape) != per_group:
            raise InputError(f"{name} have shape {list(tensor.shape)}, but one value per group is {per_group}.")
        if tensor is not None and tensor.device != codes.device:
            raise InputError(f"{name} are on {tensor.device} and codes on {codes.device}, but must be on one device.")
    return group_size


def check_values(codes: Tensor, scales: Tensor, bits: int, seen: int | None = None) -> None:
    """Refuse codes that are too large and scales that are not finite; `seen` is the codes or-ed, + 256 if a scale is not."""
    if seen is None:
        seen = (int(codes.max()) if codes.numel() else 0) | (0 if torch.isfinite(scales).all() else 256)
    if seen >= 256:
        bad = int((~torch.isfinite(scales)).sum())
        raise InputError(f"{bad} of {scales.numel()} scales are NaN or infinite. Quantize a sound weight.")
    if seen >= 2**bits:
        raise InputError(f"The largest code is {int(codes.max())}, but {bits} bits hold 0 to {2**bits - 1}.")


def check_packed_weight(data: Tensor, rows: int, columns: int, bits: int, group_size: int, half_scales: bool) -> None:
    """Refuse what is not a weight in the products' layout."""
    n_bytes = _packed_bytes(rows, columns, bits, group_size, half_scales)
    if data.dtype is not torch.uint8 or data.shape != (n_bytes,) or not data.is_contiguous():
        raise InputError(
            f"the packed weight is {dtype_of(data)} {list(data.shape)}, but {bits} bits [{rows}, {columns}] in groups of "
            f"{group_size} are uint8 [{n_bytes}], contiguous. Make it with pack_weight."
        )


@functools.lru_cache(maxsize=4096)
def _packed_bytes(rows: int, columns: int, bits: int, group_size: int, half_scales: bool) -> int:
    """Bytes of a packed weight, -1 where there is none such."""
    if (
        not 0 <= rows <= MOST_SIZE
        or not 0 <= columns <= MOST_SIZE
        or not 1 <= bits <= 8
        or not 1 <= group_size <= MOST_GROUP_COLUMNS
    ):
        return -1
    n_tiles, n_groups, n_blocks = reference.packed_grid(rows, columns, group_size)
    header = reference.header_bytes(torch.float16 if half_scales else torch.float32)
    return n_tiles * n_groups * (header + n_blocks * bits * 2 * reference.BLOCK_COLUMNS)


def dtype_of(tensor: Tensor) -> str:
    """Its dtype for a message: `float32`."""
    return str(tensor.dtype).removeprefix("torch.")
