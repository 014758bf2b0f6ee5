"""Which compiled backends this machine runs, and which one is used."""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.kernels import arguments, cuda_backend

address_of = ctypes.addressof  # of a struct
compiled: Any = None  # the compiled module, if there is one
_missing: str | None = None
try:
    module = importlib.import_module("mpsearch.kernels._cpu")
    sizes = getattr(module, "arguments_bytes", int)(), getattr(module, "joint_arguments_bytes", int)()
    if sizes != (arguments.TOTAL_BYTES, ctypes.sizeof(arguments.JointArguments)):
        raise ImportError(f"{module.__file__} was built from other sources")
    compiled = module
except ImportError as error:
    _missing = str(error)
    if os.environ.get("MPSEARCH_REQUIRE_KERNELS") == "1":
        raise ImportError(
            f"The compiled kernels are missing ({error}) and MPSEARCH_REQUIRE_KERNELS=1 requires them. "
            "Build them with: pip install --force-reinstall --no-deps . (it needs GCC >= 12 or Clang >= 16)."
        ) from error

if hasattr(os, "register_at_fork"):
    # OpenMP's threads do not exist in a forked child, where an operator of PyTorch that would use them waits for them forever.
    # (The compiled kernels start threads of their own anew; they use as many as PyTorch.)
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))

COMPILED: tuple[str, ...] = () if compiled is None else tuple(compiled.backends())
_forced: str | None = None


def available_backends() -> tuple[str, ...]:
    """The backends that this machine runs, slowest first, such as `("reference", "baseline", "avx2")`."""
    return ("reference", *COMPILED)


def active_backend() -> str:
    """The backend of CPU tensors: the fastest available one, or the one that `use_backend` forces."""
    if _forced is not None:
        return _forced
    return COMPILED[-1] if COMPILED else "reference"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one of `available_backends()` within the block, in every thread of the process.

    Raises `InputError` for a name that is not available here. Forcing `reference` also silences the warning about missing
    kernels, as the slow way is then what was asked for.
    """
    global _forced
    if name not in available_backends():
        raise InputError(f"The kernel backend must be one of {', '.join(available_backends())}; got '{name}'.")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def backend_of(tensor: Tensor, *, on_cuda: bool = True) -> str:
    """The backend for a tensor's device; the first use without compiled kernels warns.

    on_cuda  whether there is a CUDA kernel for what is asked (`cuda` where it runs); else tensors there take `reference`
    """
    if not tensor.is_cpu or cuda_backend.library is not None:  # products on the CPU are called too often for more questions
        if on_cuda and _forced != "reference" and cuda_backend.takes(tensor):
            return "cuda"
        if tensor.is_cuda and on_cuda and _forced is None:
            warn_missing_cuda()
        if not tensor.is_cpu:
            return "reference"
    if _missing is not None and _forced is None:
        _warn_missing()
    return active_backend()


def is_plain(x: Tensor) -> bool:
    """Whether x is a plain tensor and nothing traces or watches the operators that it goes through.

    Then an operator's implementation may be called as it is: the dispatcher takes half of the time of a small product's call.
    """
    return type(x) is Tensor and not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack()


def run(name: str, backend: str, tensor: Tensor, struct: ctypes.Structure) -> None:
    """Call the kernel `name` of a backend that is not `reference` with its struct of arguments, on the device of `tensor`."""
    if backend == "cuda":
        cuda_backend.call(name, tensor, struct)
    else:
        getattr(compiled, name)(COMPILED.index(backend), address_of(struct), torch.get_num_threads())


@functools.cache  # once a process
def _warn_missing() -> None:
    warnings.warn(
        f"mpsearch's compiled kernels are missing ({_missing}): quantizing runs on plain PyTorch, 20 to 200 times slower. "
        "Build them with `pip install --force-reinstall --no-deps .` in the source tree (it needs GCC >= 12 or Clang >= 16), or "
        'silence this with `warnings.filterwarnings("ignore", message="mpsearch\'s compiled kernels")`.',
        stacklevel=4,
    )


@functools.cache  # once a process
def warn_missing_cuda() -> None:
    """Say why tensors on a GPU take plain PyTorch."""
    warnings.warn(
        f"mpsearch's CUDA kernels are missing ({cuda_backend.missing}): tensors on the GPU take plain PyTorch, where a product "
        "unpacks its whole weight each time. Build them with `pip install --force-reinstall --no-deps .` in the source tree on "
        "this machine (it needs nvcc, CUDA >= 12), or silence this with "
        '`warnings.filterwarnings("ignore", message="mpsearch\'s CUDA kernels")`.',
        stacklevel=4,
    )
