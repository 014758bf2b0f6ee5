"""Which compiled backends this machine runs, and which one is used."""

from __future__ import annotations

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
from mpsearch.kernels import cuda_backend

compiled: Any = None  # the compiled module, where there is one
_missing: str | None = None
try:
    compiled = importlib.import_module("mpsearch.kernels._cpu")
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

_COMPILED: tuple[str, ...] = () if compiled is None else tuple(compiled.backends())
_AVAILABLE = ("reference", *_COMPILED)
_forced: str | None = None


def available_backends() -> tuple[str, ...]:
    """The backends that this machine runs, slowest first, such as `("reference", "baseline", "avx2")`."""
    return _AVAILABLE


def active_backend() -> str:
    """The backend that CPU tensors take now: the fastest there is, or the one that `use_backend` forces."""
    return _AVAILABLE[-1] if _forced is None else _forced


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one of `available_backends()` within the block, in every thread of the process.

    Raises `InputError` for a name that is not available here. Forcing `reference` also silences the warning about missing
    kernels, as the slow way is then what was asked for.
    """
    global _forced
    if name not in available_backends():
        raise InputError(f"Kernel backend '{name}' is not available here. There is: {', '.join(available_backends())}.")
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
            _warn_missing_cuda()
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


def backend_index(backend: str) -> int:
    """The number by which the compiled module knows a backend."""
    return _COMPILED.index(backend)


@functools.cache  # once a process
def _warn_missing() -> None:
    warnings.warn(
        f"mpsearch's compiled kernels are missing ({_missing}): quantizing runs on plain PyTorch, 20 to 200 times slower. "
        "Build them with `pip install --force-reinstall --no-deps .` in the source tree (it needs GCC >= 12 or Clang >= 16), or "
        'silence this with `warnings.filterwarnings("ignore", message="mpsearch\'s compiled kernels")`.',
        stacklevel=4,
    )


@functools.cache  # once a process
def _warn_missing_cuda() -> None:
    warnings.warn(
        f"mpsearch's CUDA kernels are missing ({cuda_backend.missing}): tensors on the GPU take plain PyTorch, where a product "
        "unpacks its whole weight each time. Build them with `pip install --force-reinstall --no-deps .` in the source tree on "
        "this machine (it needs nvcc, CUDA >= 12), or silence this with "
        '`warnings.filterwarnings("ignore", message="mpsearch\'s CUDA kernels")`.',
        stacklevel=4,
    )
