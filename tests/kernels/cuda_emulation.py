"""Builds the CUDA kernels for the host (cuda/emulator.h) and lends them to the face, so that CPU tensors take them."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from mpsearch.kernels import cuda_backend

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "mpsearch" / "kernels" / "cuda"
FLAGS = [
    "-std=c++20",
    "-O1",
    "-fPIC",
    "-ffp-contract=off",
    "-U_FORTIFY_SOURCE",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
]


def compiler() -> str | None:
    """A C++ compiler, if there is one."""
    return next((found for name in (os.environ.get("CXX", "g++"), "clang++") if (found := shutil.which(name))), None)


def state() -> str:
    """A name for the sources as they are."""
    shared = [SOURCES.parent / "cpu" / name for name in ("arguments.h", "input.h")]
    files = sorted([*SOURCES.glob("*"), *shared, *(HERE / "cuda").glob("*"), Path(__file__)])
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def build(folder: Path) -> cuda_backend.Library:
    """Every source, those of products once per width, as one library that takes CPU tensors."""
    library = folder / "emulated.so"
    if not library.exists():
        _compile(folder, library)
    emulated = cuda_backend.load(library, device_type="cpu", n_processors=2)
    emulated.functions.mpsearch_guarded.restype = ctypes.c_void_p
    emulated.functions.mpsearch_guarded.argtypes = [ctypes.c_int64]
    return emulated


def _compile(folder: Path, library: Path) -> None:
    sources = [HERE / "cuda" / "emulator.cpp", *(of for of in sorted(SOURCES.glob("*.cu")) if of.stem != "device")]
    jobs = []
    for source in sources:
        for bits in range(1, 9) if source.stem.startswith("product") else [0]:
            target = folder / f"{source.stem}{bits}.o"
            here = [f"-DMPSEARCH_BITS={bits}", f"-I{HERE / 'cuda'}", "-x", "c++", "-c", str(source), "-o", str(target)]
            jobs.append((target, [str(compiler()), *FLAGS, *here]))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for finished in pool.map(lambda job: subprocess.run(job[1], check=True), jobs):
            finished.check_returncode()
    objects = [str(target) for target, _ in jobs]
    linked = folder / "linked.so"
    subprocess.run([str(compiler()), "-shared", *objects, "-o", str(linked)], check=True)
    linked.rename(library)  # whole or not there, should two runs build at once


@contextmanager
def lent(library: cuda_backend.Library) -> Iterator[None]:
    """Kernels of `library` for the tensors of its device within the block."""
    before, cuda_backend.library = cuda_backend.library, library
    try:
        yield
    finally:
        cuda_backend.library = before


def guarded(library: cuda_backend.Library, tensor: Tensor) -> Tensor:
    """A copy that ends, but for its alignment, where the memory does: a read or write behind it is a fault."""
    n_bytes = tensor.numel() * tensor.element_size()
    address = library.functions.mpsearch_guarded(n_bytes)
    buffer = (ctypes.c_uint8 * n_bytes).from_address(address)
    return torch.frombuffer(buffer, dtype=torch.uint8).view(tensor.dtype).view(tensor.shape).copy_(tensor)
