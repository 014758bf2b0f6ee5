"""Rounding rows jointly: every backend equals the reference, the error never grows, and the formulas are what they say."""

from __future__ import annotations

import itertools

import pytest
import torch

from mpsearch import kernels
from mpsearch.errors import InputError
from mpsearch.quantizers.kronecker_descent import Feedback

COMPILED = kernels.available_backends()[1:]


def problem(rows, columns, n_groups, bits, seed=0):
    """Weights, G and H as `Feedback`, and grids on which some of the weights are clipped."""
    torch.manual_seed(seed)
    matrices = []
    for n in (rows, columns):
        x = torch.randn(n + 10, n, dtype=torch.float64) + 0.5
        matrices.append(x.T @ x / len(x))
    scales = torch.rand(rows, n_groups) * 2 ** (2 - bits) + 0.5 * 2 ** (2 - bits)
    zeros = torch.full((rows, n_groups), 2.0 ** (bits - 1) if bits > 1 else 0.5)
    groups = (torch.arange(columns) * n_groups // max(columns, 1)).int()
    return torch.randn(rows, columns), *matrices, scales, zeros, groups


def feedback(matrix):
    return Feedback.from_matrices(matrix[None], matrix[None], largest_first=False)[0]


def first_codes(weight, outputs, inputs, *grid, **options):
    return kernels.round_jointly(weight, feedback(outputs).triangular, feedback(inputs).triangular, *grid, **options)[0]


def passes(weight, outputs, inputs, *grid, **options):
    rows, columns = feedback(outputs), feedback(inputs)
    return kernels.round_jointly(weight, rows.full, columns.full, *grid, column_weights=columns.weights, **options)


def cost(weight, outputs, inputs, codes, scales, zeros, groups):
    """tr(G E H E^T)."""
    errors = ((codes - zeros[:, groups.long()]) * scales.float()[:, groups.long()] - weight).double()
    return float((outputs * (errors @ inputs @ errors.T)).sum())


CASES = [(1, 1, 1, 4), (5, 9, 2, 3), (40, 130, 3, 2), (33, 70, 1, 4), (65, 129, 9, 8), (32, 64, 1, 1), (0, 5, 1, 4)]


@pytest.mark.parametrize(("rows", "columns", "n_groups", "bits"), CASES)
def test_backends_equal_the_reference(rows, columns, n_groups, bits):
    weight, outputs, inputs, scales, *grid = problem(rows, columns, n_groups, bits)
    if rows > 1:
        scales[1, 0] = 0.0  # a group of zeros
    fixed = torch.rand(rows, columns) < 0.1
    for stays, dtype in itertools.product((None, fixed), (torch.float16, torch.float32)):
        x = weight if stays is None else weight.masked_fill(stays, 0.0)
        problem_of = x, outputs, inputs, scales.to(dtype), *grid
        how = {"bits": bits, "fixed": stays}
        with kernels.use_backend("reference"):
            first = first_codes(*problem_of, **how)
            expected = passes(*problem_of, **how, codes=first, n_passes=3, n_fits=2)
        for backend in COMPILED:
            with kernels.use_backend(backend):
                assert torch.equal(first_codes(*problem_of, **how), first), backend
                found = passes(*problem_of, **how, codes=first, n_passes=3, n_fits=2)
                assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), backend


def test_the_error_never_grows_and_ends_where_no_move_helps():
    weight, outputs, inputs, scales, zeros, groups = problem(37, 90, 3, 3)
    codes = first_codes(weight, outputs, inputs, scales, zeros, groups, bits=3)
    costs = [cost(weight, outputs, inputs, codes, scales, zeros, groups)]
    for n_fits in (1, 1, 1, 0, 0, 0):
        grid = scales, zeros, groups
        codes, scales, changed = passes(weight, outputs, inputs, *grid, bits=3, codes=codes, n_fits=n_fits)
        costs.append(cost(weight, outputs, inputs, codes, scales, zeros, groups))
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < 0.8 * costs[0]
    codes, _, changed = passes(weight, outputs, inputs, scales, zeros, groups, bits=3, codes=codes, n_passes=100)
    last = int(changed.nonzero().max())
    assert last < 98  # it ended by itself
    assert not changed[last + 1 :].any()
    least = cost(weight, outputs, inputs, codes, scales, zeros, groups)
    for r, j, step in itertools.product(range(0, 37, 5), range(0, 90, 7), (-1, 1)):
        other = codes.int()
        other[r, j] += step
        if 0 <= other[r, j] <= 7:
            assert cost(weight, outputs, inputs, other, scales, zeros, groups) > least * (1 - 1e-6)


