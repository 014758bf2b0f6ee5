"""Embedding rows of a packed weight, dequantized on lookup; registered with `torch.library` as `mpsearch::embedding`."""

from __future__ import annotations

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.kernels import reference
from mpsearch.kernels.backends import backend_index, backend_of, compiled
from mpsearch.kernels.memory import readable
from mpsearch.kernels.operators import register
from mpsearch.kernels.packed_weight import PackedWeight, check_packed_weight


def embedding(indices: Tensor, weight: PackedWeight) -> Tensor:
    """The rows of `weight` that `indices` name, `(code - zero_point) * scale` with one rounding: float32 `[..., columns]`.

    indices  int64 or int32 `[...]`, any strides, from 0 to `rows - 1`, on the device of `weight`

    Bit for bit the rows of `dequantize`. Reads the weight in the layout of `linear`, so that an embedding that is tied to a
    Linear layer is held once. Raises `InputError` for indices out of range, another dtype or device.
    """
    return torch.ops.mpsearch.embedding(
        indices, weight.data, weight.rows, weight.columns, weight.bits, weight.group_size, weight.half_scales
    )


def _embedding(indices: Tensor, data: Tensor, rows: int, columns: int, bits: int, group_size: int, half_scales: bool) -> Tensor:
    _check(indices, data, rows, columns, bits, group_size, half_scales)
    data = readable("the packed weight", data)
    # A copy: what is checked is then what is read, whatever another thread writes to the caller's tensor meanwhile.
    indices = readable("indices", indices).clone(memory_format=torch.contiguous_format)
    backend = backend_of(indices, on_cuda=False)
    if backend == "reference" or columns == 0:
        bad = ((indices < 0) | (indices >= rows)).flatten().nonzero()
        if len(bad):
            _refuse(indices, int(bad[0]), rows)
        if indices.numel() == 0 or columns == 0:
            return torch.empty((*indices.shape, columns), device=indices.device)
        scale_dtype = torch.float16 if half_scales else torch.float32
        codes, scales, doubled_zeros = reference.unpack_weight(data, rows, columns, bits, group_size, scale_dtype)
        return reference.dequantize_doubled(codes, scales, doubled_zeros, group_size)[indices.long()]
    y = torch.empty(*indices.shape, columns)
    bad_place = compiled.embedding(
        backend_index(backend),
        indices.data_ptr(),
        indices.dtype == torch.int64,
        indices.numel(),
        data.data_ptr(),
        y.data_ptr(),
        rows,
        columns,
        group_size,
        bits,
        half_scales,
        torch.get_num_threads(),
    )
    if bad_place >= 0:
        _refuse(indices, bad_place, rows)
    return y


def _fake(indices: Tensor, data: Tensor, rows: int, columns: int, bits: int, group_size: int, half_scales: bool) -> Tensor:
    _check(indices, data, rows, columns, bits, group_size, half_scales)
    return indices.new_empty((*indices.shape, columns), dtype=torch.float32)


def _check(indices: Tensor, data: Tensor, rows: int, columns: int, bits: int, group_size: int, half_scales: bool) -> None:
    if indices.dtype not in (torch.int64, torch.int32):
        dtype = str(indices.dtype).removeprefix("torch.")
        raise InputError(f"indices are {dtype} {list(indices.shape)}, but must be int64 or int32.")
    if indices.device != data.device:
        raise InputError(f"indices are on {indices.device} and the packed weight on {data.device}, but must be on one device.")
    check_packed_weight(data, rows, columns, bits, group_size, half_scales)


def _refuse(indices: Tensor, place: int, rows: int) -> None:
    allowed = f"0 to {rows - 1}" if rows else "none"
    raise InputError(f"Index {int(indices.flatten()[place])}, number {place} of {indices.numel()}, is out of range: {allowed}.")


register(
    "embedding",
    "Tensor indices, Tensor data, int rows, int columns, int bits, int group_size, bool half_scales",
    _embedding,
    _fake,
)
