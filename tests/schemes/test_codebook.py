"""Codebooks: values and codes bit for bit those of `ml_dtypes` and torch, scales as the standards define them, exact bytes."""

import itertools
import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from mpsearch.errors import InputError
from mpsearch.quantizers.base import InputMoments
from mpsearch.quantizers.clip_search import ClipSearch
from mpsearch.quantizers.coordinate_descent import CoordinateDescent
from mpsearch.quantizers.gptq import GPTQ
from mpsearch.quantizers.percentile import Percentile
from mpsearch.quantizers.round_to_nearest import RoundToNearest
from mpsearch.schemes.codebook import SCALE_DTYPES, Codebook
from mpsearch.schemes.levels import LEVELS

NEAREST = RoundToNearest()
SCHEMES = {
    path.stem: instantiate(OmegaConf.load(path))
    for path in sorted((Path(__file__).parents[2] / "conf" / "scheme").glob("*.yaml"))
    if "codebook.Codebook" in path.read_text().split("\n")[1]
}
EVERY = [
    Codebook(levels, group_size, scale)
    for levels, group_size, scale in itertools.product(LEVELS, ("channel", "tensor", 16, 5, 1000), SCALE_DTYPES)
]
FLOATS = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}
TORCH = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def weights(shape=(8, 3, 3, 3), seed=0):
    """Heavier tails than a bell curve, as trained weights have."""
    torch.manual_seed(seed)
    return 0.1 * torch.randn(shape) * torch.rand(shape).add(0.2).reciprocal()


def squared(quantized, weight, importance=1.0):
    return ((quantized.dequantize() - weight).double().square() * importance).sum().item()


def awkward(table):
    """Over all magnitudes, the levels, the middles between them, next to those, zeros of both signs; none beyond the largest."""
    torch.manual_seed(0)
    x = torch.randn(50_000) * torch.rand(50_000).mul(40).sub(25).exp2()
    middles = (table.ascending[1:] + table.ascending[:-1]) / 2
    x = torch.cat([x, table.ascending, middles, middles.nextafter(torch.tensor(9e9)), middles.nextafter(torch.tensor(-9e9))])
    return torch.cat([x, -x, torch.tensor([0.0, -0.0, 1e-40, -1e-40])]).clamp(-table.largest, table.largest)


@pytest.mark.parametrize("name", FLOATS)
def test_floats_are_those_of_ml_dtypes(name):
    table, dtype = LEVELS[name], FLOATS[name]
    theirs = np.arange(2**table.bits, dtype=np.uint8).view(dtype).astype(np.float32)
    finite = np.isfinite(theirs)
    assert np.array_equal(finite, np.isfinite(table.values.numpy()))
    assert np.array_equal(theirs[finite], table.values.numpy()[finite])
    assert np.array_equal(np.signbit(theirs[finite]), np.signbit(table.values.numpy()[finite]))
    x = awkward(table)
    assert np.array_equal(table.encode(x).numpy(), x.numpy().astype(dtype).view(np.uint8))
    if name in TORCH:
        assert torch.equal(table.encode(x), x.to(TORCH[name]).view(torch.uint8))
    beyond = torch.tensor([1e30, -1e30])
    assert table.decode(table.encode(beyond)).tolist() == [table.largest, -table.largest], "saturates"


def test_int8_is_twos_complement_in_64ths():
    table, x = LEVELS["int8"], awkward(LEVELS["int8"])
    codes = (x.double() * 64).round().clamp(-127, 127).to(torch.int8)
    assert torch.equal(table.encode(x), codes.view(torch.uint8))
    assert torch.equal(table.decode(codes.view(torch.uint8)), codes.float() / 64)


def test_nf4_rounds_at_the_thresholds_of_bitsandbytes():
    """The literals of its `dQuantizeNF4`; the values are quantiles of a bell curve (QLoRA, equation 4 and its offset)."""
    literals = [-0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544, -0.23460740596055984]
    literals += [-0.13791173323988914, -0.045525018125772476, 0.03979014977812767, 0.1202552504837513, 0.2035212516784668]
    literals += [0.2920138537883759, 0.3893125355243683, 0.5016634166240692, 0.6427869200706482, 0.8614784181118011]
    table = LEVELS["nf4"]
    assert torch.allclose(table.bounds, torch.tensor(literals), rtol=0, atol=1.5e-7)
    offset = 0.5 * (1 / 32 + 1 / 30)
    high, low = torch.linspace(1 - offset, 0.5, 9)[:-1], torch.linspace(1 - offset, 0.5, 8)[:-1]
    quantiles = torch.cat([-torch.special.ndtri(low), torch.zeros(1), torch.special.ndtri(high).flip(0)])
    assert torch.allclose(table.ascending, quantiles / quantiles.max(), atol=1e-6)


