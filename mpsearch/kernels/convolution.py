"""Convolutions in one and two dimensions with packed weights, for Conv1d and Conv2d layers of any groups.

A weight is packed once (`packed_conv.py`) and used often: with float32 input (`conv`), or with the input quantized
to int8 (`conv_a8`). Both are registered with `torch.library` as `mpsearch::conv` and `mpsearch::conv_a8`; gradients are not
followed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.kernels import reference, reference_conv
from mpsearch.kernels.arguments import ConvArguments, ConvShape, addresses, input_fields
from mpsearch.kernels.backends import backend_of, is_plain, run
from mpsearch.kernels.checks import check_tensor, readable
from mpsearch.kernels.formats import ConvFormat, Geometry, InputFormat, pair
from mpsearch.kernels.operators import register
from mpsearch.kernels.packed_conv import PackedConv, check_packed_conv, expected_sizes
from mpsearch.kernels.products import check_input, input_format


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

    Parameters
    ----------
    x
        float32 `[n, channels, width]` or `[n, channels, height, width]` as the kernel has dimensions, on the device of
        `weight`; contiguous or channels-last, which the result then is too (other strides are copied).
    bias
        float32 `[rows]`, on the same device; `None` is zeros.
    stride, padding, dilation
        A number for each dimension; the padding is of zeros, the same on both sides.

    Within `(columns + 8) * 2**-24 * (|bias| + sum of |weight * x|)` of the exact result; the same for any number of threads and
    in any batch.

    Raises
    ------
    InputError
        Another dtype, device or shape.
    """
    if is_plain(x):
        return _convolve(x, weight.data, weight.format, bias, _geometry((stride, padding, dilation)), None)
    return torch.ops.mpsearch.conv(x, weight.data, weight.format.to_list(), bias, stride, padding, dilation)


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

    Parameters
    ----------
    input_scale
        The step, a positive normal float32 number; `None`: each sample has its own, from its ends.
    largest_code
        1 to 127, 2**(bits-1) - 1 for symmetric codes, 2**bits - 1 for others.
    symmetric
        Codes go from -largest_code to largest_code; else from 0, and stand for code - zero_point.
    zero_point
        Where not symmetric and `input_scale` is given: 0 to largest_code.

    Where both are given, largest_code may be up to 254: then what is multiplied is the code less 127, and the bias is to make up
    for the difference, `(127 - zero_point) * input_scale` times the sum of a row's weights.

    The result is defined to the bit (`reference_conv.py`) and the same on every backend, for any number of threads and in any
    batch. A sample with a NaN or infinite value gives NaN. Otherwise takes and raises what `conv` does.
    """
    input = input_format(input_scale, largest_code, symmetric, zero_point)
    if is_plain(x):
        return _convolve(x, weight.data, weight.format, bias, _geometry((stride, padding, dilation)), input)
    return torch.ops.mpsearch.conv_a8(x, weight.data, weight.format.to_list(), bias, stride, padding, dilation, *input)


def _convolve(
    x: Tensor, data: Tensor, format: ConvFormat, bias: Tensor | None, geometry: Geometry, input: InputFormat | None
) -> Tensor:
    _check(x, data, format, bias, input)
    x, data, bias = readable("x", x), readable("the packed weight", data), readable("bias", bias)
    channels_last = _is_channels_last(x)
    out, shape = _plan(x.shape, channels_last, format, geometry)
    y = _result(x, out)
    if y.numel() == 0 or x.numel() == 0:
        return y.zero_() if bias is None else y.copy_(bias.detach().reshape(-1, *[1] * (y.dim() - 2)).expand_as(y))
    backend = backend_of(x, on_cuda=False)
    x = x.detach() if x.requires_grad else x
    if bias is not None and (bias.requires_grad or not bias.is_contiguous()):
        bias = bias.detach().contiguous()
    if backend == "reference":
        return y.copy_(_specified(x, data, format, bias, geometry, input).view(out))
    x = x if channels_last else x.contiguous()
    arguments = ConvArguments(
        **addresses(x=x, packed=data, bias=bias, y=y),
        shape=shape,
        input=input_fields(input),
        int8_input=input is not None,
    )
    run("conv", backend, x, arguments)
    return y


def _specified(
    x: Tensor, data: Tensor, format: ConvFormat, bias: Tensor | None, geometry: Geometry, input: InputFormat | None
) -> Tensor:
    """The result by `reference_conv`, contiguous."""
    codes, scales, zero_points = reference_conv.unpack_conv(data, format)
    x = x.unsqueeze(2) if x.dim() == 3 else x
    if input is not None:
        return reference_conv.conv_a8(x, codes, scales, zero_points, bias, format, geometry, input)
    weight = reference.dequantize_codes(codes, scales, zero_points, format.bits, format.group_size)
    return reference_conv.conv(x, weight, bias, format, geometry).contiguous()


def _is_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _result(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    if _is_channels_last(x):
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return x.new_empty(shape)


@functools.lru_cache(maxsize=4096)
def _plan(size: torch.Size, channels_last: bool, format: ConvFormat, geometry: Geometry) -> tuple[tuple[int, ...], Any]:
    """The shape of the result, and the sizes that the kernel is given."""
    out_size = _out_size(size, format, geometry)
    (stride, padding, dilation), (height, width), out = geometry.pairs, pair(size[2:], 1), pair(out_size, 1)
    shape = ConvShape(
        n_samples=size[0],
        channels=size[1],
        height=height,
        width=width,
        rows=format.rows,
        out_height=out[0],
        out_width=out[1],
        kernel_h=format.kernel[0],
        kernel_w=format.kernel[1],
        stride_h=stride[0],
        stride_w=stride[1],
        padding_h=padding[0],
        padding_w=padding[1],
        dilation_h=dilation[0],
        dilation_w=dilation[1],
        groups=format.groups,
        group_size=format.group_size,
        bits=format.bits,
        order=reference_conv.order_of(format),
        half_scales=format.half_scales,
        symmetric=format.symmetric,
        channels_last=channels_last,
    )
    return (size[0], format.rows, *out_size), shape


def _out_size(size: torch.Size, format: ConvFormat, geometry: Geometry) -> tuple[int, ...]:
    """Height and width of the result."""
    kernel_size, (stride, padding, dilation) = format.kernel_size, geometry
    for name, given, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(given) != len(kernel_size) or min(given) < least:
            raise InputError(f"{name} must be {len(kernel_size)} integers of {least} or more; got {given}.")
    padded = [n + 2 * p for n, p in zip(size[2:], padding, strict=True)]
    covered = [d * (k - 1) + 1 for k, d in zip(kernel_size, dilation, strict=True)]
    if any(n < k for n, k in zip(padded, covered, strict=True)):
        raise InputError(f"The kernel covers {covered} values, dilation included, but the padded input has {padded}.")
    return tuple((n - k) // s + 1 for n, k, s in zip(padded, covered, stride, strict=True))


def _check(x: Tensor, data: Tensor, format: ConvFormat, bias: Tensor | None, input: InputFormat | None) -> None:
    """Raise `InputError` where a kernel would leave its tensors. Runs at every call."""
    check_packed_conv(data, format)
    space = ("height", "width")[-len(format.kernel_size) :]
    check_tensor("x", x, torch.float32, ("n", expected_sizes(format)[1], *space), data.device, contiguous=False)
    if bias is not None:
        check_tensor("bias", bias, torch.float32, (format.rows,), data.device, contiguous=False)
    if input is not None:
        check_input(input)


def _fake(x: Tensor, data: Tensor, format: Sequence[int], bias: Tensor | None, *numbers: Any) -> Tensor:
    conv_format, geometry = ConvFormat.from_list(format), _geometry(numbers[:3])
    _check(x, data, conv_format, bias, InputFormat(*numbers[3:]))
    return _result(x, (x.shape[0], conv_format.rows, *_out_size(x.shape, conv_format, geometry)))


def _geometry(numbers: Sequence[Sequence[int]]) -> Geometry:
    stride, padding, dilation = map(tuple, numbers)
    return Geometry(stride, padding, dilation)


_ARGUMENTS = "Tensor x, Tensor data, int[] format, Tensor? bias, int[] stride, int[] padding, int[] dilation"
register(
    "conv",
    _ARGUMENTS,
    lambda x, data, format, bias, *geometry: _convolve(x, data, ConvFormat.from_list(format), bias, _geometry(geometry), None),
    _fake,
)
register(
    "conv_a8",
    _ARGUMENTS + ", float? input_scale, int largest_code=127, int zero_point=-1",
    lambda x, data, format, bias, *numbers: _convolve(
        x, data, ConvFormat.from_list(format), bias, _geometry(numbers[:3]), InputFormat(*numbers[3:])
    ),
    _fake,
)
