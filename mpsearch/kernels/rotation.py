"""Rotation by a Hadamard matrix of signs; registered with `torch.library` as `mpsearch::rotate`."""

from __future__ import annotations

import torch
from torch import Tensor

from mpsearch.kernels import cuda_backend, reference_rotation
from mpsearch.kernels.arguments import DTYPES, RotateArguments, addresses
from mpsearch.kernels.backends import backend_of, is_plain, run
from mpsearch.kernels.checks import check_tensor, checked
from mpsearch.kernels.operators import register
from mpsearch.kernels.reference_rotation import blocks_of

__all__ = ["blocks_of", "rotate"]


def rotate(x: Tensor, *, back: bool = False) -> Tensor:
    """`x Q`, or `x Q^T` where `back`, with Q orthonormal: a Hadamard matrix with signs for each block of columns.

    x  float32, float16 or bfloat16 `[..., columns]`; the result has its shape and dtype, computed in float32

    Blocks are powers of two, the largest first (172 columns: 128, 32, 8, 4), and a block of n costs n log2(n) additions; all of Q
    follows from the number of columns. What stands out in one column is spread over its block (Ashkboos et al. 2024, QuaRot;
    Tseng et al. 2024, QuIP#). `reference_rotation.py` gives every rounding. Raises `InputError` for another dtype.
    """
    return _rotate(x, back) if is_plain(x) else torch.ops.mpsearch.rotate(x, back)


def _rotate(x: Tensor, back: bool) -> Tensor:
    x = checked("x", x, tuple(DTYPES), ("...", "columns"), contiguous=False)
    if x.numel() == 0:
        return x.clone()
    columns = x.shape[-1]
    backend = backend_of(x, on_cuda=columns <= cuda_backend.MOST_ROTATED_COLUMNS)
    if backend == "reference" or (backend != "cuda" and x.dtype != torch.float32):
        return reference_rotation.rotate(x.float(), back).to(x.dtype)
    x, factors = x.contiguous(), reference_rotation.factors_of(columns, x.device)
    y = torch.empty_like(x)
    arguments = RotateArguments(
        **addresses(x=x, factors=factors, y=y),
        rows=x.numel() // columns,
        columns=columns,
        back=back,
        dtype=DTYPES[x.dtype],
    )
    run("rotate", backend, x, arguments)
    return y


def _fake(x: Tensor, back: bool) -> Tensor:
    check_tensor("x", x, tuple(DTYPES), ("...", "columns"), contiguous=False)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


register("rotate", "Tensor x, bool back", _rotate, _fake)
