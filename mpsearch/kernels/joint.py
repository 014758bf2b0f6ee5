"""Rounding rows jointly: each code is chosen with the errors of all rows and columns in view."""

from __future__ import annotations

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.kernels import reference_joint
from mpsearch.kernels.arguments import JointArguments, addresses
from mpsearch.kernels.backends import backend_of, run
from mpsearch.kernels.checks import SCALE_DTYPES, check_column_groups, check_range, checked


def round_jointly(
    weight: Tensor,
    row_feedback: Tensor,
    column_feedback: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    column_groups: Tensor,
    *,
    bits: int,
    codes: Tensor | None = None,
    fixed: Tensor | None = None,
    n_passes: int = 1,
    n_fits: int = 0,
    column_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 `[rows, columns]`, scales as given, and int64 `[n_passes]`: how many codes each pass changed.

    Parameters
    ----------
    weight
        float32 `[rows, columns]`.
    row_feedback, column_feedback
        float32 `[rows, rows]` and `[columns, columns]`, ones on the diagonals; lower triangular without `codes`.
    scales, zero_points
        float16 or float32, and float32, `[rows, n_groups]`; where a scale is 0 the group's codes are the zero point.
    column_groups
        int32 `[columns]`: which group a column belongs to; ascending where scales are fitted.
    codes
        uint8 `[rows, columns]` to begin with; `None`: there are none yet.
    fixed
        bool `[rows, columns]`: weights that are stored elsewhere and 0 here, whose codes are not used. `None`: none.
    n_passes
        Over all rows; they end early after one that changes nothing. 1 without `codes`.
    n_fits
        In the first so many passes each scale takes the best value for the codes as they are before its rows are rounded.
    column_weights
        float32 `[columns]`: the diagonal of H, for `n_fits`.

    With R and F the feedbacks and errors e = (code - zero) * scale - weight, 0 where there is no code yet, every weight takes

        code[r, j] = nearest((weight[r, j] - sum over (s, i) != (r, j) of R[r, s] * e[s, i] * F[j, i]) / scale + zero)

    With R[r, s] = G[r, s] / G[r, r] and F[j, i] = H[j, i] / H[j, j] it is cyclic coordinate descent on tr(G E H E^T), which
    never grows. Without codes, with G = R^T D R and H = F^T D' F, D and D' diagonal, it is rounding with feedback between rows as
    well as between columns (Tseng et al. 2025, YAQA, section 3.2).

    `reference_joint.py` gives every rounding. Raises `InputError` where shapes do not fit together.
    """
    check_range("bits", bits, 1, 8)
    check_range("n_passes", n_passes, 1)
    weight = checked("weight", weight, torch.float32, ("rows", "columns"))
    (rows, columns), device = weight.shape, weight.device
    row_feedback = checked("row_feedback", row_feedback, torch.float32, (rows, rows), device)
    column_feedback = checked("column_feedback", column_feedback, torch.float32, (columns, columns), device)
    scales = checked("scales", scales, SCALE_DTYPES, (rows, "n_groups"), device)
    n_groups = scales.shape[1]
    zero_points = checked("zero_points", zero_points, torch.float32, (rows, n_groups), device)
    column_groups = checked("column_groups", column_groups, torch.int32, (columns,), device)
    codes = checked("codes", codes, torch.uint8, (rows, columns), device)
    fixed = checked("fixed", fixed, torch.bool, (rows, columns), device)
    column_weights = checked("column_weights", column_weights, torch.float32, (columns,), device)
    check_column_groups(column_groups, n_groups)
    if codes is None and (n_passes > 1 or n_fits):
        raise InputError(f"Without codes there is one pass and no fit; got n_passes={n_passes}, n_fits={n_fits}. Give codes.")
    if n_fits and (column_weights is None or bool((column_groups.diff() < 0).any())):
        raise InputError("n_fits needs column_weights, and column_groups in ascending order.")
    inputs = weight, row_feedback, column_feedback, scales, zero_points, column_groups
    backend = backend_of(weight, on_cuda=False)
    if backend == "reference":
        return reference_joint.round_jointly(*inputs, bits, codes, fixed, n_passes, n_fits, column_weights)
    return _compiled(backend, *inputs, bits, codes, fixed, n_passes, n_fits, column_weights)


def _compiled(
    backend: str,
    weight: Tensor,
    row_feedback: Tensor,
    column_feedback: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    column_groups: Tensor,
    bits: int,
    codes: Tensor | None,
    fixed: Tensor | None,
    n_passes: int,
    n_fits: int,
    column_weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference_joint.round_jointly`."""
    begin, new_scales = codes is None, scales.float().clone()
    codes = torch.zeros(weight.shape, dtype=torch.uint8) if codes is None else codes.clone()
    n_changed = torch.zeros(n_passes, dtype=torch.int64)
    arguments = JointArguments(
        **addresses(weight=weight, row_feedback=row_feedback, column_feedback=column_feedback, column_weights=column_weights),
        **addresses(zero_points=zero_points, column_groups=column_groups, fixed=fixed),
        **addresses(scales=new_scales, codes=codes, n_changed=n_changed),
        rows=weight.shape[0],
        columns=weight.shape[1],
        n_groups=scales.shape[1],
        n_passes=n_passes,
        n_fits=n_fits,
        bits=bits,
        begin=begin,
        half_scales=scales.dtype == torch.float16,
    )
    run("round_jointly", backend, weight, arguments)
    return codes, new_scales.to(scales.dtype), n_changed
