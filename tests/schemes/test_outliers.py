"""Outliers: every byte counted, the values kept, the choice worth it, for integers and codebooks and by every quantizer."""

import itertools
import json
from dataclasses import replace

import pytest
import torch

from mpsearch.errors import InputError
from mpsearch.quantizers.adaround import AdaRound
from mpsearch.quantizers.base import InputMoments
from mpsearch.quantizers.clip_search import ClipSearch
from mpsearch.quantizers.coordinate_descent import CoordinateDescent
from mpsearch.quantizers.gptq import GPTQ
from mpsearch.quantizers.kronecker_descent import KroneckerDescent
from mpsearch.quantizers.round_to_nearest import RoundToNearest
from mpsearch.schemes.base import scheme_from_fields
from mpsearch.schemes.codebook import Codebook
from mpsearch.schemes.floating import Float
from mpsearch.schemes.input import IntegerInput
from mpsearch.schemes.integer import Integer
from mpsearch.schemes.outliers import Outliers

DENSE = [Integer(3), Integer(2, 16, symmetric=False), Integer(4, "tensor"), Codebook("nf4", 16), Codebook("e2m1", 16, "e4m3")]
QUANTIZERS = [RoundToNearest(), ClipSearch(20), GPTQ(), CoordinateDescent(), KroneckerDescent(), AdaRound(n_steps=20)]


def weights(shape=(8, 3, 3, 3), seed=0):
    """Heavier tails than a bell curve, as trained weights have."""
    torch.manual_seed(seed)
    return torch.randn(shape) * torch.rand(shape).add(0.2).reciprocal()


def given(columns, k=1):
    torch.manual_seed(1)
    x = torch.randn(k, 300, columns).cumsum(-1) * 0.3
    return InputMoments(x.mean(1), x.square().mean(1), 300, hessian=x.transpose(1, 2) @ x / 300)


def with_fisher(moments, rows):
    g = torch.randn(200, rows).cumsum(1)
    return replace(moments, fisher=(g.T @ g / 200)[None])


def squared(quantized, weight, importance=1.0):
    return ((quantized.dequantize() - weight).double().square() * importance).sum().item()


def test_example_of_the_docstring():
    """17 outliers in one span: 17 x (2 + 2) + 4 bytes."""
    shape = (64, 3, 3, 3)
    dense = Integer(4, 9)
    assert Outliers(dense).storage_bits(shape) == dense.storage_bits(shape) + 8 * 72
    tensors = RoundToNearest().quantize(torch.randn(shape), Outliers(dense)).tensors
    assert {name: (list(t.shape), t.dtype) for name, t in tensors.items() if name.startswith("outlier")} == {
        "outliers": ([17], torch.float16),
        "outlier_positions": ([17], torch.uint16),
        "outlier_counts": ([1], torch.int32),
    }


@pytest.mark.parametrize("dense", DENSE, ids=str)
@pytest.mark.parametrize("share", [1e-4, 0.02, 0.5])
@pytest.mark.thin(3)
def test_bytes_and_values(dense, share):
    scheme = Outliers(dense, share)
    for shape, quantizer in itertools.product([(6, 4, 3), (5, 33), (1, 7), (7,), (0, 5)], QUANTIZERS):
        weight = weights(shape)
        columns = weight[0].numel() if len(weight) else 0
        quantized = quantizer.quantize(weight, scheme, with_fisher(given(columns), len(weight)) if len(weight) else None)
        assert 8 * quantized.nbytes == scheme.storage_bits(shape)
        dequantized = quantized.dequantize()
        assert dequantized.shape == shape
        assert (dequantized == weight.half().float()).sum() >= scheme.count(shape) == len(quantized.tensors["outliers"])


@pytest.mark.parametrize("dense", DENSE, ids=str)
@pytest.mark.parametrize("quantizer", QUANTIZERS[:2], ids=lambda quantizer: type(quantizer).__name__)
def test_the_error_falls_by_more_than_the_outliers_own(dense, quantizer):
    """By more than the largest errors of the dense tensor make up, or as much; by importance where there is any."""
    weight, moments = weights((16, 64)), given(64)
    for known, importance in ((None, 1.0), (moments, moments.second_moment)):
        alone = ((quantizer.quantize(weight, dense, known).dequantize() - weight).square() * importance).flatten()
        scheme = Outliers(dense, 0.02)
        n = scheme.count((16, 64))
        left = squared(quantizer.quantize(weight, scheme, known), weight, importance)
        assert left <= (alone.sum() - alone.topk(n).values.sum()) * 1.01
        assert left < 0.9 * alone.sum()


