"""Matrix products with packed weights: `y = x W^T` for a Linear layer, its weight in the order in which the kernels stream it.

A weight is packed once (`packed_weight.py`) and multiplied often: with float32 input (`linear`), or with the input
quantized to int8 (`linear_a8`). Both are registered with `torch.library` as `mpsearch::linear` and
`mpsearch::linear_a8`, so that `torch.compile` and meta tensors know them; gradients are not followed. `embedding` looks up
rows of such a weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.kernels import cuda_backend, reference
from mpsearch.kernels.arguments import EmbeddingArguments, addresses, linear_arguments
from mpsearch.kernels.backends import backend_of, is_plain, run
from mpsearch.kernels.checks import check_tensor, dtype_of, readable
from mpsearch.kernels.formats import InputFormat, WeightFormat
from mpsearch.kernels.operators import register
from mpsearch.kernels.packed_weight import PackedWeight, check_packed_weight

SMALLEST_SCALE, LARGEST_SCALE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max  # of an input


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """`y[..., r] = bias[r] + sum over c of (code[r, c] - zero_point) * scale * x[..., c]`: float32 `[..., rows]`.

    Parameters
    ----------
    x
        float32 `[..., columns]`, any strides, on the device of `weight`; on CUDA also float16 or bfloat16, then y is, too.
    bias
        float32 `[rows]`, on the same device; `None` is zeros.

    Within `(columns + 8) * 2**-24 * (|bias| + sum of |weight * x|)` of the exact result; on CUDA twice that, then rounded to
    the dtype. From some 256 tokens on (85 of float32; fewer with groups below 128) CUDA has cuBLAS multiply the dequantized
    weight, in the dtype.

    Raises
    ------
    InputError
        Another dtype, device or number of columns or rows.
    """
    if is_plain(x):
        return _multiply(x, weight.data, weight.format, bias, None)
    return _linear_op(x, weight.data, weight.format, bias)


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

    Parameters
    ----------
    input_scale
        The step, a positive normal float32 number; `None`: each token (a row of x) has its own, from its ends.
    largest_code
        1 to 127, 2**(bits-1) - 1 for symmetric codes, 2**bits - 1 for others.
    symmetric
        Codes go from -largest_code to largest_code; else from 0, and stand for code - zero_point.
    zero_point
        Where not symmetric and `input_scale` is given: 0 to largest_code.

    Where both are given, largest_code may be up to 254: then what is multiplied is the code less 127, and the bias is to make up
    for the difference, `(127 - zero_point) * input_scale` times the sum of a row's weights.

    The result is defined to the bit (`reference.py`) and the same on every backend, for any number of threads and of tokens. A
    token with a NaN or infinite value gives NaN. Otherwise takes and raises what `linear` does.
    """
    input = input_format(input_scale, largest_code, symmetric, zero_point)
    if is_plain(x):
        return _multiply(x, weight.data, weight.format, bias, input)
    return _linear_a8_op(x, weight.data, weight.format, bias, *input)


def embedding(indices: Tensor, weight: PackedWeight) -> Tensor:
    """The rows of `weight` that `indices` name, `(code - zero_point) * scale` with one rounding: float32 `[..., columns]`.

    indices  int64 or int32 `[...]`, any strides, from 0 to `rows - 1`, on the device of `weight`

    Bit for bit the rows of `dequantize`. Reads the weight in the layout of `linear`, so that an embedding that is tied to a
    Linear layer is held once. Raises `InputError` for indices out of range, another dtype or device.
    """
    return torch.ops.mpsearch.embedding(indices, weight.data, weight.format)


def input_format(scale: float | None, largest_code: int, symmetric: bool, zero_point: int) -> InputFormat:
    """The format by which operators know an input: the zero point is -1 where codes are symmetric."""
    if symmetric:
        return InputFormat(scale, largest_code, -1)
    if zero_point < 0:
        raise InputError(f"zero_point must be 0 to largest_code, {largest_code}; got {zero_point}.")
    return InputFormat(scale, largest_code, zero_point)


def check_input(input: InputFormat) -> None:
    """Raise `InputError` where no kernel quantizes its input so."""
    scale, largest_code, zero_point = input
    if scale is not None and not SMALLEST_SCALE <= scale <= LARGEST_SCALE:
        raise InputError(f"input_scale must be {SMALLEST_SCALE:g} to {LARGEST_SCALE:g}; got {scale}.")
    most = 127 if scale is None or zero_point < 0 else 254
    if not 1 <= largest_code <= most or not -1 <= zero_point <= largest_code:
        raise InputError(
            f"largest_code must be 1 to {most}, and zero_point 0 to largest_code; got {largest_code} and {zero_point}."
        )


def _multiply(x: Tensor, data: Tensor, format: WeightFormat, bias: Tensor | None, input: InputFormat | None) -> Tensor:
    """Called often and briefly: every attribute of a tensor costs as much as a row of the weight."""
    shape = _check_product(x, data, format, bias, input)
    x, data, bias = readable("x", x), readable("the packed weight", data), readable("bias", bias)
    y = x.new_empty((*shape[:-1], format.rows))
    if x.numel() == 0 or format.rows == 0:
        return y.zero_() if bias is None else y.copy_(bias.detach().expand_as(y))
    backend = backend_of(x)
    if backend == "reference":
        bias = None if bias is None else bias.detach()
        return y.copy_(_specified(x.detach().reshape(-1, format.columns).float(), data, format, bias, input).view_as(y))
    if not x.is_contiguous():
        x = x.detach().contiguous()
    if bias is not None and not bias.is_contiguous():
        bias = bias.detach().contiguous()
    if backend == "cuda":
        cuda_backend.linear(x.detach(), data, y, None if bias is None else bias.detach(), format, input)
    else:
        run("linear", backend, x, linear_arguments(x, data, y, bias, format, input))
    return y


