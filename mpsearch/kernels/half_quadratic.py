"""Half-quadratic fitting: grids that make few errors large, by shrinkage and closed forms in turn."""

from __future__ import annotations

import torch
from torch import Tensor

from mpsearch.kernels import reference_half_quadratic
from mpsearch.kernels.arguments import HalfQuadraticArguments, addresses
from mpsearch.kernels.backends import backend_of, run
from mpsearch.kernels.checks import SCALE_DTYPES, check_range, checked


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
    """The best of `n_steps` grids and the given one: codes uint8 `[rows, columns]`, scales, zero points float32.

    Parameters
    ----------
    weight
        float32 `[rows, columns]`, finite.
    scales
        float16 or float32 `[rows, n_groups]`: where the fit starts.
    zero_points
        float32 `[rows, n_groups]`; fitted too where `fit_zeros`, among the integers from 0 to 2**bits - 1.
    beta
        How closely the split error follows the true one at first, in units of the first scale; times `growth` a step.

    What is minimized is the sum of |weight - (code - zero) * scale|^(3/4) over each group, by the half-quadratic splitting of
    Badri and Shaji 2023 (HQQ); no group ends with a larger one than it started with. `reference_half_quadratic.py` gives every
    rounding. Raises `InputError` where shapes do not fit together.
    """
    check_range("bits", bits, 1, 8)
    check_range("group_size", group_size, 1)
    weight = checked("weight", weight, torch.float32, ("rows", "columns"))
    (rows, columns), device = weight.shape, weight.device
    group_size = min(group_size, max(columns, 1))
    per_group = (rows, -(-columns // group_size))
    scales = checked("scales", scales, SCALE_DTYPES, per_group, device)
    zero_points = checked("zero_points", zero_points, torch.float32, per_group, device)
    betas = torch.tensor([beta * growth**step for step in range(n_steps + 1)], dtype=torch.float32, device=device)
    backend = backend_of(weight, on_cuda=False)
    if backend == "reference" or not weight.numel():
        return reference_half_quadratic.half_quadratic(weight, scales, zero_points, bits, group_size, fit_zeros, betas)
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    fitted_scales, fitted_zeros = scales.float().clone(), zero_points.clone()
    arguments = HalfQuadraticArguments(
        **addresses(weight=weight, betas=betas, scales=fitted_scales, zero_points=fitted_zeros, codes=codes),
        rows=rows,
        columns=columns,
        group_size=group_size,
        n_groups=per_group[1],
        n_betas=len(betas),
        bits=bits,
        fit_zeros=fit_zeros,
        half_scales=scales.dtype == torch.float16,
    )
    run("half_quadratic", backend, weight, arguments)
    return codes, fitted_scales.to(scales.dtype), fitted_zeros
