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

import torch
import torch.nn.functional as F
from torch import Tensor

from mpsearch.kernels.arguments import DTYPES, TOTAL_BYTES, StreamArguments, addresses, linear_arguments
from mpsearch.kernels.formats import InputFormat, WeightFormat

_FUNCTIONS = ("quantize", "pack", "unpack", "dequantize", "dequantize_stream", "rotate", "linear")  # of a struct and a stream
MOST_ROTATED_COLUMNS = 2**14 - 1  # its largest block in shared memory that every kernel has
MOST_STREAMED_COLUMNS = 256  # of tensor cores' fragments; beyond it dequantizing once and cuBLAS are faster


@dataclass(frozen=True)
class Library:
    """The compiled functions, the type of device whose tensors they take, and that device's processors."""

    functions: ctypes.CDLL
    device_type: str
    n_processors: int  # 0: ask the device

    def call(self, name: str, tensor: Tensor, struct: ctypes.Structure) -> None:
        """Put work on the current stream of the tensor's device."""
        function = getattr(self.functions, "mpsearch_" + name)
        if not tensor.is_cuda:
            self.check(name, function(ctypes.addressof(struct), 0))
            return
        device = tensor.device
        with nullcontext() if device.index == torch.cuda.current_device() else torch.cuda.device(device):
            self.check(name, self.functions.mpsearch_use_device(device.index))
            stream = torch.cuda.current_stream(device).cuda_stream
            self.check(name, function(ctypes.addressof(struct), stream))

    def check(self, name: str, error: int) -> None:
        """Raise `RuntimeError` for the number of a CUDA error."""
        if error:
            reason = self.functions.mpsearch_error(error).decode()
            raise RuntimeError(f"The CUDA kernel '{name}' could not be run: {reason} (CUDA error {error}).")


def load(path: Path | str, device_type: str = "cuda", n_processors: int = 0) -> Library:
    """The library at `path`; raises `OSError` where it cannot be loaded or is of another version."""
    functions = ctypes.CDLL(str(path))
    for name in _FUNCTIONS:
        getattr(functions, "mpsearch_" + name).argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    functions.mpsearch_count_devices.argtypes = [ctypes.c_void_p]
    functions.mpsearch_error.argtypes, functions.mpsearch_error.restype = [ctypes.c_int], ctypes.c_char_p
    functions.mpsearch_linear_scratch.argtypes = [ctypes.c_void_p]
    functions.mpsearch_linear_scratch.restype = functions.mpsearch_arguments_bytes.restype = ctypes.c_int64
    if functions.mpsearch_arguments_bytes() != TOTAL_BYTES:
        raise OSError(f"{path} was built from other sources")
    return Library(functions, device_type, n_processors)


library: Library | None = None  # the one in use
missing: str | None = None  # why there is none, once it was looked for


def takes(tensor: Tensor) -> bool:
    """Whether the library runs the kernels of this tensor's device."""
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
        loaded = load(spec.origin)
    except (OSError, AttributeError) as error:  # AttributeError: a library of another version lacks a function
        missing = str(error)
        return
    count = ctypes.c_int(0)
    code = loaded.functions.mpsearch_count_devices(ctypes.addressof(count))
    if code or count.value == 0:
        missing = loaded.functions.mpsearch_error(code).decode() if code else "the driver shows no GPU"
        return
    library = loaded


def call(name: str, tensor: Tensor, struct: ctypes.Structure) -> None:
    """Run a function of the library in use with its struct of arguments."""
    assert library is not None, "takes() comes first"
    library.call(name, tensor, struct)


def linear(
    x: Tensor,  # [..., columns], contiguous, not empty
    data: Tensor,
    y: Tensor,  # [..., rows]
    bias: Tensor | None,
    format: WeightFormat,
    input: InputFormat | None,
) -> None:
    """Fill `y` with the product: from the stream for few tokens, from the dequantized weight by cuBLAS for many."""
    assert library is not None, "takes() comes first"
    data = data if data.data_ptr() % 16 == 0 else data.clone()  # a view into a file, say
    n_tokens = x.numel() // format.columns
    if input is None and n_tokens * columns_each(x.dtype, format.group_size) > MOST_STREAMED_COLUMNS:
        weight = x.new_empty(format.rows, format.columns)
        struct = StreamArguments(**addresses(packed=data, weight=weight), format=format, dtype=DTYPES[x.dtype])
        library.call("dequantize_stream", x, struct)
        y.copy_(F.linear(x, weight, None if bias is None else bias.to(x.dtype)))
        return
    arguments = linear_arguments(x, data, y, bias, format, input)
    arguments.dtype, arguments.n_processors = DTYPES[x.dtype], library.n_processors or _processors(x.device.index)
    scratch = data.new_empty(library.functions.mpsearch_linear_scratch(ctypes.addressof(arguments)))
    arguments.scratch = scratch.data_ptr()
    library.call("linear", x, arguments)


def columns_each(dtype: torch.dtype, group_size: int) -> int:
    """Columns of fragments that a token takes (cuda/stream.cuh): classes of groups, times the parts of a float32."""
    return (4 if group_size <= 32 else 2 if group_size <= 64 else 1) * (3 if dtype == torch.float32 else 1)


@functools.cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
