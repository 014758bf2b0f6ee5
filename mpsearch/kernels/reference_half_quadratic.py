"""Half-quadratic fitting of grids in plain PyTorch: the specification that every compiled backend equals bit for bit.

All arithmetic is float32, each operation correctly rounded by itself, square roots too, and rounding to integers is half to
even; sums over a group's columns have the order of `reference.py`'s clip search. `unit` is the group's first |scale|, and of a
grid (scale, zero)

    inverse = 1 / scale, or 0 where |scale| is below 2**-126          n = the number of columns
    code    = rint(clamp(x * inverse + zero, 0, top))                 d = code - zero
    r       = x - d * scale                                           a = max(|r| / unit, 2**-126), by the inverse of unit
    cost    = sum of a * (1 / a^(1/4))                                that is |r|^(3/4)
    e       = max(a - (1 / a^(1/4)) / beta, 0) * unit, with r's sign  a^(1/4) = sqrt(sqrt(a)), / beta by its inverse
    y       = x - e

`n_steps` times the grid is replaced by the one that is best for y and the codes as they are:

    shift   = rint(clamp(zero + (sum d - inverse * sum y) / n, 0, top)) - zero, or 0 where zeros stay; a NaN is clamped to 0
    scale   = round_scale((sum d*y - shift * sum y) / ((sum d*d - 2 * shift * sum d) + n * shift * shift))

where the divisor is above 0 and |scale| is from 2**-126 up and finite; else the scale stays. Each step has its own beta. The grid
with the strictly smallest cost wins, the first of equals; the codes are its nearest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpsearch.kernels.reference import LANES, SMALLEST_NORMAL, join_groups, split_groups


def half_quadratic(
    weight: Tensor,  # [rows, columns] float32
    scales: Tensor,  # [rows, n_groups] float16 or float32
    zero_points: Tensor,  # [rows, n_groups] float32
    bits: int,
    group_size: int,
    fit_zeros: bool,
    betas: Tensor,  # [n_steps + 1] float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 `[rows, columns]`, scales in their dtype and zero points `[rows, n_groups]`."""
    columns, top = weight.shape[1], float(2**bits - 1)
    x = split_groups(weight, group_size)
    present = split_groups(torch.ones(1, columns, device=weight.device), group_size)
    n = present.sum(-1)
    scale, zero = scales.float(), zero_points
    unit = scale.abs()
    per_unit = _inverse(unit)
    best = torch.full_like(scale, torch.inf)
    best_scale, best_zero = scale, zero
    for beta in betas:
        inverse = _inverse(scale)
        code = (x * inverse[..., None] + zero[..., None]).clamp(0, top).round()
        d = (code - zero[..., None]) * present
        r = x - d * scale[..., None]
        a = (r.abs() * per_unit[..., None]).clamp(min=SMALLEST_NORMAL)
        root = 1.0 / _square_root(_square_root(a))
        cost = _sum(a * root * present)
        better = cost < best
        best = torch.where(better, cost, best)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        e = (a - root * (1.0 / beta)).clamp(min=0.0) * unit[..., None]
        y = x - torch.where(r < 0, -e, e)
        sums = [_sum(values) for values in (d, y, d * d, d * y)]
        mean = (sums[0] - inverse * sums[1]) / n + zero
        shift = mean.nan_to_num(0.0).clamp(0, top).round() - zero if fit_zeros else torch.zeros_like(zero)
        divisor = (sums[2] - (shift + shift) * sums[0]) + n * shift * shift
        moved = ((sums[3] - shift * sums[1]) / divisor).to(scales.dtype).float()
        fits = (divisor > 0) & (moved.abs() >= SMALLEST_NORMAL) & (moved.abs() < torch.inf)
        scale, zero = torch.where(fits, moved, scale), zero + shift
    code = (x * _inverse(best_scale)[..., None] + best_zero[..., None]).clamp(0, top).round()
    return join_groups(code.to(torch.uint8), columns, group_size), best_scale.to(scales.dtype), best_zero


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale.abs() < SMALLEST_NORMAL, 0.0, 1.0 / scale)


def _square_root(values: Tensor) -> Tensor:
    """Correctly rounded, which `torch.sqrt` of float32 is not: MKL's is off by one unit in the last place for some values.

    A float64 root is never so near to the middle of two float32 numbers that its own rounding decides.
    """
    return values.double().sqrt().float()


def _sum(values: Tensor) -> Tensor:
    """Over the last axis: column j into lane j % 8 in ascending order, then the lanes pairwise."""
    lanes = values.unflatten(-1, (-1, LANES))
    total = torch.zeros_like(lanes[..., 0, :])
    for step in range(lanes.shape[-2]):
        total = total + lanes[..., step, :]
    while total.shape[-1] > 1:
        total = total[..., 0::2] + total[..., 1::2]
    return total[..., 0]