def _specified(tokens: Tensor, data: Tensor, format: WeightFormat, bias: Tensor | None, input: InputFormat | None) -> Tensor:
    """The product by `reference`: float32 `[tokens, rows]`."""
    codes, scales, doubled_zeros = reference.unpack_weight(data, *format[:4], format.scale_dtype)
    if input is not None:
        return reference.linear_a8(tokens, codes, scales, doubled_zeros, format.group_size, bias, input)
    return reference.linear(tokens, reference.dequantize_doubled(codes, scales, doubled_zeros, format.group_size), bias)


def _check_product(x: Tensor, data: Tensor, format: WeightFormat, bias: Tensor | None, input: InputFormat | None) -> torch.Size:
    """The shape of x; raises `InputError` where a kernel would leave its tensors."""
    shape = x.shape
    if (x.dtype is not torch.float32 and not _takes_halves(x)) or not shape or shape[-1] != format.columns:
        floats = "float32, float16 or bfloat16" if x.is_cuda else "float32"
        raise InputError(
            f"x must be {floats} [..., {format.columns}], the columns of the weight; got {dtype_of(x.dtype)} {list(shape)}."
        )
    if x.device != data.device:
        raise InputError(f"x and the packed weight must be on one device; got {x.device} and {data.device}.")
    if bias is not None:
        check_tensor("bias", bias, torch.float32, (format.rows,), data.device, contiguous=False)
    if input is not None:
        check_input(input)
    check_packed_weight(data, format)
    return shape


def _takes_halves(x: Tensor) -> bool:
    return x.dtype in (torch.float16, torch.bfloat16) and (x.is_cuda or cuda_backend.takes(x))


def _look_up(indices: Tensor, data: Tensor, format: WeightFormat) -> Tensor:
    rows, columns, *_ = format
    _check_indices(indices, data, format)
    data = readable("the packed weight", data)
    # A copy: what is checked is then what is read, whatever another thread writes to the caller's tensor meanwhile.
    indices = readable("indices", indices).clone(memory_format=torch.contiguous_format)
    backend = backend_of(indices, on_cuda=False)
    if backend == "reference" or columns == 0:
        bad = ((indices < 0) | (indices >= rows)).flatten().nonzero()
        if len(bad):
            _raise_out_of_range(indices, int(bad[0]), rows)
        if indices.numel() == 0 or columns == 0:
            return torch.empty((*indices.shape, columns), device=indices.device)
        codes, scales, doubled_zeros = reference.unpack_weight(data, *format[:4], format.scale_dtype)
        return reference.dequantize_doubled(codes, scales, doubled_zeros, format.group_size)[indices.long()]
    y, bad_place = torch.empty(*indices.shape, columns), torch.full((1,), -1)
    arguments = EmbeddingArguments(
        **addresses(indices=indices, packed=data, y=y, bad_place=bad_place),
        n_indices=indices.numel(),
        format=format,
        wide_indices=indices.dtype == torch.int64,
    )
    run("embedding", backend, indices, arguments)
    if int(bad_place) >= 0:
        _raise_out_of_range(indices, int(bad_place), rows)
    return y


def _check_indices(indices: Tensor, data: Tensor, format: WeightFormat) -> None:
    check_tensor("indices", indices, (torch.int64, torch.int32), ("...",), data.device, contiguous=False)
    check_packed_weight(data, format)


def _raise_out_of_range(indices: Tensor, place: int, rows: int) -> None:
    allowed = f"0 to {rows - 1}" if rows else "none"
    raise InputError(f"Index {int(indices.flatten()[place])}, number {place} of {indices.numel()}, is out of range: {allowed}.")


def _fake(x: Tensor, data: Tensor, format: Sequence[Any], bias: Tensor | None = None, *input: Any) -> Tensor:
    _check_product(x, data, WeightFormat(*format), bias, InputFormat(*input))
    return x.new_empty((*x.shape[:-1], format[0]))


def _fake_embedding(indices: Tensor, data: Tensor, format: Sequence[Any]) -> Tensor:
    _check_indices(indices, data, WeightFormat(*format))
    return indices.new_empty((*indices.shape, format[1]), dtype=torch.float32)


# `format` has the fields of WeightFormat.
_ARGUMENTS = "Tensor x, Tensor data, int[] format, Tensor? bias=None"
register(
    "linear",
    _ARGUMENTS,
    lambda x, data, format, bias=None: _multiply(x, data, WeightFormat(*format), bias, None),
    _fake,
)
register(
    "linear_a8",
    _ARGUMENTS + ", float? input_scale=None, int largest_code=127, int zero_point=-1",
    lambda x, data, format, bias=None, *input: _multiply(x, data, WeightFormat(*format), bias, InputFormat(*input)),
    _fake,
)
register(
    "embedding",
    "Tensor indices, Tensor data, int[] format",
    lambda indices, data, format: _look_up(indices, data, WeightFormat(*format)),
    _fake_embedding,
)
_linear_op, _linear_a8_op = torch.ops.mpsearch.linear.default, torch.ops.mpsearch.linear_a8.default
