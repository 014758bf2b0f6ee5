"""Half-quadratic fitting: every backend equals the reference, and the reference does what its formulas say."""

from __future__ import annotations

import random

import pytest
import torch

from mpsearch import kernels
from mpsearch.errors import InputError

DTYPES = [torch.float16, torch.float32]
COMPILED = kernels.available_backends()[1:]
CASES = [
    (1, 1, 1, 4, True, torch.float16),
    (3, 7, 100, 1, True, torch.float32),
    (5, 130, 64, 2, False, torch.float16),
    (9, 67, 16, 3, False, torch.float32),
    (4, 40, 5, 8, True, torch.float32),
    (0, 5, 5, 4, True, torch.float16),
]


def problem(rows, columns, group_size, bits, symmetric, dtype, seed=0):
    """Weights with heavy tails, and the min-max grids of their groups."""
    torch.manual_seed(seed)
    weight = torch.randn(rows, columns) * torch.rand(rows, columns).add(0.1).reciprocal()
    weight[:, : columns // 3] += 1.0
    _, scales, zeros = kernels.quantize(weight, bits=bits, group_size=group_size, symmetric=symmetric, scale_dtype=dtype)
    middle = 0.5 if bits == 1 else 2.0 ** (bits - 1)
    return weight, scales, torch.full(scales.shape, middle) if zeros is None else zeros.float()


def fit(case, n_steps=8, beta=10.0):
    rows, _, group_size, bits, symmetric, _ = case
    weight, scales, zeros = problem(*case)
    if rows > 1:
        scales[0] = 0.0  # a group of zeros, as far as its grid says
    how = {"bits": bits, "group_size": group_size, "fit_zeros": not symmetric, "n_steps": n_steps, "beta": beta, "growth": 1.01}
    return kernels.half_quadratic(weight, scales, zeros, **how)


@pytest.mark.parametrize("case", CASES)
def test_backends_equal_the_reference(case):
    for beta in (1.0, 10.0, 1e4):
        with kernels.use_backend("reference"):
            expected = fit(case, beta=beta)
        for backend in COMPILED:
            with kernels.use_backend(backend):
                for found, wanted in zip(fit(case, beta=beta), expected, strict=True):
                    assert found.dtype == wanted.dtype
                    assert torch.equal(found, wanted), (backend, beta)


def test_ordinary_calls_equal_the_reference():
    """600 of them: where a rounding differs, it changes a result only now and then (a root that was off by one did in 2%)."""
    random.seed(0)
    for seed in range(600):
        rows, columns, bits = random.randint(1, 100), random.randint(1, 64), random.randint(1, 8)
        case = (rows, columns, random.choice([4, 8, 16, columns]), bits, seed % 2 == 0, random.choice(DTYPES))
        weight, scales, zeros = problem(*case, seed=seed)
        weight *= random.choice([1e-3, 0.05, 1.0, 300.0]) if seed % 3 else 1.0
        how = {"bits": bits, "group_size": case[2], "fit_zeros": not case[4], "growth": 1.01}
        how |= {"n_steps": random.choice([1, 4]), "beta": random.choice([1.0, 10.0, 50.0])}
        with kernels.use_backend("reference"):
            expected = kernels.half_quadratic(weight, scales, zeros, **how)
        for backend in COMPILED:
            with kernels.use_backend(backend):
                found = kernels.half_quadratic(weight, scales, zeros, **how)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), (backend, seed, case, how)


def test_magnitudes_at_the_ends_of_float32_equal_the_reference():
    """There sums overflow, and a difference of infinities is NaN, from which no zero point follows."""
    torch.manual_seed(0)
    exponents = torch.rand(3000, 2) * 76 - 38
    weight, scales = torch.randn(3000, 16) * 10 ** exponents[:, :1].abs(), 10 ** exponents[:, 1:]
    weight, zeros = weight.clamp(-3e38, 3e38), torch.randint(0, 8, (3000, 1)).float()
    how = {"bits": 3, "group_size": 16, "fit_zeros": True, "n_steps": 4, "beta": 10.0, "growth": 1.01}
    with kernels.use_backend("reference"):
        expected = kernels.half_quadratic(weight, scales, zeros, **how)
    for backend in COMPILED:
        with kernels.use_backend(backend):
            found = kernels.half_quadratic(weight, scales, zeros, **how)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), backend


