"""The face of half-quadratic fitting: grids that make few errors large, by shrinkage and closed forms in turn."""

from __future__ import annotations

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.kernels import reference_half_quadratic
from mpsearch.kernels.backends import backend_index, backend_of, compiled
from mpsearch.kernels.memory import readable


def half_quadratic(
    weight: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    *,
    bits: int,
    group_size: int,
    fit_zeros: bool,
    n_steps: int,
    beta: float,
    growth: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(codes uint8 `[rows, columns]`, scales, zero points float32) of the best of `n_steps` grids and the given one.

    weight       float32 `[rows, columns]`, finite
    scales       float16 or float32 `[rows, n_groups]`: where the fit starts
    zero_points  float32 `[rows, n_groups]`; fitted too where `fit_zeros`, among the whole numbers from 0 to 2**bits - 1
    beta         how closely the split error follows the true one at first, in units of the first scale; times `growth` a step

    What is minimized is the sum of |weight - (code - zero) * scale|^(3/4) over each group, by the half-quadratic splitting of
    Badri and Shaji 2023 (HQQ); no group ends with a larger one than it started with.

    `reference_half_quadratic.py` gives every rounding. Raises `InputError` where shapes do not fit together.
    """
    _check(weight, scales, zero_points, bits, group_size)
    weight, scales, zero_points = readable("weight", weight), readable("scales", scales), readable("zero_points", zero_points)
    rows, columns = weight.shape
    group_size = min(group_size, max(columns, 1))
    betas = torch.tensor([beta * growth**step for step in range(n_steps + 1)], dtype=torch.float32, device=weight.device)
    backend = backend_of(weight, on_cuda=False)
    if backend == "reference" or not weight.numel():
        return reference_half_quadratic.half_quadratic(weight, scales, zero_points, bits, group_size, fit_zeros, betas)
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    found, zeros = scales.float().clone(), zero_points.clone()
    compiled.half_quadratic(
        backend_index(backend),
        weight.data_ptr(),
        betas.data_ptr(),
        found.data_ptr(),
        zeros.data_ptr(),
        codes.data_ptr(),
        rows,
        columns,
        group_size,
        len(betas),
        bits,
        fit_zeros,
        scales.dtype == torch.float16,
        torch.get_num_threads(),
    )
    return codes, found.to(scales.dtype), zeros


def _check(weight: Tensor, scales: Tensor, zero_points: Tensor, bits: int, group_size: int) -> None:
    if not 1 <= bits <= 8 or group_size < 1:
        raise InputError(f"bits is {bits} and group_size {group_size}, but they must be 1 to 8, and 1 or more.")
    if weight.dim() != 2 or weight.dtype != torch.float32 or not weight.is_contiguous():
        raise InputError(f"weight is {weight.dtype} {list(weight.shape)}, but must be float32 [rows, columns], contiguous.")
    shape = (weight.shape[0], -(-weight.shape[1] // group_size))
    for name, tensor, dtypes in (
        ("scales", scales, (torch.float16, torch.float32)),
        ("zero_points", zero_points, (torch.float32,)),
    ):
        if tensor.shape != shape or tensor.dtype not in dtypes or not tensor.is_contiguous() or tensor.device != weight.device:
            raise InputError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, but must be "
                f"{' or '.join(map(str, dtypes))} {list(shape)}, contiguous, on {weight.device}, a value for each group."
            )
