"""The kernels for NVIDIA GPUs: finds their library, and calls it with the addresses of tensors that the face has checked.

The library (`cuda/`, plain C functions) is loaded when the first CUDA tensor comes, and used where it was built and a driver
answers. It knows nothing of PyTorch: memory comes from PyTorch's allocator, work goes on its current stream.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_SIGNATURES = {  # api.h: p an address, q int64, i int, f float
    "count_devices": "p",
    "use_device": "i",
    "quantize": "ppppppp" + "qqqqq" + "iii" + "p",
    "pack": "pppqip",
    "unpack": "ppqip",
    "dequantize": "pppp" + "qqq" + "ii" + "p",
    "dequantize_stream": "ppi" + "qqq" + "ii" + "p",
    "rotate": "ppp" + "qq" + "ii" + "p",
    "linear": "ii" + "ppppp" + "fii" + "qqqq" + "iii" + "p",
}
_TYPES: dict[str, Any] = {"p": ctypes.c_void_p, "q": ctypes.c_int64, "i": ctypes.c_int, "f": ctypes.c_float}
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
MOST_ROTATED_COLUMNS = 2**14 - 1  # its largest block in shared memory that every kernel has
MOST_STREAMED_COLUMNS = 256  # of tensor cores' fragments; beyond it dequantizing once and cuBLAS are faster


@dataclass(frozen=True)
class Library:
    """The compiled functions, the type of device whose tensors they take, and that device's processors."""

    functions: ctypes.CDLL
    device_type: str
    n_processors: int  # 0: ask the device

    def call(self, name: str, tensor: Tensor, *arguments: int | float) -> None:
        """Put work on the current stream of the tensor's device."""
        if not tensor.is_cuda:
            self.check(name, getattr(self.functions, "mpsearch_" + name)(*arguments, 0))
            return
        device = tensor.device
        with nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device):
            self.check(name, self.functions.mpsearch_use_device(device.index))
            stream = torch.cuda.current_stream(device).cuda_stream
            self.check(name, getattr(self.functions, "mpsearch_" + name)(*arguments, stream))

    def check(self, name: str, error: int) -> None:
        """Raise `RuntimeError` for the number of a CUDA error."""
        if error:
            reason = self.functions.mpsearch_error(error).decode()
            raise RuntimeError(f"The CUDA kernel '{name}' could not be run: {reason} (CUDA error {error}).")


def load(path: Path | str, device_type: str = "cuda", n_processors: int = 0) -> Library:
    """The library at `path`; raises `OSError` where it cannot be loaded."""
    functions = ctypes.CDLL(str(path))
    for name, types in _SIGNATURES.items():
        getattr(functions, "mpsearch_" + name).argtypes = [_TYPES[letter] for letter in types]
    functions.mpsearch_error.argtypes, functions.mpsearch_error.restype = [ctypes.c_int], ctypes.c_char_p
    functions.mpsearch_linear_scratch.argtypes = [_TYPES[letter] for letter in "iiqqqqi"]
    functions.mpsearch_linear_scratch.restype = ctypes.c_int64
    return Library(functions, device_type, n_processors)


library: Library | None = None  # the one in use
missing: str | None = None  # why there is none, once it was looked for


def takes(tensor: Tensor) -> bool:
    """Whether the library runs what is asked of this tensor."""
    if tensor.is_cuda and library is None and missing is None:
        _find()
    return library is not None and tensor.device.type == library.device_type


def _find() -> None:
    global library, missing
    spec = importlib.util.find_spec("mpsearch.kernels._cuda")
    if spec is None or spec.origin is None:
        missing = "they were not built"
        return
    try:
        found = load(spec.origin)
    except OSError as error:
        missing = str(error)
        return
    count = ctypes.c_int(0)
    code = found.functions.mpsearch_count_devices(ctypes.addressof(count))
    if code or count.value == 0:
        missing = found.functions.mpsearch_error(code).decode() if code else "the driver shows no GPU"
        return
    library = found


