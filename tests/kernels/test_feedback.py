"""Rounding with feedback: every backend equals the reference, and the reference does what its formulas say."""

from __future__ import annotations

import itertools

import pytest
import torch

from mpsearch import kernels
from mpsearch.errors import InputError
from mpsearch.quantizers.gptq import triangular_feedback

COMPILED = kernels.available_backends()[1:]


def problem(rows, columns, k, n_groups, bits, seed=0):
    """Weights, a Hessian for each of k groups of rows, and grids on which about a tenth of the weights are clipped."""
    torch.manual_seed(seed)
    weight = torch.randn(rows, columns)
    x = torch.randn(k, columns + 10, columns, dtype=torch.float64) + 0.7
    hessian = x.transpose(1, 2) @ x / x.shape[1]
    scales = torch.rand(rows, n_groups) * 2 ** (2 - bits) + 0.5 * 2 ** (2 - bits)
    zeros = torch.full((rows, n_groups), 2.0 ** (bits - 1) if bits > 1 else 0.5)
    groups = (torch.arange(columns) * n_groups // max(columns, 1)).int()[torch.randperm(columns)].contiguous()
    return weight, hessian, scales, zeros, groups


CASES = [
    (1, 1, 1, 1, 4),
    (3, 7, 1, 2, 1),
    (40, 130, 2, 3, 2),
    (33, 300, 1, 1, 3),
    (66, 129, 3, 9, 8),
    (9, 9, 9, 1, 4),
    (0, 5, 1, 1, 4),
]


@pytest.mark.parametrize(("rows", "columns", "k", "n_groups", "bits"), CASES)
def test_backends_equal_the_reference(rows, columns, k, n_groups, bits):
    weight, hessian, scales, zeros, groups = problem(rows, columns, k, n_groups, bits)
    if rows:
        scales[0, 0] = 0.0  # a group of zeros
    errors, fixed = 0.1 * torch.randn(rows, columns), torch.rand(rows, columns) < 0.2
    full = (hessian / hessian.diagonal(dim1=1, dim2=2)[:, :, None]).float()
    for feedback, start, stays in itertools.product((triangular_feedback(hessian), full), (None, errors), (None, fixed)):
        arguments, how = (weight, feedback, scales, zeros, groups), {"bits": bits, "errors": start, "fixed": stays}
        with kernels.use_backend("reference"):
            expected = kernels.round_with_feedback(*arguments, **how)
        for backend in COMPILED:
            with kernels.use_backend(backend):
                assert torch.equal(kernels.round_with_feedback(*arguments, **how), expected), backend


@pytest.mark.parametrize("backend", kernels.available_backends())
def test_a_fixed_column_takes_no_part(backend):
    """Where it has no error the other codes are those without the column; where it has one, of weights less its share."""
    weight, hessian, scales, zeros, _ = problem(5, 30, 1, 1, 3)
    feedback = (hessian / hessian.diagonal(dim1=1, dim2=2)[:, :, None]).float()
    column, groups = 11, torch.zeros(30, dtype=torch.int32)
    others = torch.arange(30) != column
    fixed = torch.zeros(5, 30, dtype=torch.bool)
    fixed[:, column] = True
    errors = (0.1 * torch.randn(5, 30)).masked_fill(fixed, 0.0)
    without = (feedback[:, others][:, :, others].contiguous(), scales, zeros, groups[:29])
    with kernels.use_backend(backend):
        for start in (None, errors):
            found = kernels.round_with_feedback(weight, feedback, scales, zeros, groups, bits=3, errors=start, fixed=fixed)
            of_others = None if start is None else start[:, others].contiguous()
            expected = kernels.round_with_feedback(weight[:, others].contiguous(), *without, bits=3, errors=of_others)
            assert torch.equal(found[:, others], expected)
        errors[:, column] = 2.0
        found = kernels.round_with_feedback(weight, feedback, scales, zeros, groups, bits=3, errors=errors, fixed=fixed)
        target = weight - 2.0 * feedback[0, :, column]
        e = errors.clone()
        for j in others.nonzero().flatten().tolist():
            left = target[:, j] - e[:, others] @ feedback[0, j, others] + e[:, j] * feedback[0, j, j]
            code = (left / scales[:, 0] + zeros[:, 0]).round().clamp(0, 7)
            e[:, j] = (code - zeros[:, 0]) * scales[:, 0] - weight[:, j]
            assert torch.equal(found[:, j].float(), code)


def test_threads_give_the_same():
    weight, hessian, scales, zeros, groups = problem(400, 90, 1, 1, 3)
    results, before = [], torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(kernels.round_with_feedback(weight, triangular_feedback(hessian), scales, zeros, groups, bits=3))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_the_factor_is_that_of_the_hessian():
    _, hessian, *_ = problem(4, 20, 2, 1, 4)
    a = triangular_feedback(hessian).double() + torch.eye(20)
    inner = torch.linalg.solve(a.transpose(1, 2), hessian) @ torch.linalg.inv(a)
    assert torch.allclose(inner, torch.diag_embed(inner.diagonal(dim1=1, dim2=2)), atol=1e-4)
    assert (inner.diagonal(dim1=1, dim2=2) > 0).all()


def test_it_is_gptq_as_published():
    """Frantar et al. 2023, algorithm 1, with the inverse Hessian's Cholesky factor and a loop over the columns."""
    weight, hessian, scales, zeros, _ = problem(6, 24, 1, 1, 3)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian[0]), upper=True)
    w, codes = weight.double(), torch.empty(6, 24)
    for j in range(24):
        codes[:, j] = (w[:, j] / scales[:, 0] + zeros[:, 0]).round().clamp(0, 7)
        error = (w[:, j] - (codes[:, j] - zeros[:, 0]) * scales[:, 0]) / upper[j, j]
        w[:, j:] -= error[:, None] * upper[j, j:]
    groups = torch.zeros(24, dtype=torch.int32)
    found = kernels.round_with_feedback(weight, triangular_feedback(hessian), scales, zeros, groups, bits=3)
    assert torch.equal(found.float(), codes)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"bits": 9}, "bits must be 1 to 8; got 9"),
        (
            {"scales": torch.ones(4, 2, dtype=torch.float16)},
            r"scales must be contiguous float32 \[4, n_groups\] on cpu; got float16 \[4, 2\] on cpu",
        ),
        (
            {"feedback": torch.zeros(1, 6, 5)},
            r"feedback must be contiguous float32 \[k, 6, 6\] on cpu; got float32 \[1, 6, 5\] on cpu",
        ),
        ({"feedback": torch.zeros(3, 6, 6)}, r"feedback must be \[k, 6, 6\] with 4 rows a multiple of k; got k=3"),
        (
            {"column_groups": torch.full((6,), 2, dtype=torch.int32)},
            "column_groups must be 0 to 1 for 2 groups; got 2 to 2",
        ),
        ({"errors": torch.zeros(4, 5)}, r"errors must be contiguous float32 \[4, 6\] on cpu; got float32 \[4, 5\]"),
        ({"fixed": torch.zeros(4, 6)}, r"fixed must be contiguous bool \[4, 6\] on cpu; got float32 \[4, 6\] on cpu"),
        ({"weight": torch.zeros(4)}, r"weight must be contiguous float32 \[rows, columns\]; got float32 \[4\]"),
    ],
)
def test_what_does_not_fit_is_said(change, sentence):
    arguments = {
        "weight": torch.zeros(4, 6),
        "feedback": torch.zeros(1, 6, 6),
        "scales": torch.ones(4, 2),
        "zero_points": torch.ones(4, 2),
        "column_groups": torch.zeros(6, dtype=torch.int32),
        "bits": 4,
    }
    with pytest.raises(InputError, match=sentence):
        kernels.round_with_feedback(**(arguments | change))