@pytest.mark.parametrize("name", LEVELS)
def test_the_nearest_level_is_taken(name):
    table = LEVELS[name]
    finite = table.values[torch.isfinite(table.values)]
    assert torch.equal(table.decode(table.encode(finite)), finite)
    x = awkward(table)[::7].double()
    least = (x[:, None] - finite.double()).abs().amin(1)
    assert torch.equal((x - table.decode(table.encode(x.float())).double()).abs(), least)
    x = torch.cat([awkward(table), torch.tensor([1e30, -1e30, 3e38])])
    found, expected = table.nearest(x), table.decode(table.encode(x))
    assert torch.equal(found, expected)
    assert torch.equal(found.signbit(), expected.signbit())


@pytest.mark.parametrize("name", ["mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2"])
def test_mx_is_what_the_standard_says(name):
    """MX v1.0, section 6.3, in numpy: X = 2^(floor(log2(max|V|)) - emax), elements V/X rounded to nearest even, saturated."""
    scheme, weight = SCHEMES[name], weights((6, 70))  # two blocks and a ragged one
    weight[1] *= 2.0 ** torch.linspace(-60, 30, 70)
    weight[2, :32], weight[3] = 0.0, weight[3] * 1e-37
    quantized = NEAREST.quantize(weight, scheme)
    dtype, table = FLOATS[scheme.levels], scheme.table
    codes, scales = np.empty((6, 70), np.uint8), np.empty((6, 3), np.uint8)
    for row, block in itertools.product(range(6), range(3)):
        v = weight[row, 32 * block : 32 * block + 32].numpy().astype(np.float64)
        largest = np.abs(v).max()
        exponent = max(math.floor(math.log2(largest)) - table.exponent, -127) if largest else -127
        scales[row, block] = np.array(2.0**exponent).astype(ml_dtypes.float8_e8m0fnu).view(np.uint8)
        element = np.clip(v / 2.0**exponent, -table.largest, table.largest).astype(np.float32).astype(dtype)
        codes[row, 32 * block : 32 * block + 32] = element.view(np.uint8)
    found, found_scales = scheme.unpacked(quantized.tensors, (6, 70))
    assert np.array_equal(quantized.tensors["scales"].numpy(), scales)
    assert np.array_equal(found.numpy(), codes)
    assert np.array_equal(found_scales.numpy(), scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float32))


def test_nvfp4_is_what_nvidia_says():
    """Blocks of 16, an E4M3 scale of max|block| / 6 over the tensor's scale, the power of two from max|W| / (6 x 448)."""
    weight = weights((6, 40))
    weight[2], weight[3] = 0.0, weight[3] * 1e-4
    quantized = NEAREST.quantize(weight, SCHEMES["nvfp4"])
    whole = torch.tensor(2.0) ** (weight.abs().max() / (6 * 448)).log2().ceil()
    assert torch.equal(quantized.tensors["tensor_scale"], whole.reshape(1))
    blocks = torch.nn.functional.pad(weight, (0, 8)).reshape(6, 3, 16) / whole
    scales = (blocks.abs().amax(-1) / 6).to(torch.float8_e4m3fn)
    assert torch.equal(quantized.tensors["scales"], scales.view(torch.uint8))
    assert 224 <= scales.float().max() <= 448, "the largest block has a scale of the topmost octave"
    each = scales.float()[..., None]
    elements = (blocks / each).nan_to_num(0.0).clamp(-6, 6).numpy().astype(ml_dtypes.float4_e2m1fn)
    codes, _ = SCHEMES["nvfp4"].unpacked(quantized.tensors, (6, 40))
    nonzero = each.expand(6, 3, 16).reshape(6, 48)[:, :40] > 0
    assert np.array_equal(codes[nonzero], elements.view(np.uint8).reshape(6, 48)[:, :40][nonzero.numpy()])
    expected = torch.from_numpy(elements.astype(np.float32)) * (each * whole)
    assert torch.equal(quantized.dequantize(), expected.reshape(6, 48)[:, :40])


def test_fp8_with_a_scale_a_channel_is_torchs():
    weight = weights((5, 33))
    for name, dtype in (("fp8_e4m3", TORCH["e4m3"]), ("fp8_e5m2", TORCH["e5m2"])):
        scale = weight.abs().amax(1, keepdim=True) / torch.finfo(dtype).max
        theirs = (weight / scale).clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)
        quantized = NEAREST.quantize(weight, SCHEMES[name])
        assert torch.equal(quantized.tensors["codes"].reshape(5, 33), theirs.view(torch.uint8))
        assert torch.equal(quantized.dequantize(), theirs.float() * scale)


