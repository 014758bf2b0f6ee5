"""The structs by which kernels take their arguments; `cpu/arguments.h` has the same ones, field by field.

A struct is passed by pointer. Fields of tensors are addresses (`Tensor.data_ptr()`), `None` for a tensor that there is not.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import Structure, c_bool, c_float, c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from mpsearch.kernels.formats import InputFormat, WeightFormat

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def _struct(name: str, *fields: tuple[Any, str]) -> Any:
    """A subclass of `ctypes.Structure` with fields given as (type, names)."""
    return type(name, (Structure,), {"_fields_": [(field, kind) for kind, names in fields for field in names.split()]})


_Weight = _struct(
    "_Weight", (c_int64, "rows columns"), (c_int, "bits"), (c_int64, "group_size"), (c_bool, "half_scales symmetric")
)
_Input = _struct("_Input", (c_float, "scale"), (c_int, "largest_code zero_point"))
QuantizeArguments = _struct(
    "QuantizeArguments",
    (c_void_p, "weight importance ratios codes scales zero_points not_finite"),
    (c_int64, "rows columns group_size n_groups rows_per_importance n_ratios"),
    (c_int, "bits"),
    (c_bool, "symmetric half_scales"),
)
PackArguments = _struct("PackArguments", (c_void_p, "source target seen"), (c_int64, "numel"), (c_int, "bits"))
DequantizeArguments = _struct(
    "DequantizeArguments",
    (c_void_p, "packed scales zero_points weight"),
    (c_int64, "rows columns group_size n_groups"),
    (c_int, "bits"),
    (c_bool, "half_scales"),
)
WeightArguments = _struct(
    "WeightArguments", (c_void_p, "codes scales zero_points packed seen"), (c_int64, "packed_bytes"), (_Weight, "format")
)
LinearArguments = _struct(
    "LinearArguments",
    (c_void_p, "x packed bias y"),
    (c_int64, "n_tokens"),
    (_Weight, "format"),
    (_Input, "input"),
    (c_bool, "int8_input"),
    (c_int, "dtype n_processors"),
    (c_void_p, "scratch"),
)
StreamArguments = _struct("StreamArguments", (c_void_p, "packed weight"), (_Weight, "format"), (c_int, "dtype"))
EmbeddingArguments = _struct(
    "EmbeddingArguments",
    (c_void_p, "indices packed y bad_place"),
    (c_int64, "n_indices"),
    (_Weight, "format"),
    (c_bool, "wide_indices"),
)
RotateArguments = _struct(
    "RotateArguments", (c_void_p, "x factors y"), (c_int64, "rows columns"), (c_bool, "back"), (c_int, "dtype")
)
FeedbackArguments = _struct(
    "FeedbackArguments",
    (c_void_p, "weight feedback scales zero_points column_groups errors fixed codes"),
    (c_int64, "columns n_groups n_matrices rows_per_matrix"),
    (c_int, "bits"),
)
JointArguments = _struct(
    "JointArguments",
    (c_void_p, "weight row_feedback column_feedback column_weights zero_points column_groups fixed scales codes n_changed"),
    (c_int64, "rows columns n_groups n_passes n_fits"),
    (c_int, "bits"),
    (c_bool, "begin half_scales"),
)
HalfQuadraticArguments = _struct(
    "HalfQuadraticArguments",
    (c_void_p, "weight betas scales zero_points codes"),
    (c_int64, "rows columns group_size n_groups n_betas"),
    (c_int, "bits"),
    (c_bool, "fit_zeros half_scales"),
)
ConvShape = _struct(
    "ConvShape",
    (c_int64, "n_samples channels height width rows out_height out_width kernel_h kernel_w"),
    (c_int64, "stride_h stride_w padding_h padding_w dilation_h dilation_w groups group_size"),
    (c_int, "bits order"),
    (c_bool, "half_scales symmetric channels_last"),
)
ConvArguments = _struct(
    "ConvArguments", (c_void_p, "x packed bias y"), (ConvShape, "shape"), (_Input, "input"), (c_bool, "int8_input")
)

TOTAL_BYTES = sum(
    ctypes.sizeof(struct)
    for struct in (
        *(QuantizeArguments, PackArguments, DequantizeArguments, WeightArguments, LinearArguments, StreamArguments),
        *(EmbeddingArguments, RotateArguments, FeedbackArguments, HalfQuadraticArguments, ConvArguments),
    )
)  # compared with that of a compiled module, which may be built from other sources


def linear_arguments(
    x: Tensor, data: Tensor, y: Tensor, bias: Tensor | None, format: WeightFormat, input: InputFormat | None
) -> Any:
    """`LinearArguments` of contiguous tensors; `input` is `None` for float input."""
    n_tokens, bias_at = x.numel() // format.columns, None if bias is None else bias.data_ptr()
    numbers = weight_fields(format), input_fields(input), input is not None
    return LinearArguments(x.data_ptr(), data.data_ptr(), bias_at, y.data_ptr(), n_tokens, *numbers)  # names would cost time


@functools.lru_cache(maxsize=4096)
def weight_fields(format: WeightFormat) -> Any:
    """The struct within a struct that describes a packed weight."""
    return _Weight(*format)


@functools.lru_cache(maxsize=4096)
def input_fields(input: InputFormat | None) -> Any:
    """The struct within a struct that describes an input: 0 stands for a scale that is not given."""
    return _Input(0.0, 127, -1) if input is None else _Input(input.scale or 0.0, input.largest_code, input.zero_point)


def addresses(**tensors: Tensor | None) -> dict[str, int | None]:
    """Of each tensor's first value, by the names of fields."""
    return {name: None if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()}
