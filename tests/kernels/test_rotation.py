"""Rotation by a Hadamard matrix of signs: every backend equals the reference, and that is what it says it is."""

import numpy as np
import pytest
import scipy.linalg
import torch

from mpsearch import kernels
from mpsearch.errors import InputError
from mpsearch.kernels import reference_rotation

COMPILED = kernels.available_backends()[1:]
COLUMNS = [1, 2, 3, 7, 8, 15, 16, 32, 65, 128, 172, 384, 511, 512, 1024, 4104]


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("back", [False, True])
def test_backends_equal_the_reference(columns, back):
    torch.manual_seed(columns)
    x = torch.randn(5, columns) * torch.logspace(-20, 20, 5)[:, None]
    with kernels.use_backend("reference"):
        expected = kernels.rotate(x, back=back)
    for backend in COMPILED:
        with kernels.use_backend(backend):
            assert torch.equal(kernels.rotate(x, back=back), expected), backend


@pytest.mark.parametrize("columns", [1, 8, 172, 384])
def test_it_is_a_hadamard_matrix_of_signs(columns):
    """Beside SciPy's: within the bound of log2(n) + 2 roundings of each sum of n products."""
    sizes = reference_rotation.blocks_of(columns)
    assert sum(sizes) == columns
    assert sizes == sorted(sizes, reverse=True)
    matrix = scipy.linalg.block_diag(*(scipy.linalg.hadamard(size) / np.sqrt(size) for size in sizes))
    factors = reference_rotation.factors_of(columns, torch.device("cpu")).numpy()
    matrix = np.sign(factors)[:, None] * matrix
    assert np.allclose(matrix @ matrix.T, np.eye(columns), atol=1e-12)
    x = torch.randn(9, columns)
    error = (kernels.rotate(x).double().numpy() - x.double().numpy() @ matrix).__abs__()
    assert (error <= (np.log2(sizes[0]) + 2) * 2**-24 * (x.abs().double().numpy() @ np.abs(matrix))).all()
    back = (kernels.rotate(kernels.rotate(x), back=True) - x).abs()
    assert (back <= 1e-6 * x.square().sum(1, keepdim=True).sqrt()).all()


def test_the_signs_are_those_of_the_formula():
    """Written down, as files depend on them; about half are negative, and no Walsh function is like them."""
    signs = reference_rotation.factors_of(1024, torch.device("cpu")).sign()
    assert "".join("+-"[int(sign < 0)] for sign in signs[:16]) == SIGNS
    assert abs(signs.sum()) < 4 * 32
    assert np.abs(scipy.linalg.hadamard(1024) @ signs.numpy()).max() < 5 * 32


SIGNS = "+-+---++--++-+--"


def test_what_stands_out_is_spread():
    x = torch.randn(200, 256)
    x[:, 17] *= 50
    largest, after = x.abs().amax(1).mean(), kernels.rotate(x).abs().amax(1).mean()
    assert after < largest / 4
    constant = kernels.rotate(torch.ones(1, 256))  # what H alone would put into one column
    assert constant.abs().max() < 6


def test_shapes_strides_and_dtypes():
    x = torch.randn(3, 8, 5).transpose(1, 2)
    assert torch.equal(kernels.rotate(x), kernels.rotate(x.contiguous().reshape(15, 8)).reshape(3, 5, 8))
    assert kernels.rotate(torch.zeros(0, 8)).shape == (0, 8)
    assert kernels.rotate(torch.zeros(4, 0)).shape == (4, 0)
    half = x.bfloat16()
    assert torch.equal(kernels.rotate(half), kernels.rotate(half.float()).bfloat16())
    assert kernels.rotate(torch.full((1, 8), torch.nan)).isnan().all()
    with pytest.raises(InputError, match=r"x must be float32, float16 or bfloat16 \[..., columns\]; got int64 \[3\]"):
        kernels.rotate(torch.zeros(3, dtype=torch.int64))


def test_threads_give_the_same():
    x, results, before = torch.randn(900, 172), [], torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(kernels.rotate(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
