"""Quantize weights to codes, pack codes into bytes, and back.

Each function checks its arguments, states shapes and formula, and runs the fastest backend that this machine has.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.kernels import cuda_backend, reference
from mpsearch.kernels.backends import backend_index, backend_of, compiled
from mpsearch.kernels.memory import readable
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

    weight      float32 `[rows, columns]`, contiguous
    bits        1 to 8
    group_size  columns per group; a row has `n_groups = ceil(columns / group_size)`, the last of which may be shorter
    symmetric   the zero point is implied: `2**(bits-1)`, at 1 bit 0.5
    ratios      float32 `[n]`: clip ratios to try, each group taking the one with the least squared error, the first of equals;
                not 0, and positive unless symmetric. `None` is plain min-max (the ratio 1)
    importance  float32 `[k, columns]`, finite, not negative: what a squared error counts in the search. `rows` is a multiple of
                k, and row r takes `importance[r // (rows // k)]`. `None` is all ones

    Returns codes uint8 `[rows, columns]`, scales `scale_dtype` (float16 or float32) `[rows, n_groups]` and zero points uint8
    `[rows, n_groups]`, `None` when symmetric:

        scale = round(ratio * step)                     step = max|x| / max(2**(bits-1) - 1, 0.5) or (hi - lo) / (2**bits - 1)
        code  = rint(clamp(x / scale + zero_point))     which stands for (code - zero_point) * scale

    `reference.py` gives every rounding. Raises `InputError` for arguments that do not fit together, weights that are not
    finite, and scales beyond `scale_dtype`.
    """
    weight = readable("weight", weight.detach())
    ratios, importance = readable("ratios", ratios), readable("importance", importance)
    _check_quantize(weight, bits, group_size, symmetric, scale_dtype, ratios, importance)
    group_size = min(group_size, max(weight.shape[1], 1))
    backend = backend_of(weight)
    if backend == "reference":
        codes, scales, zero_points, finite = reference.quantize(
            weight, bits, group_size, symmetric, scale_dtype, ratios, importance
        )
    else:
        n_groups = -(-weight.shape[1] // group_size)
        codes = torch.empty_like(weight, dtype=torch.uint8)
        scales = weight.new_empty(weight.shape[0], n_groups, dtype=scale_dtype)
        zero_points = None if symmetric else torch.empty_like(scales, dtype=torch.uint8)
        finite = _run_quantize(
            backend, weight, bits, group_size, symmetric, scale_dtype, ratios, importance, codes, scales, zero_points
        )
    if not finite:
        _raise_not_finite(weight, bits, scale_dtype)
    return codes, scales, zero_points


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes, uint8 of any shape and below `2**bits`, as a dense little-endian bit stream: uint8 `[ceil(numel * bits / 8)]`.

    Code i takes bits `i * bits` to `(i + 1) * bits - 1`, so 8 codes fill exactly `bits` bytes; the last byte's spare bits are 0.
    Raises `InputError` for codes that are too large or not uint8.
    """
    _check_bits(bits)
    _check_bytes("codes", codes)
    codes = readable("codes", codes)
    backend = backend_of(codes)
    if backend == "reference":
        largest = int(codes.max()) if codes.numel() else 0
        packed = reference.pack(codes, bits)
    else:
        codes = codes.contiguous()
        packed = codes.new_empty((codes.numel() * bits + 7) // 8)
        if backend == "cuda":
            largest = cuda_backend.pack(codes, packed, bits)
        else:
            largest = compiled.pack(
                backend_index(backend), codes.data_ptr(), packed.data_ptr(), codes.numel(), bits, torch.get_num_threads()
            )
    if largest >= 2**bits:
        raise InputError(f"The largest code is {int(codes.max())}, but {bits} bits hold 0 to {2**bits - 1}.")
    return packed


def unpack(packed: Tensor, bits: int, numel: int) -> Tensor:
    """The `numel` codes in `packed`, uint8 `[ceil(numel * bits / 8)]` as `pack` gives it: uint8 `[numel]`.

    Raises `InputError` where `packed` is not uint8 or has another number of bytes.
    """
    _check_bits(bits)
    if numel < 0:
        raise InputError(f"numel is {numel}, but must be 0 or more.")
    _check_packed(packed, bits, numel)
    return torch.ops.mpsearch.unpack(packed, bits, numel)


def _unpack(packed: Tensor, bits: int, numel: int) -> Tensor:
    packed = readable("packed codes", packed)
    backend = backend_of(packed)
    if backend == "reference":
        return reference.unpack(packed, bits, numel)
    codes = packed.new_empty(numel)
    if backend == "cuda":
        cuda_backend.unpack(packed, codes, bits)
    else:
        compiled.unpack(backend_index(backend), packed.data_ptr(), codes.data_ptr(), numel, bits, torch.get_num_threads())
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
    """What packed codes stand for: float32 `[rows, columns]`, `(code - zero_point) * scale` with one rounding.

    packed       uint8 `[ceil(rows * columns * bits / 8)]`, as `pack` gives it
    scales       float16 or float32 `[rows, n_groups]`, `n_groups = ceil(columns / group_size)`
    zero_points  uint8 `[rows, n_groups]`; `None` for symmetric codes, whose zero point is `2**(bits-1)`, at 1 bit 0.5

    Raises `InputError` where shapes or dtypes differ from that.
    """
    _check_bits(bits)
    _check_group_size(group_size)
    if rows < 0 or columns < 0:
        raise InputError(f"The shape is [{rows}, {columns}], but rows and columns must be 0 or more.")
    group_size = min(group_size, max(columns, 1))
    _check_packed(packed, bits, rows * columns)
    per_group = (rows, -(-columns // group_size))
    if scales.dtype not in (torch.float16, torch.float32):
        raise InputError(f"scales are {_dtype(scales)}, but must be float16 or float32.")
    _check_per_group("scales", scales, per_group, packed)
    if zero_points is not None:
        if zero_points.dtype != torch.uint8:
            raise InputError(f"zero_points are {_dtype(zero_points)}, but must be uint8.")
        _check_per_group("zero_points", zero_points, per_group, packed)
    return torch.ops.mpsearch.dequantize(packed, scales, zero_points, bits, rows, columns, group_size)


def _dequantize(
    packed: Tensor, scales: Tensor, zero_points: Tensor | None, bits: int, rows: int, columns: int, group_size: int
) -> Tensor:
    packed, scales, zero_points = (
        readable("packed codes", packed),
        readable("scales", scales),
        readable("zero_points", zero_points),
    )
    backend = backend_of(packed)
    if backend == "reference":
        codes = reference.unpack(packed, bits, rows * columns).reshape(rows, columns)
        return reference.dequantize_codes(codes, scales, zero_points, bits, group_size)
    weight = packed.new_empty(rows, columns, dtype=torch.float32)
    if backend == "cuda":
        cuda_backend.dequantize(packed, scales, zero_points, weight, bits, group_size)
        return weight
    compiled.dequantize(
        backend_index(backend),
        packed.data_ptr(),
        scales.data_ptr(),
        0 if zero_points is None else zero_points.data_ptr(),
        weight.data_ptr(),
        rows,
        columns,
        group_size,
        bits,
        scales.dtype == torch.float16,
        torch.get_num_threads(),
    )
    return weight


def _dequantize_fake(
    packed: Tensor, scales: Tensor, zero_points: Tensor | None, bits: int, rows: int, columns: int, group_size: int
) -> Tensor:
    return packed.new_empty(rows, columns, dtype=torch.float32)


def _unpack_fake(packed: Tensor, bits: int, numel: int) -> Tensor:
    return packed.new_empty(numel)


# Operators too: a layer without a kernel of its own calls them in the model.
register("unpack", "Tensor packed, int bits, int numel", _unpack, _unpack_fake)
register(
    "dequantize",
    "Tensor packed, Tensor scales, Tensor? zero_points, int bits, int rows, int columns, int group_size",
    _dequantize,
    _dequantize_fake,
)


def _run_quantize(
    backend: str,
    weight: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
    ratios: Tensor | None,
    importance: Tensor | None,
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
) -> bool:
    """Fill `codes`, `scales` and, if given, `zero_points`; whether all was finite."""
    rows, columns = weight.shape
    importance = None if ratios is None else importance  # min-max has no errors to weigh
    if backend == "cuda":
        return cuda_backend.quantize(
            weight, bits, group_size, symmetric, scale_dtype, ratios, importance, codes, scales, zero_points
        )
    return compiled.quantize(
        backend_index(backend),
        weight.data_ptr(),
        0 if importance is None else importance.data_ptr(),
        0 if ratios is None else ratios.data_ptr(),
        codes.data_ptr(),
        scales.data_ptr(),
        0 if zero_points is None else zero_points.data_ptr(),
        rows,
        columns,
        group_size,
        1 if importance is None or rows == 0 else rows // len(importance),
        0 if ratios is None else len(ratios),
        bits,
        symmetric,
        scale_dtype == torch.float16,
        torch.get_num_threads(),
    )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise InputError(f"bits is {bits}, but must be 1 to 8.")


def _check_group_size(group_size: int) -> None:
    if group_size < 1:
        raise InputError(f"group_size is {group_size}, but must be 1 or more.")


def _check_bytes(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.uint8:
        raise InputError(f"{name} are {_dtype(tensor)}, but must be uint8.")


def _check_packed(packed: Tensor, bits: int, numel: int) -> None:
    _check_bytes("packed codes", packed)
    n_bytes = (numel * bits + 7) // 8
    if packed.shape != (n_bytes,) or not packed.is_contiguous():
        raise InputError(
            f"packed codes have shape {list(packed.shape)}, but {numel} codes of {bits} bits take [{n_bytes}] contiguous bytes."
        )


def _check_per_group(name: str, tensor: Tensor, shape: tuple[int, int], packed: Tensor) -> None:
    if tensor.shape != shape or not tensor.is_contiguous():
        raise InputError(f"{name} have shape {list(tensor.shape)}, but one contiguous value per group is {list(shape)}.")
    if tensor.device != packed.device:
        raise InputError(f"{name} are on {tensor.device} and packed codes on {packed.device}, but must be on one device.")


def _check_quantize(
    weight: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
    ratios: Tensor | None,
    importance: Tensor | None,
) -> None:
    _check_bits(bits)
    _check_group_size(group_size)
    if scale_dtype not in (torch.float16, torch.float32):
        raise InputError(f"scale_dtype is {scale_dtype}, but must be torch.float16 or torch.float32.")
    if weight.dtype != torch.float32 or weight.dim() != 2 or not weight.is_contiguous():
        layout = "contiguous" if weight.is_contiguous() else "not contiguous"
        raise InputError(
            f"weight is {_dtype(weight)} {list(weight.shape)}, {layout}, but must be float32 [rows, columns], contiguous."
        )
    if ratios is not None:
        _check_argument("ratios", ratios, weight)
        values = ratios.tolist() if ratios.dim() == 1 else []
        if not values:
            raise InputError(f"ratios have shape {list(ratios.shape)}, but must be a list of one or more.")
        worst = next((r for r in values if not math.isfinite(r) or r == 0 or (r < 0 and not symmetric)), None)
        if worst is not None:
            allowed = "finite and not 0" if symmetric else "finite and positive (negative ones are for symmetric codes)"
            raise InputError(f"ratios contain {worst}, but must be {allowed}.")
    if importance is not None:
        rows, columns = weight.shape
        _check_argument("importance", importance, weight)
        if importance.dim() != 2 or importance.shape[1] != columns or len(importance) == 0 or rows % len(importance) != 0:
            raise InputError(
                f"importance has shape {list(importance.shape)}, but weight [{rows}, {columns}] needs [k, {columns}] with "
                f"{rows} a multiple of k."
            )
        if importance.numel():
            least, most = importance.aminmax()
            if not (least >= 0 and most < torch.inf):
                raise InputError(f"importance ranges from {least:g} to {most:g}, but must be finite and not negative.")


def _check_argument(name: str, tensor: Tensor, weight: Tensor) -> None:
    if tensor.dtype != torch.float32 or not tensor.is_contiguous():
        layout = "contiguous" if tensor.is_contiguous() else "not contiguous"
        raise InputError(f"{name} is {_dtype(tensor)}, {layout}, but must be float32, contiguous.")
    if tensor.device != weight.device:
        raise InputError(f"{name} is on {tensor.device} and weight on {weight.device}, but must be on one device.")


def _raise_not_finite(weight: Tensor, bits: int, scale_dtype: torch.dtype) -> None:
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise InputError(f"{bad} of {weight.numel()} weights are NaN or infinite. Load a sound checkpoint.")
    largest = float(weight.abs().max())
    hint = ", or use scale_dtype=float32" if scale_dtype == torch.float16 else ""
    raise InputError(
        f"With weights up to {largest:g} and {bits} bits a scale exceeds the largest {str(scale_dtype).removeprefix('torch.')} "
        f"({torch.finfo(scale_dtype).max:g}). Scale the weights down{hint}."
    )