BITS = {  # of a weight [64, 128], by hand: codes, scales, the tensor's scale
    "nf4": (4, 16 / 64, 0),
    "fp4": (4, 16 / 64, 0),
    "fp8_e4m3": (8, 32 / 128, 0),
    "fp8_e5m2": (8, 32 / 128, 0),
    "mxfp4": (4, 8 / 32, 0),
    "mxfp6_e2m3": (6, 8 / 32, 0),
    "mxfp6_e3m2": (6, 8 / 32, 0),
    "mxfp8_e4m3": (8, 8 / 32, 0),
    "mxfp8_e5m2": (8, 8 / 32, 0),
    "mxint8": (8, 8 / 32, 0),
    "nvfp4": (4, 8 / 16, 32),
    "fp8a8": (8, 32 / 128, 0),
    "mxfp8a8": (8, 8 / 32, 0),
    "mxfp4a8": (4, 8 / 32, 0),
    "nvfp4a4": (4, 8 / 16, 64),
    "ternary": (8 * math.ceil(64 * 128 / 5) / (64 * 128), 16 / 128, 0),
}


def test_bits_of_the_schemes():
    assert BITS.keys() == SCHEMES.keys()
    for name, (codes, scales, once) in BITS.items():
        assert SCHEMES[name].storage_bits((64, 128)) == 64 * 128 * (codes + scales) + once


@pytest.mark.parametrize("levels", LEVELS)
def test_every_scheme_weighs_what_it_says_and_keeps_zeros_and_extremes(levels):
    for scheme in (scheme for scheme in EVERY if scheme.levels == levels):
        for weight in (weights((6, 2, 3)), weights((5, 33)), torch.zeros(3, 7), weights((7,)), torch.zeros(0, 5)):
            for quantizer in (NEAREST, ClipSearch(12)):
                quantized = quantizer.quantize(weight, scheme)
                dense = quantized.dequantize()
                assert 8 * quantized.nbytes == scheme.storage_bits(tuple(weight.shape))
                assert dense.shape == weight.shape
                assert torch.isfinite(dense).all()
                assert (dense[weight == 0] == 0).all()
                assert ((dense == 0) | (dense.sign() == weight.sign())).all()