def test_threads_give_the_same():
    case, results, before = (300, 200, 64, 3, False, torch.float16), [], torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(fit(case))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("symmetric", [True, False])
def test_one_step_is_the_closed_forms(symmetric):
    """In float64, from the formulas as the paper has them: shrinkage, the nearest zero point to the mean, least squares."""
    weight, scales, zeros = problem(6, 48, 48, 3, symmetric, torch.float32)
    x, s, z, beta = weight.double(), scales.double(), zeros.double(), 20.0
    code = (x / s + z).round().clamp(0, 7)
    r = x - (code - z) * s
    a = r.abs() / s
    y = x - r.sign() * (a - a.pow(-0.25) / beta).clamp(min=0) * s
    new_z = z if symmetric else (code - y / s).mean(1, keepdim=True).round().clamp(0, 7)
    new_s = ((code - new_z) * y).sum(1, keepdim=True) / (code - new_z).square().sum(1, keepdim=True)

    def cost(s, z):
        return (x - ((x / s + z).round().clamp(0, 7) - z) * s).abs().pow(0.75).sum(1, keepdim=True)

    better = cost(new_s, new_z) < cost(s, z)
    assert better.any()
    how = {"bits": 3, "group_size": 48, "fit_zeros": not symmetric, "n_steps": 1, "beta": beta, "growth": 1.0}
    _, found_s, found_z = kernels.half_quadratic(weight, scales, zeros, **how)
    assert torch.allclose(found_s.double(), torch.where(better, new_s, s), rtol=1e-5)
    assert torch.equal(found_z.double(), torch.where(better, new_z, z))


@pytest.mark.parametrize("case", CASES[1:5])
def test_no_group_ends_worse_than_it_started(case):
    rows, columns, group_size, bits, symmetric, _ = case
    weight, scales, zeros = problem(*case)
    how = {"bits": bits, "group_size": group_size, "fit_zeros": not symmetric, "beta": 50.0, "growth": 1.01}
    groups = torch.arange(columns) // group_size

    def costs(n_steps):
        codes, s, z = kernels.half_quadratic(weight, scales, zeros, n_steps=n_steps, **how)
        error = (codes - z[:, groups]) * s.float()[:, groups] - weight
        return torch.zeros(rows, scales.shape[1]).index_add_(1, groups, error.abs().pow(0.75))

    start, end = costs(0), costs(20)
    assert (end <= start * (1 + 1e-5)).all()
    assert end.sum() < start.sum()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"bits": 9}, "bits must be 1 to 8; got 9"),
        ({"weight": torch.zeros(4, 6).double()}, r"weight must be contiguous float32 .*; got float64 \[4, 6\]"),
        ({"scales": torch.ones(4, 2)}, r"scales must be contiguous float16 or float32 \[4, 1\] on cpu; got float32 \[4, 2\]"),
        ({"zero_points": torch.ones(4, 1, dtype=torch.uint8)}, "zero_points must be contiguous float32 .*; got uint8"),
    ],
)
def test_what_does_not_fit_is_said(change, sentence):
    arguments = {"weight": torch.zeros(4, 6), "scales": torch.ones(4, 1), "zero_points": torch.ones(4, 1), "bits": 4}
    how = {"group_size": 6, "fit_zeros": True, "n_steps": 2, "beta": 1.0, "growth": 1.0}
    with pytest.raises(InputError, match=sentence):
        kernels.half_quadratic(**(arguments | change), **how)