@pytest.mark.parametrize("dense", DENSE[:3], ids=str)
def test_no_dense_code_can_be_improved(dense):
    """Coordinate descent ends where no neighbour of a code gives a smaller e^T H e, in which outliers have no error."""
    shape, moments, scheme = (6, 48), given(48), Outliers(dense, 0.2)
    weight = weights(shape).half().float()
    found = CoordinateDescent(n_sweeps=100).quantize(weight, scheme, moments)
    error, hessian = (found.dequantize() - weight).double(), moments.hessian[0].double()
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(48)
    codes, scales, _, size = dense.unpacked(found.tensors, shape)
    kept = torch.zeros(shape, dtype=torch.bool)
    kept.view(-1)[found.tensors["outlier_positions"].long()] = True
    assert not error[kept].any()
    for change in (-1, 1):
        there = ~kept & (codes.int() + change >= 0) & (codes.int() + change < 2**dense.bits)
        step = change * scales.double().repeat_interleave(size, dim=1)[:, :48]
        growth = 2 * step * (error @ hessian) + step.square() * hessian.diagonal()
        assert growth[there].min() > -1e-3 * growth[there].abs().max()


@pytest.mark.parametrize(
    ("quantizer", "dense"),
    [
        (GPTQ(), Codebook("nf4", 16)),
        (CoordinateDescent(), Integer(2, 16)),
        (KroneckerDescent(), Integer(2, 16)),
    ],
    ids=lambda of: type(of).__name__,
)
def test_feedback_that_leaves_outliers_out_lowers_the_error(quantizer, dense, monkeypatch):
    """Compared with feedback from and to codes that are then overwritten, over several layers together."""

    def total():
        errors = []
        for seed in range(3):
            weight = weights((8, 64), seed)
            moments = with_fisher(given(64), 8)
            e = (quantizer.quantize(weight, Outliers(dense, 0.05), moments).dequantize() - weight).double()
            output = e @ moments.hessian[0].double() @ e.T
            errors.append((output * moments.fisher[0]).sum() if quantizer.needs_fisher else output.trace())
        return sum(errors)

    found = total()
    monkeypatch.setattr("mpsearch.schemes.outliers.partial", lambda codes, fixed: codes)
    before = total()
    assert found < 0.99 * before


def test_weights_that_stand_out_are_found():
    """One of 50 sigma in each row: they are the outliers, and round-to-nearest sees rows without them."""
    torch.manual_seed(0)
    weight = torch.randn(16, 400)
    columns = torch.randperm(400)[:16]
    weight[torch.arange(16), columns] = 50.0
    quantized = RoundToNearest().quantize(weight, Outliers(Integer(4), 16 / 6400))
    assert quantized.tensors["outlier_positions"].long().tolist() == (400 * torch.arange(16) + columns).tolist()
    assert squared(quantized, weight) < 0.02 * squared(RoundToNearest().quantize(weight, Integer(4)), weight)


def test_positions_beyond_a_span():
    """70,000 weights are two spans: positions start anew in the second."""
    torch.manual_seed(0)
    weight = 0.01 * torch.randn(7, 10_000)
    weight[0, 3], weight[6, 5_536], weight[6, 5_535], weight[6, 9_999] = 5.0, 6.0, 7.0, 8.0
    scheme = Outliers(Integer(2), 4 / 70_000)
    quantized = RoundToNearest().quantize(weight, scheme)
    assert quantized.tensors["outlier_positions"].tolist() == [3, 65_535, 0, 4_463]
    assert quantized.tensors["outlier_counts"].tolist() == [2, 2]
    assert (quantized.dequantize() - weight).abs().max() < 0.05
    assert 8 * quantized.nbytes == scheme.storage_bits((7, 10_000))


def test_fields_come_back():
    scheme = Outliers(Integer(3, 64, symmetric=False, input=IntegerInput(8, "static")), 0.005)
    fields = json.loads(json.dumps(scheme.fields()))
    assert scheme_from_fields(fields) == scheme
    assert (scheme.weight_bits, scheme.input_bits, scheme.input_format.scale) == (3, 8, "static")
    assert RoundToNearest().quantize(weights(), scheme).input_params
    assert scheme.describe().endswith("; 8-bit input, static scale (minmax); 0.5% of the weights in float16")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((Float("float16"),), r"dense must be an Integer or a Codebook; got Float\(format='float16'\)"),
        ((Integer(3), 0), "above 0 and below 1; got 0"),
        ((Integer(3), 1.5), "above 0 and below 1; got 1.5"),
        ((Integer(3), "1%"), "above 0 and below 1; got '1%'"),
    ],
)
def test_fields_are_checked(arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        Outliers(*arguments)


def test_what_float16_cannot_hold_is_said():
    weight = torch.randn(4, 50)
    weight[1, 2] = 1e5
    with pytest.raises(InputError, match=r"An outlier of 100000 does not fit in float16"):
        RoundToNearest().quantize(weight, Outliers(Integer(4, scale_dtype="float32"), 0.01))
