"""Quantizers of llama.cpp's blocks: what they minimize falls, and is less than with ggml's own encoder."""

import pytest
import torch

from mpsearch.errors import InputError
from mpsearch.quantizers.base import InputMoments
from mpsearch.quantizers.block_fit import refitted
from mpsearch.quantizers.block_steps import in_blocks, searched_blocks
from mpsearch.quantizers.clip_search import ClipSearch
from mpsearch.quantizers.coordinate_descent import CoordinateDescent
from mpsearch.quantizers.gptq import GPTQ
from mpsearch.quantizers.kronecker_descent import KroneckerDescent
from mpsearch.quantizers.round_to_nearest import RoundToNearest
from mpsearch.schemes.k_quant import KQuant
from mpsearch.schemes.k_quant_layout import FORMATS

INTEGERS = [name for name, blocks in FORMATS.items() if not blocks.table]


@pytest.fixture(params=FORMATS)
def scheme(request):
    return KQuant(request.param)


def problem(rows=40, columns=256, seed=0):
    """A weight, and moments whose inputs and gradients are correlated."""
    torch.manual_seed(seed)
    weight = 0.05 * torch.randn(rows, columns) * torch.rand(rows, columns).add(0.3).reciprocal()
    x = torch.randn(2 * columns, columns) @ (torch.eye(columns) + 0.6 * torch.randn(columns, columns) / columns**0.5)
    x = x * torch.rand(columns).square().add(0.1) + 0.3 * torch.randn(columns)
    g = torch.randn(3 * rows, rows) @ (torch.eye(rows) + 0.8 * torch.randn(rows, rows) / rows**0.5)
    hessian, fisher = x.T @ x / len(x), g.T @ g / len(g)
    second = hessian.diagonal()[None].contiguous()
    return weight, InputMoments(x.mean(0)[None], second, len(x), hessian=hessian[None], fisher=fisher[None])


def errors(decoded, weight, given):
    """The error weighted by second moments, tr(E H E^T) and tr(G E H E^T)."""
    change = (decoded - weight).double()
    product = change @ given.hessian[0].double()
    of_rows = (product * change).sum()
    return (change.square() * given.second_moment).sum(), of_rows, (given.fisher[0].double() @ product * change).sum()


def test_each_quantizer_minimizes_its_error(scheme):
    weight, given = problem()
    nearest, clip, gptq, descent, joint = (
        errors(quantizer.quantize(weight, scheme, given).dequantize(), weight, given)
        for quantizer in (RoundToNearest(), ClipSearch(), GPTQ(), CoordinateDescent(), KroneckerDescent())
    )
    assert clip[0] < 0.9 * nearest[0]
    assert gptq[1] < 0.7 * clip[1]
    assert descent[1] < gptq[1]
    assert joint[2] < (0.85 if scheme.format in INTEGERS else 1.001) * descent[2]


def test_ggml_has_larger_errors(scheme):
    gguf = pytest.importorskip("gguf", reason="needs pip install gguf")
    libgguf = pytest.importorskip("libgguf", reason="needs pip install libgguf")
    weight, given = problem()
    type_ = getattr(gguf.GGMLQuantizationType, scheme.ggml_type)
    blocks = libgguf.quantize_rows(weight.numpy(), type_, given.second_moment[0].numpy())
    theirs = errors(torch.from_numpy(gguf.quants.dequantize(blocks, type_)), weight, given)
    ours = [errors(q.quantize(weight, scheme, given).dequantize(), weight, given) for q in (ClipSearch(), KroneckerDescent())]
    assert ours[0][0] < 0.98 * theirs[0]
    assert ours[1][2] < 0.5 * theirs[2]


@pytest.mark.parametrize("by_rows", [False, True])
def test_fitting_lowers_the_error(scheme, by_rows):
    weight, given = problem()
    codes, steps, _ = in_blocks(weight, scheme, RoundToNearest().codes(weight, scheme.dense, scheme.blocks.group, None))
    hessian, fisher = given.hessian[0], given.fisher[0]
    least = [errors(scheme.decode(codes, steps), weight, given)[1 + by_rows]]
    for _ in range(3):
        steps = refitted(scheme, codes, steps, weight, hessian, fisher if by_rows else None)
        least.append(errors(scheme.decode(codes, steps), weight, given)[1 + by_rows])
    assert least[1] < 0.95 * least[0]
    assert least[2] <= least[1] * (1 + 1e-6)
    assert least[3] <= least[2] * (1 + 1e-6)
    again = scheme.stored(codes, steps, tuple(weight.shape))
    assert torch.equal(again.dequantize(), scheme.decode(codes, steps)), "steps are such as are stored"


def test_no_neighbouring_integer_is_better():
    """After many fits no other scale or minimum of any one group has a smaller error."""
    scheme = KQuant("q4_k")
    weight, given = problem(rows=3, columns=256)
    codes, steps, _ = searched_blocks(weight, scheme, given.second_moment)
    for _ in range(20):
        steps = refitted(scheme, codes, steps, weight, given.hessian[0])

    def error(steps):
        change = (scheme.decode(codes, steps) - weight).double()
        return ((change @ given.hessian[0].double()) * change).sum(1)

    least = error(steps)
    for at in [*range(1, 9), *range(10, 18)]:
        for move in (-1.0, 1.0):
            other = steps.clone()
            other[:, at] = (other[:, at] + move).clamp(1 if at < 9 else 0, 63)
            assert (error(other) >= least * (1 - 1e-5)).all()


def test_importance_belongs_to_its_rows(scheme):
    """Of two halves of the rows with their own importance, each is quantized as if it were alone."""
    weight, given = problem(rows=6)
    importance = torch.cat([given.second_moment, given.second_moment.flip(1)])
    whole = searched_blocks(weight, scheme, importance)
    parts = [searched_blocks(weight[i : i + 3], scheme, importance[i // 3][None]) for i in (0, 3)]
    for both, first, last in zip(whole[:2], *(part[:2] for part in parts), strict=True):
        assert torch.equal(both, torch.cat([first, last]))


def test_plain_weights_are_exact(scheme):
    """Zeros, and a constant where there are minima."""
    for quantizer in (RoundToNearest(), ClipSearch()):
        zeros = torch.zeros(2, 256)
        assert torch.equal(quantizer.quantize(zeros, scheme).dequantize(), zeros)
        constant = torch.full((2, 256), -0.5)
        decoded = quantizer.quantize(constant, scheme).dequantize()
        assert torch.allclose(decoded, constant, rtol=0.1 if scheme.blocks.table else 2e-3)


def test_weights_that_cannot_be_stored_are_refused(scheme):
    weight = torch.ones(2, 256)
    weight[0, 3] = torch.nan
    for quantizer in (RoundToNearest(), ClipSearch()):
        with pytest.raises(InputError, match="1 of 512 weights are NaN or infinite"):
            quantizer.quantize(weight, scheme)
        with pytest.raises(InputError, match="a scale exceeds the largest float16"):
            quantizer.quantize(torch.full((2, 256), 1e12), scheme)