@pytest.mark.parametrize("levels", LEVELS)
def test_what_was_quantized_is_quantized_to_itself(levels):
    for scheme in (scheme for scheme in EVERY if scheme.levels == levels):
        once = NEAREST.quantize(weights((5, 33)), scheme).dequantize()
        again = NEAREST.quantize(once, scheme).dequantize()
        if scheme.scale == "e8m0":
            assert torch.equal(again, once)
        elif scheme.scale != "e4m3" or levels in ("nf4", "ternary", "e2m1"):
            # Not of finer levels: under an E4M3 scale that was rounded up, the largest weight takes a level below the largest.
            assert torch.allclose(again, once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("levels", LEVELS)
def test_clip_search_is_never_worse_than_nearest_and_weighs_errors(levels):
    importance = torch.rand(2, 27) ** 4 + 1e-3
    weight = weights()
    each = importance.repeat_interleave(4, 0).reshape(8, 3, 3, 3)
    for scheme in (scheme for scheme in EVERY if scheme.levels == levels):
        nearest = NEAREST.quantize(weight, scheme)
        assert squared(ClipSearch().quantize(weight, scheme), weight) <= squared(nearest, weight) * (1 + 1e-6)
        weighted = ClipSearch().quantize(weight, scheme, InputMoments(torch.zeros(2, 27), importance))
        assert squared(weighted, weight, each) <= squared(nearest, weight, each) * (1 + 1e-6)


def test_a_searched_scale_is_worth_most_where_levels_are_few():
    weight = weights((64, 256))
    for name, factor in {"nf4": 1.04, "fp4": 1.1, "mxfp4": 1.04, "nvfp4": 1.1, "ternary": 2.0}.items():
        searched = squared(ClipSearch().quantize(weight, SCHEMES[name]), weight)
        assert factor * searched < squared(NEAREST.quantize(weight, SCHEMES[name]), weight), name


def test_searched_ternary_is_better_than_twn():
    """TWN's own rule: threshold 0.7 E|w|, and the mean magnitude above it as the scale (Li et al. 2016, equations 5 and 6)."""
    weight = weights((16, 300))
    size = weight.abs()
    above = size > 0.7 * size.mean(1, keepdim=True)
    scale = (size * above).sum(1, keepdim=True) / above.sum(1, keepdim=True)
    twn = (weight.sign() * above * scale - weight).square().sum()
    assert squared(ClipSearch().quantize(weight, SCHEMES["ternary"]), weight) < twn


def test_a_percentile_clips_codebooks_too():
    weight = weights((8, 40))
    high = torch.quantile(weight.abs(), 0.9, dim=1, keepdim=True)
    for name in ("fp8_e4m3", "ternary"):
        expected = NEAREST.quantize(weight.clamp(-high, high), SCHEMES[name]).dequantize()
        assert torch.allclose(Percentile(90.0).quantize(weight, SCHEMES[name]).dequantize(), expected, rtol=1e-5)


@pytest.mark.parametrize("name", [*BITS, "nf4 per tensor"])
def test_feedback_beats_the_clip_search_and_descent_beats_feedback(name):
    """Of the outputs on correlated inputs; a grouped convolution, and a ragged last block."""
    scheme = Codebook("nf4", "tensor") if name == "nf4 per tensor" else SCHEMES[name]
    torch.manual_seed(2)
    weight, x = weights((12, 4, 3, 3)), torch.randn(3, 400, 36).cumsum(-1) * 0.3 + 0.5
    given = InputMoments(x.mean(1), x.square().mean(1), 400, hessian=x.transpose(1, 2) @ x / 400)

    def error(quantizer):
        change = (quantizer.quantize(weight, scheme, given).dequantize() - weight).reshape(3, -1, 36)
        return (x @ change.transpose(1, 2)).square().sum().item()

    clip, gptq, descent = error(ClipSearch()), error(GPTQ()), error(CoordinateDescent())
    assert gptq < 0.8 * clip
    assert descent <= gptq * 1.001  # of the damped error it is never more


def test_descent_ends_where_no_single_level_helps():
    """Enough sweeps: no other code of any one weight has a smaller error."""
    torch.manual_seed(2)
    weight, x = weights((3, 20)), torch.randn(1, 400, 20).cumsum(-1) * 0.3
    given = InputMoments(x.mean(1), x.square().mean(1), 400, hessian=x.transpose(1, 2) @ x / 400)
    scheme = Codebook("nf4", scale="float32")
    found = CoordinateDescent(n_sweeps=100).quantize(weight, scheme, given)
    codes, scales = scheme.unpacked(found.tensors, (3, 20))
    hessian = GPTQ()._damped(given.hessian)[0]

    def error(codes):
        e = (scheme.table.decode(codes) * scales - weight).double()
        return ((e @ hessian) * e).sum(1)

    least = error(codes)
    for column, code in itertools.product(range(20), range(16)):
        other = codes.clone()
        other[:, column] = code
        assert (error(other) >= least * (1 - 1e-5)).all()


def test_fitted_scales_are_such_as_are_stored():
    scales = torch.tensor([0.0, 3e-9, 0.3, 0.36, 5.0, 500.0])
    for scale in SCALE_DTYPES:
        scheme = Codebook("e2m1", 16, scale)
        stored = scheme.nearest_scale(scales)
        assert torch.equal(scheme.nearest_scale(stored), stored)
    assert Codebook("e2m1", 16, "e8m0").nearest_scale(scales)[2:].tolist() == [0.25, 0.5, 4.0, 512.0]


def test_five_trits_fill_a_byte():
    quantized = NEAREST.quantize(torch.tensor([[-1.0, 0.0, 1.0, 1.0, -1.0, 1.0]]), Codebook("ternary"))
    assert quantized.tensors["codes"].tolist() == [0 + 1 * 3 + 2 * 9 + 2 * 27 + 0 * 81, 2]
    assert quantized.dequantize().tolist() == [[-1.0, 0.0, 1.0, 1.0, -1.0, 1.0]]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"levels": "nf5"}, "There are no levels 'nf5'. Did you mean 'nf4'"),
        ({"levels": "nf4", "group_size": 0}, "'channel' or 'tensor'; got 0"),
        ({"levels": "nf4", "scale": "e5m3"}, "scale must be one of float16, float32, e8m0, e4m3; got 'e5m3'"),
    ],
)
def test_fields_are_checked(arguments, sentence):
    with pytest.raises(InputError, match=sentence):
        Codebook(**arguments)


@pytest.mark.parametrize("quantizer", [NEAREST, ClipSearch(), Percentile()])
def test_what_cannot_be_stored_is_said(quantizer):
    weight = torch.full((2, 4), 1e6)
    with pytest.raises(InputError, match=r"weights up to 1e\+06 a scale exceeds the largest float16"):
        quantizer.quantize(weight, Codebook("nf4"))
    assert torch.allclose(quantizer.quantize(weight, Codebook("nf4", scale="float32")).dequantize(), weight)
    weight[0, 1] = torch.nan
    for scheme in SCHEMES.values():
        with pytest.raises(InputError, match="1 of 8 weights are NaN or infinite"):
            quantizer.quantize(weight, scheme)


def test_descriptions():
    assert SCHEMES["nf4"].describe() == "nf4 levels, float16 scale per 64 weights"
    assert SCHEMES["nvfp4"].describe() == "e2m1 levels with a per-tensor float32 scale, e4m3 scale per 16 weights"