def quantize(
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
    not_finite = torch.zeros(1, dtype=torch.int32, device=weight.device)
    if weight.numel():
        _used().call(
            "quantize",
            weight,
            *_addresses(weight, importance, ratios, codes, scales, zero_points, not_finite),
            rows,
            columns,
            group_size,
            1 if importance is None else rows // len(importance),
            0 if ratios is None else len(ratios),
            bits,
            symmetric,
            scale_dtype == torch.float16,
        )
    return not bool(not_finite)


def pack(codes: Tensor, packed: Tensor, bits: int) -> int:
    """Fill `packed`; the codes or-ed together."""
    seen = torch.zeros(1, dtype=torch.int32, device=codes.device)
    _used().call("pack", codes, *_addresses(codes, packed, seen), codes.numel(), bits)
    return int(seen)


def unpack(packed: Tensor, codes: Tensor, bits: int) -> None:
    """Fill `codes`."""
    _used().call("unpack", packed, *_addresses(packed, codes), codes.numel(), bits)


def dequantize(packed: Tensor, scales: Tensor, zero_points: Tensor | None, weight: Tensor, bits: int, group_size: int) -> None:
    """Fill `weight`."""
    _used().call(
        "dequantize",
        packed,
        *_addresses(packed, scales, zero_points, weight),
        *weight.shape,
        group_size,
        bits,
        scales.dtype == torch.float16,
    )


def rotate(x: Tensor, factors: Tensor, y: Tensor, back: bool) -> None:
    """Fill `y`; x is contiguous, not empty, of up to `MOST_ROTATED_COLUMNS`."""
    columns = x.shape[-1]
    _used().call("rotate", x, *_addresses(x, factors, y), x.numel() // columns, columns, _DTYPES[x.dtype], back)


def linear(
    x: Tensor,  # [..., columns], contiguous, not empty
    data: Tensor,
    y: Tensor,  # [..., rows]
    bias: Tensor | None,
    columns: int,
    group_size: int,
    bits: int,
    half_scales: bool,
    int8_input: bool,
    input_scale: float | None,
    largest_code: int,
    zero_point: int,
) -> None:
    """Fill `y` with the product: from the stream for few tokens, from the dequantized weight by cuBLAS for many."""
    used, rows, n_tokens, dtype = _used(), y.shape[-1], x.numel() // columns, _DTYPES[x.dtype]
    data = data if data.data_ptr() % 16 == 0 else data.clone()  # a view into a file, say
    shape = (rows, columns, group_size)
    if not int8_input and n_tokens * columns_each(x.dtype, group_size) > MOST_STREAMED_COLUMNS:
        weight = x.new_empty(rows, columns)
        used.call("dequantize_stream", x, *_addresses(data, weight), dtype, *shape, bits, half_scales)
        y.copy_(F.linear(x, weight, None if bias is None else bias.to(x.dtype)))
        return
    n_processors = used.n_processors or _processors(x.device.index)
    scratch = data.new_empty(_scratch_bytes(used, int8_input, dtype, n_tokens, *shape, n_processors))
    used.call(
        "linear",
        x,
        int8_input,
        dtype,
        *_addresses(x, data, bias, y, scratch),
        input_scale or 0.0,
        largest_code,
        zero_point,
        n_tokens,
        *shape,
        bits,
        half_scales,
        n_processors,
    )


def columns_each(dtype: torch.dtype, group_size: int) -> int:
    """Columns of fragments that a token takes (cuda/stream.cuh): classes of groups, times the parts of a float32."""
    return (4 if group_size <= 32 else 2 if group_size <= 64 else 1) * (3 if dtype == torch.float32 else 1)


@functools.lru_cache(maxsize=4096)
def _scratch_bytes(used: Library, *how: int) -> int:
    return used.functions.mpsearch_linear_scratch(*how)


@functools.cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _used() -> Library:
    assert library is not None, "takes() comes first"
    return library


def _addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
