"""Rounding with feedback in plain PyTorch: the specification that every compiled backend equals bit for bit.

All arithmetic is float32, each operation rounded by itself, rounding to integers is half to even. Columns are taken in
blocks of `BLOCK`. Of a block, target[j] starts as weight[j]; then e[i] * feedback[j, i] is subtracted for every column i that has
an error, in ascending order, e being the errors before the block and the diagonal counting 0. The block's columns j then follow
in ascending order:

    inverse  = 1 / scale, or 0 where |scale| is below 2**-126
    code     = rint(clamp(target[j] * inverse + zero, 0, 2**bits - 1))
    error    = (code - zero) * scale - weight[j], or e[j] where fixed
    target[l] -= (error - e[j]) * feedback[l, j]    for each later column l of the block
    e[j]     = error
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpsearch.kernels.reference import SMALLEST_NORMAL

BLOCK = 128


def round_with_feedback(
    weight: Tensor,  # [rows, columns] float32
    feedback: Tensor,  # [k, columns, columns] float32
    scales: Tensor,  # [rows, n_groups] float32
    zero_points: Tensor,  # [rows, n_groups] float32
    column_groups: Tensor,  # [columns] int32
    bits: int,
    errors: Tensor | None,  # [rows, columns] float32
    fixed: Tensor | None,  # [rows, columns] bool
) -> Tensor:
    """Codes uint8 `[rows, columns]`."""
    (rows, columns), k = weight.shape, len(feedback)
    groups = column_groups.long()
    weight = weight.reshape(k, rows // k, columns)
    scale, zero = (x[:, groups].reshape(weight.shape) for x in (scales, zero_points))
    inverse = torch.where(scale.abs() < SMALLEST_NORMAL, 0.0, 1.0 / scale)
    e = torch.zeros_like(weight) if errors is None else errors.reshape(weight.shape).clone()
    stays = torch.zeros_like(weight, dtype=torch.bool) if fixed is None else fixed.reshape(weight.shape)
    diagonal = torch.eye(columns, dtype=torch.bool, device=weight.device)
    feedback = feedback.masked_fill(diagonal, 0.0)
    codes = torch.empty_like(weight)
    for begin in range(0, columns, BLOCK):
        end = min(begin + BLOCK, columns)
        target = weight[..., begin:end].clone()
        for i in range(begin if errors is None else columns):
            target -= e[..., i, None] * feedback[:, None, begin:end, i]
        for j in range(begin, end):
            position = target[..., j - begin] * inverse[..., j] + zero[..., j]
            code = position.clamp(0, 2**bits - 1).round()
            error = torch.where(stays[..., j], e[..., j], (code - zero[..., j]) * scale[..., j] - weight[..., j])
            target[..., j - begin + 1 :] -= (error - e[..., j])[..., None] * feedback[:, None, j + 1 : end, j]
            codes[..., j] = code
            e[..., j] = error
    return codes.to(torch.uint8).reshape(rows, columns)
