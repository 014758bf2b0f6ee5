"""Quantize weights to codes, pack codes into bytes, and back.

Each function checks its arguments, states shapes and formula, and runs the fastest backend that this machine has.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.kernels import reference
from mpsearch.kernels.arguments import DequantizeArguments, PackArguments, QuantizeArguments, addresses
from mpsearch.kernels.backends import backend_of, run
from mpsearch.kernels.checks import SCALE_DTYPES, check_range, check_tensor, checked, dtype_of, readable
from mpsearch.kernels.operators import register


def quantize(
    weight: Tensor,
    *,
    bits: int,
    group_size: int,
    symmetric: bool,
    scale_dtype: torch.dtype = torch.float16,
    ratios: Tensor | None = None,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantize each group of `group_size` consecutive columns of a row to `bits` bits.

    Parameters
    ----------
    weight
        float32 `[rows, columns]`, contiguous.
    bits
        1 to 8.
    group_size
        Columns per group; a row has `n_groups = ceil(columns / group_size)`, the last of which may be shorter.
    symmetric
        The zero point is implied: `2**(bits-1)`, at 1 bit 0.5.
    ratios
        float32 `[n]`: clip ratios to try, each group taking the one with the least squared error, the first of equals; not 0, and
        positive unless symmetric. `None` is plain min-max (the ratio 1).
    importance
        float32 `[k, columns]`, finite, not negative: the weight of a squared error in the search. `rows` is a multiple of k, and
        row r takes `importance[r // (rows // k)]`. `None` is all ones.

    Returns
    -------
    codes uint8 `[rows, columns]`, scales `scale_dtype` (float16 or float32) `[rows, n_groups]` and zero points uint8
    `[rows, n_groups]`, `None` when symmetric:

        scale = round(ratio * step)                     step = max|x| / max(2**(bits-1) - 1, 0.5) or (hi - lo) / (2**bits - 1)
        code  = rint(clamp(x / scale + zero_point))     which stands for (code - zero_point) * scale

    `reference.py` gives every rounding.

    Raises
    ------
    InputError
        Arguments do not fit together, weights are not finite, or a scale is beyond `scale_dtype`.
    """
    check_range("bits", bits, 1, 8)
    check_range("group_size", group_size, 1)
    if scale_dtype not in SCALE_DTYPES:
        raise InputError(f"scale_dtype must be torch.float16 or torch.float32; got {scale_dtype}.")
    weight = checked("weight", weight, torch.float32, ("rows", "columns"))
    ratios = _checked_ratios(ratios, symmetric, weight.device)
    importance = _checked_importance(importance, weight)
    settings = bits, min(group_size, max(weight.shape[1], 1)), symmetric, scale_dtype, ratios, importance
    backend = backend_of(weight)
    if backend == "reference":
        codes, scales, zero_points, finite = reference.quantize(weight, *settings)
    else:
        codes, scales, zero_points, finite = _compiled_quantize(backend, weight, *settings)
    if not finite:
        _raise_not_finite(weight, bits, scale_dtype)
    return codes, scales, zero_points