def test_a_fit_moves_each_scale_to_its_best():
    """Of one row and one group: s = (q H w) / (q H q)."""
    weight, outputs, inputs, scales, zeros, groups = problem(1, 40, 1, 4)
    codes = torch.randint(0, 16, (1, 40), dtype=torch.uint8)
    fixed = torch.zeros(1, 40, dtype=torch.bool)
    q = (codes - zeros).double()
    best = (q @ inputs @ weight.double().T) / (q @ inputs @ q.T)
    everything = torch.ones_like(fixed)  # so that no code moves
    _, kept, _ = passes(weight, outputs, inputs, scales, zeros, groups, bits=4, codes=codes, fixed=everything, n_fits=1)
    assert torch.equal(kept, scales)  # nothing has a value
    _, fitted, _ = passes(weight, outputs, inputs, scales, zeros, groups, bits=4, codes=codes, fixed=fixed, n_fits=1)
    assert torch.allclose(fitted.double(), best, rtol=1e-4)


def test_without_coupling_rows_are_rounded_as_by_feedback_between_columns():
    weight, _, inputs, scales, zeros, groups = problem(50, 80, 2, 3)
    eye = torch.eye(50)
    triangular = feedback(inputs).triangular
    found, _, _ = kernels.round_jointly(weight, eye, triangular, scales, zeros, groups, bits=3)
    alone = kernels.round_with_feedback(weight, triangular[None], scales, zeros, groups, bits=3)
    assert (found != alone).float().mean() < 1e-3  # sums have another order


def test_first_codes_are_best_for_each_weight_given_those_before():
    """The sum over (r, j) of D_r D'_j t[r, j]^2, t = R E F^T: each code can only choose its own term, and takes its least."""
    weight, outputs, inputs, scales, zeros, groups = problem(20, 30, 1, 4)
    codes = first_codes(weight, outputs, inputs, scales, zeros, groups, bits=4)
    rows, columns = feedback(outputs).triangular.double(), feedback(inputs).triangular.double()
    errors = (codes - zeros) * scales - weight
    terms = rows @ errors.double() @ columns.T
    inside = (codes > 0) & (codes < 15)
    assert ((terms.abs() - scales / 2)[inside] < 1e-4).all()


@pytest.mark.parametrize("backend", COMPILED)
def test_threads_give_the_same(backend):
    weight, outputs, inputs, scales, *grid = problem(150, 300, 1, 3)
    results, before = [], torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            with kernels.use_backend(backend):
                codes = first_codes(weight, outputs, inputs, scales, *grid, bits=3)
                results.append(passes(weight, outputs, inputs, scales, *grid, bits=3, codes=codes, n_passes=2, n_fits=1))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"bits": 9}, "bits must be 1 to 8; got 9"),
        ({"n_passes": 0}, "n_passes must be 1 or more; got 0"),
        ({"row_feedback": torch.eye(5)}, r"row_feedback must be contiguous float32 \[4, 4\] on cpu; got float32 \[5, 5\]"),
        ({"column_feedback": torch.eye(4)}, r"column_feedback must be contiguous float32 \[6, 6\] on cpu; got float32 \[4, 4\]"),
        ({"column_groups": torch.full((6,), 2, dtype=torch.int32)}, "column_groups must be 0 to 1 for 2 groups; got 2 to 2"),
        ({"n_passes": 2}, "Without codes there is one pass and no fit; got n_passes=2, n_fits=0. Give codes"),
        ({"codes": torch.zeros(4, 6, dtype=torch.uint8), "n_fits": 1}, "n_fits needs column_weights, and column_groups in asc"),
        ({"codes": torch.zeros(4, 5, dtype=torch.uint8)}, r"codes must be contiguous uint8 \[4, 6\] on cpu; got uint8 \[4, 5\]"),
    ],
)
def test_what_does_not_fit_is_said(change, sentence):
    arguments = {
        "weight": torch.zeros(4, 6),
        "row_feedback": torch.eye(4),
        "column_feedback": torch.eye(6),
        "scales": torch.ones(4, 2),
        "zero_points": torch.ones(4, 2),
        "column_groups": torch.zeros(6, dtype=torch.int32),
        "bits": 4,
    }
    with pytest.raises(InputError, match=sentence):
        kernels.round_jointly(**(arguments | change))
