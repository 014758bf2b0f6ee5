"""Matrix products with packed weights: `y = x W^T` for a Linear layer, its weight in the order in which the kernels stream it.

A weight is packed once (`pack_weight`, which checks it) and multiplied often: with float32 input (`linear`), or with the input
quantized to int8 (`linear_a8`). Both are registered with `torch.library` as `mpsearch::linear` and
`mpsearch::linear_a8`, so that `torch.compile` and meta tensors know them; gradients are not followed.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.kernels import cuda_backend, reference
from mpsearch.kernels.backends import backend_index, backend_of, compiled, is_plain
from mpsearch.kernels.memory import readable
from mpsearch.kernels.operators import register

MOST_SIZE = 2**31 - 1  # of an integer field of a packed weight
MOST_GROUP_COLUMNS = 32_768  # of a group: 2 * 255 * 127 * 32,768 is the largest such sum in int32
SMALLEST_SCALE, LARGEST_SCALE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max  # of an input


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
        raise InputError(f"codes are {_dtype(codes)} {list(codes.shape)}, but must be uint8 [rows, columns].")
    rows, columns = codes.shape
    group_size = min(group_size, max(columns, 1))
    if group_size > MOST_GROUP_COLUMNS:
        raise InputError(f"A group has {group_size} columns, but products take up to {MOST_GROUP_COLUMNS}. Use smaller groups.")
    per_group = [rows, -(-columns // group_size)]
    if scales.dtype not in (torch.float16, torch.float32):
        raise InputError(f"scales are {_dtype(scales)}, but must be float16 or float32.")
    if zero_points is not None and zero_points.dtype != torch.uint8:
        raise InputError(f"zero_points are {_dtype(zero_points)}, but must be uint8.")
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


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """`y[..., r] = bias[r] + sum over c of (code[r, c] - zero_point) * scale * x[..., c]`: float32 `[..., rows]`.

    x     float32 `[..., columns]`, any strides, on the device of `weight`; on CUDA also float16 or bfloat16, then y is, too
    bias  float32 `[rows]`, on the same device; `None` is zeros

    Within `(columns + 8) * 2**-24 * (|bias| + sum of |weight * x|)` of the exact result; on CUDA twice that, then rounded to
    the dtype. From some 256 tokens on (85 of float32; fewer with groups below 128) CUDA has cuBLAS multiply the dequantized
    weight, in the dtype. Raises `InputError` for another dtype, device or number of columns or rows.
    """
    op = _linear if is_plain(x) else _linear_op
    return op(x, weight.data, weight.rows, weight.columns, weight.bits, weight.group_size, weight.half_scales, bias)


def linear_a8(
    x: Tensor,
    weight: PackedWeight,
    bias: Tensor | None = None,
    input_scale: float | None = None,
    largest_code: int = 127,
    symmetric: bool = True,
    zero_point: int = 0,
) -> Tensor:
    """The same with x first quantized to 8 bits or fewer, values beyond its codes saturating: float32 `[..., rows]`.

    input_scale   the step, a positive normal float32 number; `None`: each token (a row of x) has its own, from its ends
    largest_code  1 to 127, 2**(bits-1) - 1 for symmetric codes, 2**bits - 1 for others
    symmetric     codes go from -largest_code to largest_code; else from 0, and stand for code - zero_point
    zero_point    where not symmetric and `input_scale` is given: 0 to largest_code

    Where both are given, largest_code may be up to 254: then what is multiplied is the code less 127, and the bias is to make up
    for the difference, `(127 - zero_point) * input_scale` times the sum of a row's weights.

    The result is defined to the bit (`reference.py`) and the same on every backend, for any number of threads and of tokens. A
    token with a NaN or infinite value gives NaN. Otherwise takes and raises what `linear` does.
    """
    op = _linear_a8 if is_plain(x) else _linear_a8_op
    format = weight.rows, weight.columns, weight.bits, weight.group_size, weight.half_scales
    return op(x, weight.data, *format, bias, input_scale, largest_code, code_of_zero(symmetric, zero_point, largest_code))


def code_of_zero(symmetric: bool, zero_point: int, largest_code: int) -> int:
    """The zero point as the operators take it: -1 where codes are symmetric."""
    if symmetric:
        return -1
    if zero_point < 0:
        raise InputError(f"zero_point is {zero_point}, but must be 0 to largest_code, {largest_code}.")
    return zero_point


def check_input(input_scale: float | None, largest_code: int, zero_point: int) -> None:
    """Of how an operator quantizes its input: what a kernel can do."""
    if input_scale is not None and not SMALLEST_SCALE <= input_scale <= LARGEST_SCALE:
        raise InputError(f"input_scale is {input_scale}, but must be from {SMALLEST_SCALE:g} to {LARGEST_SCALE:g}.")
    most = 127 if input_scale is None or zero_point < 0 else 254
    if not 1 <= largest_code <= most or not -1 <= zero_point <= largest_code:
        raise InputError(
            f"largest_code is {largest_code} and zero_point {zero_point}, but must be 1 to {most}, and 0 to largest_code."
        )


def _linear(
    x: Tensor, data: Tensor, rows: int, columns: int, bits: int, group_size: int, half_scales: bool, bias: Tensor | None = None
) -> Tensor:
    return _multiply(x, data, rows, columns, bits, group_size, half_scales, bias, None, 127, -1, False)


def _linear_a8(
    x: Tensor,
    data: Tensor,
    rows: int,
    columns: int,
    bits: int,
    group_size: int,
    half_scales: bool,
    bias: Tensor | None = None,
    input_scale: float | None = None,
    largest_code: int = 127,
    zero_point: int = -1,
) -> Tensor:
    of_input = input_scale, largest_code, zero_point
    return _multiply(x, data, rows, columns, bits, group_size, half_scales, bias, *of_input, True)


def _multiply(
    x: Tensor,
    data: Tensor,
    rows: int,
    columns: int,
    bits: int,
    group_size: int,
    half_scales: bool,
    bias: Tensor | None,
    input_scale: float | None,
    largest_code: int,
    zero_point: int,
    int8_input: bool,
) -> Tensor:
    """Called often and briefly: every attribute of a tensor costs as much as a row of the weight."""
    shape = _check_product(x, data, rows, columns, bits, group_size, half_scales, bias, input_scale, largest_code, zero_point)
    x, data, bias = readable("x", x), readable("the packed weight", data), readable("bias", bias)
    y = x.new_empty((*shape[:-1], rows))
    n_values = x.numel()
    if n_values == 0 or rows == 0:
        return y.zero_() if bias is None else y.copy_(bias.detach().expand_as(y))
    backend = backend_of(x)
    if backend == "reference":
        scale_dtype = torch.float16 if half_scales else torch.float32
        codes, scales, doubled_zeros = reference.unpack_weight(data, rows, columns, bits, group_size, scale_dtype)
        tokens, bias = x.detach().reshape(-1, columns).float(), None if bias is None else bias.detach()
        if int8_input:
            of_input = input_scale, largest_code, zero_point
            return y.copy_(reference.linear_a8(tokens, codes, scales, doubled_zeros, group_size, bias, *of_input).view_as(y))
        weight = reference.dequantize_doubled(codes, scales, doubled_zeros, group_size)
        return y.copy_(reference.linear(tokens, weight, bias).view_as(y))
    if not x.is_contiguous():
        x = x.detach().contiguous()
    if bias is not None and not bias.is_contiguous():
        bias = bias.detach().contiguous()
    if backend == "cuda":
        bias = None if bias is None else bias.detach()
        format, of_input = (columns, group_size, bits, half_scales), (input_scale, largest_code, zero_point)
        cuda_backend.linear(x.detach(), data, y, bias, *format, int8_input, *of_input)
        return y
    compiled.linear(
        backend_index(backend),
        x.data_ptr(),
        data.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        n_values // columns,
        rows,
        columns,
        group_size,
        bits,
        half_scales,
        int8_input,
        input_scale or 0.0,
        largest_code,
        zero_point,
        torch.get_num_threads(),
    )
    return y


def _fake(
    x: Tensor,
    data: Tensor,
    rows: int,
    columns: int,
    bits: int,
    group_size: int,
    half_scales: bool,
    bias: Tensor | None = None,
    input_scale: float | None = None,
    largest_code: int = 127,
    zero_point: int = -1,
) -> Tensor:
    _check_product(x, data, rows, columns, bits, group_size, half_scales, bias, input_scale, largest_code, zero_point)
    return x.new_empty((*x.shape[:-1], rows))


def _check_product(
    x: Tensor,
    data: Tensor,
    rows: int,
    columns: int,
    bits: int,
    group_size: int,
    half_scales: bool,
    bias: Tensor | None,
    input_scale: float | None,
    largest_code: int,
    zero_point: int,
) -> torch.Size:
    """What a kernel needs so as to stay within its tensors; gives the shape of x."""
    shape = x.shape
    if (x.dtype is not torch.float32 and not _takes_halves(x)) or not shape or shape[-1] != columns:
        floats = "float32, float16 or bfloat16" if x.is_cuda else "float32"
        raise InputError(f"x is {_dtype(x)} {list(x.shape)}, but must be {floats} [..., {columns}], the columns of the weight.")
    if x.device != data.device:
        raise InputError(f"x is on {x.device} and the packed weight on {data.device}, but must be on one device.")
    if bias is not None and (bias.dtype != torch.float32 or bias.shape != (rows,) or bias.device != data.device):
        raise InputError(
            f"bias is {_dtype(bias)} {list(bias.shape)} on {bias.device}, but must be float32 [{rows}] on {data.device}, "
            "one for each row of the weight."
        )
    check_input(input_scale, largest_code, zero_point)
    check_packed_weight(data, rows, columns, bits, group_size, half_scales)
    return shape


def _takes_halves(x: Tensor) -> bool:
    return x.dtype in (torch.float16, torch.bfloat16) and (x.is_cuda or cuda_backend.takes(x))


def check_packed_weight(data: Tensor, rows: int, columns: int, bits: int, group_size: int, half_scales: bool) -> None:
    """Refuse what is not a weight in the products' layout."""
    n_bytes = _packed_bytes(rows, columns, bits, group_size, half_scales)
    if data.dtype is not torch.uint8 or data.shape != (n_bytes,) or not data.is_contiguous():
        raise InputError(
            f"the packed weight is {_dtype(data)} {list(data.shape)}, but {bits} bits [{rows}, {columns}] in groups of "
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


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


_ARGUMENTS = "Tensor x, Tensor data, int rows, int columns, int bits, int group_size, bool half_scales, Tensor? bias=None"
register("linear", _ARGUMENTS, _linear, _fake)
register("linear_a8", _ARGUMENTS + ", float? input_scale=None, int largest_code=127, int zero_point=-1", _linear_a8, _fake)
_linear_op, _linear_a8_op = torch.ops.mpsearch.linear.default, torch.ops.mpsearch.linear_a8.default