def _compiled_quantize(
    backend: str,
    weight: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
    ratios: Tensor | None,
    importance: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    """See `reference.quantize`."""
    rows, columns = weight.shape
    codes, not_finite = torch.empty_like(weight, dtype=torch.uint8), weight.new_zeros(1, dtype=torch.int32)
    scales = weight.new_empty(rows, -(-columns // group_size), dtype=scale_dtype)
    zero_points = None if symmetric else torch.empty_like(scales, dtype=torch.uint8)
    importance = None if ratios is None else importance  # min-max has no errors to weigh
    arguments = QuantizeArguments(
        **addresses(weight=weight, importance=importance, ratios=ratios),
        **addresses(codes=codes, scales=scales, zero_points=zero_points, not_finite=not_finite),
        rows=rows,
        columns=columns,
        group_size=group_size,
        n_groups=scales.shape[1],
        rows_per_importance=1 if importance is None or rows == 0 else rows // len(importance),
        n_ratios=0 if ratios is None else len(ratios),
        bits=bits,
        symmetric=symmetric,
        half_scales=scale_dtype == torch.float16,
    )
    run("quantize", backend, weight, arguments)
    return codes, scales, zero_points, not bool(not_finite)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes, uint8 of any shape and below `2**bits`, as a dense little-endian bit stream: uint8 `[ceil(numel * bits / 8)]`.

    Code i takes bits `i * bits` to `(i + 1) * bits - 1`, so 8 codes fill exactly `bits` bytes; the last byte's spare bits are 0.
    Raises `InputError` for codes that are too large or not uint8.
    """
    check_range("bits", bits, 1, 8)
    codes = checked("codes", codes, torch.uint8, ("...",), contiguous=False)
    backend = backend_of(codes)
    if backend == "reference":
        largest = int(codes.max()) if codes.numel() else 0
        packed = reference.pack(codes, bits)
    else:
        codes = codes.contiguous()
        packed = codes.new_empty((codes.numel() * bits + 7) // 8)
        seen = codes.new_zeros(1, dtype=torch.int32)
        run(
            "pack",
            backend,
            codes,
            PackArguments(**addresses(source=codes, target=packed, seen=seen), numel=codes.numel(), bits=bits),
        )
        largest = int(seen)
    if largest >= 2**bits:
        raise InputError(f"The largest code is {int(codes.max())}, but {bits} bits hold 0 to {2**bits - 1}.")
    return packed


def unpack(packed: Tensor, bits: int, numel: int) -> Tensor:
    """The `numel` codes in `packed`, uint8 `[ceil(numel * bits / 8)]` as `pack` gives it: uint8 `[numel]`.

    Raises `InputError` where `packed` is not uint8 or has another number of bytes.
    """
    check_range("bits", bits, 1, 8)
    check_range("numel", numel, 0)
    _check_packed(packed, bits, numel)
    return torch.ops.mpsearch.unpack(packed, bits, numel)


def _unpack(packed: Tensor, bits: int, numel: int) -> Tensor:
    packed = readable("packed codes", packed)
    backend = backend_of(packed)
    if backend == "reference":
        return reference.unpack(packed, bits, numel)
    codes = packed.new_empty(numel)
    run("unpack", backend, packed, PackArguments(**addresses(source=packed, target=codes), numel=numel, bits=bits))
    return codes


def dequantize(
    packed: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    *,
    bits: int,
    rows: int,
    columns: int,
    group_size: int,
) -> Tensor:
    """Dequantize packed codes: float32 `[rows, columns]`, `(code - zero_point) * scale` with one rounding.

    Parameters
    ----------
    packed
        uint8 `[ceil(rows * columns * bits / 8)]`, as `pack` gives it.
    scales
        float16 or float32 `[rows, n_groups]`, `n_groups = ceil(columns / group_size)`.
    zero_points
        uint8 `[rows, n_groups]`; `None` for symmetric codes, whose zero point is `2**(bits-1)`, at 1 bit 0.5.

    Raises
    ------
    InputError
        Shapes or dtypes differ from that.
    """
    check_range("bits", bits, 1, 8)
    check_range("group_size", group_size, 1)
    check_range("rows", rows, 0)
    check_range("columns", columns, 0)
    group_size = min(group_size, max(columns, 1))
    _check_packed(packed, bits, rows * columns)
    per_group = (rows, -(-columns // group_size))
    check_tensor("scales", scales, SCALE_DTYPES, per_group, packed.device)
    check_tensor("zero_points", zero_points, torch.uint8, per_group, packed.device)
    return torch.ops.mpsearch.dequantize(packed, scales, zero_points, bits, rows, columns, group_size)


def _dequantize(
    packed: Tensor, scales: Tensor, zero_points: Tensor | None, bits: int, rows: int, columns: int, group_size: int
) -> Tensor:
    packed, scales = readable("packed codes", packed), readable("scales", scales)
    zero_points = readable("zero_points", zero_points)
    backend = backend_of(packed)
    if backend == "reference":
        codes = reference.unpack(packed, bits, rows * columns).reshape(rows, columns)
        return reference.dequantize_codes(codes, scales, zero_points, bits, group_size)
    weight = packed.new_empty(rows, columns, dtype=torch.float32)
    arguments = DequantizeArguments(
        **addresses(packed=packed, scales=scales, zero_points=zero_points, weight=weight),
        rows=rows,
        columns=columns,
        group_size=group_size,
        n_groups=scales.shape[1],
        bits=bits,
        half_scales=scales.dtype == torch.float16,
    )
    run("dequantize", backend, packed, arguments)
    return weight


# Operators too: a layer without a kernel of its own calls them in the model.
register("unpack", "Tensor packed, int bits, int numel", _unpack, lambda packed, bits, numel: packed.new_empty(numel))
register(
    "dequantize",
    "Tensor packed, Tensor scales, Tensor? zero_points, int bits, int rows, int columns, int group_size",
    _dequantize,
    lambda packed, scales, zero_points, bits, rows, columns, group_size: packed.new_empty(rows, columns, dtype=torch.float32),
)


def _check_packed(packed: Tensor, bits: int, numel: int) -> None:
    check_tensor(f"The packed codes ({numel} of {bits} bits)", packed, torch.uint8, ((numel * bits + 7) // 8,))


def _checked_ratios(ratios: Tensor | None, symmetric: bool, device: torch.device) -> Tensor | None:
    ratios = checked("ratios", ratios, torch.float32, ("n",), device)
    if ratios is None:
        return None
    if not len(ratios):
        raise InputError("ratios must be one or more; got none.")
    worst = next((r for r in ratios.tolist() if not math.isfinite(r) or r == 0 or (r < 0 and not symmetric)), None)
    if worst is not None:
        allowed = "finite and not 0" if symmetric else "finite and positive (negative ones are for symmetric codes)"
        raise InputError(f"ratios must be {allowed}; got {worst}.")
    return ratios


def _checked_importance(importance: Tensor | None, weight: Tensor) -> Tensor | None:
    rows, columns = weight.shape
    importance = checked("importance", importance, torch.float32, ("k", columns), weight.device)
    if importance is None:
        return None
    if len(importance) == 0 or rows % len(importance):
        raise InputError(f"importance must be [k, {columns}] with {rows} rows a multiple of k; got {list(importance.shape)}.")
    if importance.numel():
        least, most = importance.aminmax()
        if not (least >= 0 and most < torch.inf):
            raise InputError(f"importance must be finite and not negative; got {least:g} to {most:g}.")
    return importance


def _raise_not_finite(weight: Tensor, bits: int, scale_dtype: torch.dtype) -> None:
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise InputError(f"{bad} of {weight.numel()} weights are NaN or infinite. Load a sound checkpoint.")
    largest = float(weight.abs().max())
    hint = ", or use scale_dtype=float32" if scale_dtype == torch.float16 else ""
    raise InputError(
        f"With weights up to {largest:g} and {bits} bits a scale exceeds the largest {dtype_of(scale_dtype)} "
        f"({torch.finfo(scale_dtype).max:g}). Scale the weights down{hint}."
    )
