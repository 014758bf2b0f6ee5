"""Rounding with feedback: each column is rounded where the errors of the other columns make it best."""

from __future__ import annotations

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.kernels import reference_feedback
from mpsearch.kernels.arguments import FeedbackArguments, addresses
from mpsearch.kernels.backends import backend_of, run
from mpsearch.kernels.checks import check_column_groups, check_range, checked


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
    """Codes uint8 `[rows, columns]`, rounded column by column on given grids.

    Parameters
    ----------
    weight
        float32 `[rows, columns]`.
    feedback
        float32 `[k, columns, columns]`; rows is a multiple of k, and row r takes `feedback[r // (rows // k)]`. The diagonal is
        not read; without `errors`, nor is the part above it.
    scales, zero_points
        float32 `[rows, n_groups]`; where a scale is 0 the group's codes are the zero point. 0.5 is a zero point too.
    column_groups
        int32 `[columns]`: which group a column belongs to, so that columns may come in any order.
    errors
        float32 `[rows, columns]`: (dequantized - weight) of codes to begin with; `None`: there are none yet.
    fixed
        bool `[rows, columns]`: weights that are stored elsewhere, whose codes are not used; their errors stay as they are at
        first. `None`: none.

    In ascending order every column j takes, errors e being 0 at first or those given,

        code[j] = nearest((weight[j] - sum over i != j of e[i] * feedback[j, i]) / scale + zero)
        e[j]    = (code[j] - zero) * scale - weight[j], unless fixed

    With H = (I + A)^T D (I + A), A strictly lower triangular and D diagonal, `feedback = A` without errors is GPTQ (Frantar et
    al. 2023, in the form of Chee et al. 2023, QuIP, theorem 6). With `errors` and `feedback[j, i] = H[j, i] / H[j, j]` it is one
    sweep of cyclic coordinate descent on sum_r e_r^T H e_r (Behdin et al. 2023, QuantEase, equation 10).

    `reference_feedback.py` gives every rounding. Raises `InputError` where shapes do not fit together.
    """
    check_range("bits", bits, 1, 8)
    weight = checked("weight", weight, torch.float32, ("rows", "columns"))
    (rows, columns), device = weight.shape, weight.device
    feedback = checked("feedback", feedback, torch.float32, ("k", columns, columns), device)
    scales = checked("scales", scales, torch.float32, (rows, "n_groups"), device)
    n_matrices, n_groups = len(feedback), scales.shape[1]
    zero_points = checked("zero_points", zero_points, torch.float32, (rows, n_groups), device)
    column_groups = checked("column_groups", column_groups, torch.int32, (columns,), device)
    errors = checked("errors", errors, torch.float32, (rows, columns), device)
    fixed = checked("fixed", fixed, torch.bool, (rows, columns), device)
    if n_matrices == 0 or rows % n_matrices:
        raise InputError(f"feedback must be [k, {columns}, {columns}] with {rows} rows a multiple of k; got k={n_matrices}.")
    check_column_groups(column_groups, n_groups)
    inputs = weight, feedback, scales, zero_points, column_groups, bits, errors, fixed
    backend = backend_of(weight, on_cuda=False)
    return reference_feedback.round_with_feedback(*inputs) if backend == "reference" else _compiled(backend, *inputs)


def _compiled(
    backend: str,
    weight: Tensor,
    feedback: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    column_groups: Tensor,
    bits: int,
    errors: Tensor | None,
    fixed: Tensor | None,
) -> Tensor:
    """See `reference_feedback.round_with_feedback`."""
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    arguments = FeedbackArguments(
        **addresses(weight=weight, feedback=feedback, scales=scales, zero_points=zero_points),
        **addresses(column_groups=column_groups, errors=errors, fixed=fixed, codes=codes),
        columns=weight.shape[1],
        n_groups=scales.shape[1],
        n_matrices=len(feedback),
        rows_per_matrix=len(weight) // len(feedback),
        bits=bits,
    )
    run("round_with_feedback", backend, weight, arguments)
    return codes
