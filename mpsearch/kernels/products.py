"""Matrix products with packed weights: `y = x W^T` for a Linear layer, its weight in the order in which the kernels stream it.

A weight is packed once (`packed_weight.py`) and multiplied often: with float32 input (`linear`), or with the input
quantized to int8 (`linear_a8`). Both are registered with `torch.library` as `mpsearch::linear` and
`mpsearch::linear_a8`, so that `torch.compile` and meta tensors know them; gradients are not followed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.kernels import cuda_backend, reference
from mpsearch.kernels.backends import backend_index, backend_of, compiled, is_plain
from mpsearch.kernels.memory import readable
from mpsearch.kernels.operators import register
from mpsearch.kernels.packed_weight import PackedWeight, check_packed_weight, dtype_of

SMALLEST_SCALE, LARGEST_SCALE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max  # of an input


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
    input_params = input_scale, largest_code, zero_point
    return _multiply(x, data, rows, columns, bits, group_size, half_scales, bias, *input_params, True)


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
            input_params = input_scale, largest_code, zero_point
            return y.copy_(reference.linear_a8(tokens, codes, scales, doubled_zeros, group_size, bias, *input_params).view_as(y))
        weight = reference.dequantize_doubled(codes, scales, doubled_zeros, group_size)
        return y.copy_(reference.linear(tokens, weight, bias).view_as(y))
    if not x.is_contiguous():
        x = x.detach().contiguous()
    if bias is not None and not bias.is_contiguous():
        bias = bias.detach().contiguous()
    if backend == "cuda":
        bias = None if bias is None else bias.detach()
        format, input_params = (columns, group_size, bits, half_scales), (input_scale, largest_code, zero_point)
        cuda_backend.linear(x.detach(), data, y, bias, *format, int8_input, *input_params)
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
        raise InputError(f"x is {dtype_of(x)} {list(x.shape)}, but must be {floats} [..., {columns}], the columns of the weight.")
    if x.device != data.device:
        raise InputError(f"x is on {x.device} and the packed weight on {data.device}, but must be on one device.")
    if bias is not None and (bias.dtype != torch.float32 or bias.shape != (rows,) or bias.device != data.device):
        raise InputError(
            f"bias is {dtype_of(bias)} {list(bias.shape)} on {bias.device}, but must be float32 [{rows}] on {data.device}, "
            "one for each row of the weight."
        )
    check_input(input_scale, largest_code, zero_point)
    check_packed_weight(data, rows, columns, bits, group_size, half_scales)
    return shape


def _takes_halves(x: Tensor) -> bool:
    return x.dtype in (torch.float16, torch.bfloat16) and (x.is_cuda or cuda_backend.takes(x))


_ARGUMENTS = "Tensor x, Tensor data, int rows, int columns, int bits, int group_size, bool half_scales, Tensor? bias=None"
register("linear", _ARGUMENTS, _linear, _fake)
register("linear_a8", _ARGUMENTS + ", float? input_scale=None, int largest_code=127, int zero_point=-1", _linear_a8, _fake)
_linear_op, _linear_a8_op = torch.ops.mpsearch.linear.default, torch.ops.mpsearch.linear_a8.default
