"""The face of rounding with feedback: each column is rounded where the errors of the other columns make it best."""

from __future__ import annotations

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.kernels import reference_feedback
from mpsearch.kernels.backends import backend_index, backend_of, compiled
from mpsearch.kernels.memory import readable


def round_with_feedback(
    weight: Tensor,
    feedback: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    column_groups: Tensor,
    *,
    bits: int,
    errors: Tensor | None = None,
    fixed: Tensor | None = None,
) -> Tensor:
    """Codes uint8 `[rows, columns]`, found column by column on grids that are given.

    weight         float32 `[rows, columns]`
    feedback       float32 `[k, columns, columns]`; rows is a multiple of k, and row r takes `feedback[r // (rows // k)]`. What
                   stands on the diagonal is not read; without `errors`, nor is what stands above it
    scales         float32 `[rows, n_groups]`; where one is 0 the group's codes are the zero point
    zero_points    float32 `[rows, n_groups]`; 0.5 is one too
    column_groups  int32 `[columns]`: which group a column belongs to, so that columns may come in any order
    errors         float32 `[rows, columns]`: (dequantized - weight) of codes to begin with; `None`: there are none yet
    fixed          bool `[rows, columns]`: weights that are stored elsewhere, whose codes are not used; their errors stay as they
                   are at first; `None`: none

    In ascending order every column j takes, errors e being 0 at first or those given,

        code[j] = nearest((weight[j] - sum over i != j of e[i] * feedback[j, i]) / scale + zero)
        e[j]    = (code[j] - zero) * scale - weight[j], unless fixed

    With H = (I + A)^T D (I + A), A strictly lower triangular and D diagonal, `feedback = A` without errors is GPTQ (Frantar et
    al. 2023, in the form of Chee et al. 2023, QuIP, theorem 6). With `errors` and `feedback[j, i] = H[j, i] / H[j, j]` it is one
    sweep of cyclic coordinate descent on sum_r e_r^T H e_r (Behdin et al. 2023, QuantEase, equation 10).

    `reference_feedback.py` gives every rounding. Raises `InputError` where shapes do not fit together.
    """
    weight, feedback, errors = readable("weight", weight), readable("feedback", feedback), readable("errors", errors)
    scales, zero_points = readable("scales", scales), readable("zero_points", zero_points)
    column_groups, fixed = readable("column_groups", column_groups), readable("fixed", fixed)
    _check(weight, feedback, scales, zero_points, column_groups, bits, errors, fixed)
    backend = backend_of(weight, on_cuda=False)
    if backend == "reference":
        return reference_feedback.round_with_feedback(weight, feedback, scales, zero_points, column_groups, bits, errors, fixed)
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    rows, columns = weight.shape
    if codes.numel():
        compiled.round_with_feedback(
            backend_index(backend),
            weight.data_ptr(),
            feedback.data_ptr(),
            scales.data_ptr(),
            zero_points.data_ptr(),
            column_groups.data_ptr(),
            0 if errors is None else errors.data_ptr(),
            0 if fixed is None else fixed.data_ptr(),
            codes.data_ptr(),
            rows,
            columns,
            scales.shape[1],
            len(feedback),
            bits,
            torch.get_num_threads(),
        )
    return codes


def _check(
    weight: Tensor,
    feedback: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    column_groups: Tensor,
    bits: int,
    errors: Tensor | None,
    fixed: Tensor | None,
) -> None:
    if not 1 <= bits <= 8:
        raise InputError(f"bits is {bits}, but must be 1 to 8.")
    if weight.dim() != 2 or feedback.dim() != 3 or scales.dim() != 2:
        raise InputError(
            f"weight, feedback and scales have {weight.dim()}, {feedback.dim()} and {scales.dim()} dimensions, but must have "
            "2, 3 and 2: [rows, columns], [k, columns, columns], [rows, n_groups]."
        )
    (rows, columns), k, n_groups = weight.shape, len(feedback), scales.shape[1]
    wanted = {
        "weight": (weight, (rows, columns), torch.float32),
        "feedback": (feedback, (k, columns, columns), torch.float32),
        "scales": (scales, (rows, n_groups), torch.float32),
        "zero_points": (zero_points, (rows, n_groups), torch.float32),
        "column_groups": (column_groups, (columns,), torch.int32),
        "errors": (weight if errors is None else errors, (rows, columns), torch.float32),
    }
    if fixed is not None:
        wanted["fixed"] = (fixed, (rows, columns), torch.bool)
    for name, (tensor, shape, dtype) in wanted.items():
        if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous() or tensor.device != weight.device:
            raise InputError(
                f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, but must be {dtype} {list(shape)}, "
                f"contiguous, on {weight.device}, like the weight."
            )
    if k == 0 or rows % k != 0:
        raise InputError(f"feedback has {k} matrices, but the {rows} rows of the weight must be a multiple of that.")
    if columns and not (column_groups.min() >= 0 and column_groups.max() < n_groups):
        raise InputError(f"column_groups must be 0 to {n_groups - 1}, as scales have {n_groups} groups a row.")
