"""Convolutions in one and two dimensions with packed weights, for Conv1d and Conv2d layers of any groups.

A weight is packed once (`packed_conv.py`) and used often: with float32 input (`conv`), or with the input quantized
to int8 (`conv_a8`). Both are registered with `torch.library` as `mpsearch::conv` and `mpsearch::conv_a8`; gradients are not
followed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.kernels import reference, reference_conv
from mpsearch.kernels.backends import backend_index, backend_of, compiled, is_plain
from mpsearch.kernels.memory import readable
from mpsearch.kernels.operators import register
from mpsearch.kernels.packed_conv import (
    KERNEL_SIZE,
    Format,
    PackedConv,
    check_packed_conv,
    expected_of,
    format_of,
    pair_of,
    unpacked_of,
)
from mpsearch.kernels.packed_weight import dtype_of
from mpsearch.kernels.products import check_input, code_of_zero


def conv(
    x: Tensor,
    weight: PackedConv,
    bias: Tensor | None = None,
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    """x convolved with the weight, as `torch.nn.functional.conv2d` has it: float32 `[n, rows, *out]`.

    x         float32 `[n, channels, width]` or `[n, channels, height, width]` as the kernel has dimensions, on the device of
              `weight`; contiguous or channels-last, which the result then is too (other strides are copied)
    bias      float32 `[rows]`, on the same device; `None` is zeros
    stride, padding (with zeros, the same on both sides) and dilation have a number for each dimension

    Within `(columns + 8) * 2**-24 * (|bias| + sum of |weight * x|)` of the exact result; the same for any number of threads and
    in any batch. Raises `InputError` for another dtype, device or shape.
    """
    op = _conv if is_plain(x) else torch.ops.mpsearch.conv.default
    return op(x, weight.data, format_of(weight), bias, stride, padding, dilation)


def conv_a8(
    x: Tensor,
    weight: PackedConv,
    bias: Tensor | None = None,
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    input_scale: float | None = None,
    largest_code: int = 127,
    symmetric: bool = True,
    zero_point: int = 0,
) -> Tensor:
    """The same with x first quantized to 8 bits or fewer, values beyond its codes saturating: float32 `[n, rows, *out]`.

    input_scale   the step, a positive normal float32 number; `None`: each sample has its own, from its ends
    largest_code  1 to 127, 2**(bits-1) - 1 for symmetric codes, 2**bits - 1 for others
    symmetric     codes go from -largest_code to largest_code; else from 0, and stand for code - zero_point
    zero_point    where not symmetric and `input_scale` is given: 0 to largest_code

    Where both are given, largest_code may be up to 254: then what is multiplied is the code less 127, and the bias is to make up
    for the difference, `(127 - zero_point) * input_scale` times the sum of a row's weights.

    The result is defined to the bit (`reference_conv.py`) and the same on every backend, for any number of threads and in any
    batch. A sample with a NaN or infinite value gives NaN. Otherwise takes and raises what `conv` does.
    """
    op = _conv_a8 if is_plain(x) else torch.ops.mpsearch.conv_a8.default
    input_params = input_scale, largest_code, code_of_zero(symmetric, zero_point, largest_code)
    return op(x, weight.data, format_of(weight), bias, stride, padding, dilation, *input_params)


def _conv(
    x: Tensor,
    data: Tensor,
    format: Sequence[int],
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    return _convolve(x, data, tuple(format), bias, tuple(stride), tuple(padding), tuple(dilation))


def _conv_a8(
    x: Tensor,
    data: Tensor,
    format: Sequence[int],
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    input_scale: float | None,
    largest_code: int = 127,
    zero_point: int = -1,
) -> Tensor:
    geometry = tuple(stride), tuple(padding), tuple(dilation)
    return _convolve(x, data, tuple(format), bias, *geometry, input_scale, largest_code, zero_point, int8_input=True)


def _fake(
    x: Tensor,
    data: Tensor,
    format: Sequence[int],
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    input_scale: float | None = None,
    largest_code: int = 127,
    zero_point: int = -1,
) -> Tensor:
    _check(x, data, tuple(format), bias, input_scale, largest_code, zero_point)
    return _result(x, (x.shape[0], format[0], *_out_size(x.shape, tuple(format), tuple(stride), tuple(padding), tuple(dilation))))


def _convolve(
    x: Tensor,
    data: Tensor,
    format: Format,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    input_scale: float | None = None,
    largest_code: int = 127,
    zero_point: int = -1,
    *,
    int8_input: bool = False,
) -> Tensor:
    _check(x, data, format, bias, input_scale, largest_code, zero_point)
    x, data, bias = readable("x", x), readable("the packed weight", data), readable("bias", bias)
    channels_last = _is_channels_last(x)
    out, shape = _plan(x.shape, channels_last, format, stride, padding, dilation)
    y = _result(x, out)
    if y.numel() == 0 or x.numel() == 0:
        return y.zero_() if bias is None else y.copy_(bias.detach().reshape(-1, *[1] * (y.dim() - 2)).expand_as(y))
    backend = backend_of(x, on_cuda=False)
    x = x.detach() if x.requires_grad else x
    if bias is not None and (bias.requires_grad or not bias.is_contiguous()):
        bias = bias.detach().contiguous()
    if backend == "reference":
        input_params = (input_scale, largest_code, zero_point) if int8_input else None
        return y.copy_(_specified(x, data, format, bias, stride, padding, dilation, input_params).view(out))
    x = x if channels_last else x.contiguous()
    compiled.conv(
        backend_index(backend),
        x.data_ptr(),
        data.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        shape.data_ptr(),
        int8_input,
        input_scale or 0.0,
        largest_code,
        zero_point,
        torch.get_num_threads(),
    )
    return y


def _specified(
    x: Tensor,
    data: Tensor,
    format: Format,
    bias: Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    input_params: tuple[float | None, int, int] | None,
) -> Tensor:
    """What `reference_conv` gives, contiguous."""
    rows, _, bits, group_size, _, _, groups, *kernel_size = format
    codes, scales, zero_points = unpacked_of(data, format)
    x = x.unsqueeze(2) if x.dim() == 3 else x
    kernel, geometry = pair_of(kernel_size, 1), (pair_of(stride, 1), pair_of(padding, 0), pair_of(dilation, 1))
    if input_params:
        return reference_conv.conv_a8(
            x, codes, scales, zero_points, bits, group_size, bias, *input_params, kernel, *geometry, groups
        )
    weight = reference.dequantize_codes(codes, scales, zero_points, bits, group_size)
    return reference_conv.conv(x, weight.reshape(rows, -1, *kernel), bias, *geometry, groups).contiguous()


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _result(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    if _is_channels_last(x):
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return x.new_empty(shape)


@functools.lru_cache(maxsize=4096)
def _plan(
    size: torch.Size,
    channels_last: bool,
    format: Format,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[tuple[int, ...], Tensor]:
    """The shape of the result, and `ConvShape` of bind_conv.cpp."""
    rows, columns, bits, group_size, half_scales, symmetric, groups, *kernel_size = format
    out_size = _out_size(size, format, stride, padding, dilation)
    kernel = pair_of(kernel_size, 1)
    order = reference_conv.order_of(rows, columns, group_size, kernel, groups)
    shape = (size[0], size[1], *pair_of(size[2:], 1), rows, *pair_of(out_size, 1), *kernel)
    geometry = (*pair_of(stride, 1), *pair_of(padding, 0), *pair_of(dilation, 1), groups)
    how = (bits, group_size, half_scales, symmetric, order, channels_last)
    return (size[0], rows, *out_size), torch.tensor((*shape, *geometry, *how), device="cpu")


def _out_size(
    size: torch.Size, format: Format, stride: tuple[int, ...], padding: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[int, ...]:
    """Height and width of the result."""
    kernel_size = format[KERNEL_SIZE:]
    for name, given, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(given) != len(kernel_size) or min(given) < least:
            raise InputError(f"{name} is {given}, but must be {len(kernel_size)} whole numbers of {least} or more.")
    padded = [n + 2 * p for n, p in zip(size[2:], padding, strict=True)]
    covered = [d * (k - 1) + 1 for k, d in zip(kernel_size, dilation, strict=True)]
    if any(n < k for n, k in zip(padded, covered, strict=True)):
        raise InputError(f"The kernel covers {covered} values, dilation included, but the padded input has {padded}.")
    return tuple((n - k) // s + 1 for n, k, s in zip(padded, covered, stride, strict=True))


def _check(
    x: Tensor, data: Tensor, format: Format, bias: Tensor | None, input_scale: float | None, largest_code: int, zero_point: int
) -> None:
    """What a kernel needs so as to stay within its tensors; numbers only, as this runs at every call."""
    check_packed_conv(data, format)
    rows, n_dims, channels = format[0], len(format) - KERNEL_SIZE, expected_of(format)[1]
    shape, device = x.shape, data.device
    if x.dtype != torch.float32 or len(shape) != 2 + n_dims or shape[1] != channels:
        size = "height, width" if n_dims == 2 else "width"
        raise InputError(f"x is {dtype_of(x)} {list(shape)}, but must be float32 [n, {channels}, {size}] for this weight.")
    if x.device != device:
        raise InputError(f"x is on {x.device} and the packed weight on {device}, but must be on one device.")
    if bias is not None and (bias.dtype != torch.float32 or bias.shape != (rows,) or bias.device != device):
        raise InputError(
            f"bias is {dtype_of(bias)} {list(bias.shape)} on {bias.device}, but must be float32 [{rows}] on {device}, "
            "one for each row of the weight."
        )
    check_input(input_scale, largest_code, zero_point)


_ARGUMENTS = "Tensor x, Tensor data, int[] format, Tensor? bias, int[] stride, int[] padding, int[] dilation"
register("conv", _ARGUMENTS, _conv, _fake)
register("conv_a8", _ARGUMENTS + ", float? input_scale, int largest_code=127, int zero_point=-1", _conv_a8, _fake)
