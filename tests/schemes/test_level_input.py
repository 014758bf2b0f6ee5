"""Inputs in FP8, MX and NVFP4: bit for bit the casts of torch and ml_dtypes, the standards' scales, and what they cost."""

import json
import math

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from mpsearch.allocation import SearchSpace
from mpsearch.costs.activation_bytes import ActivationBytes
from mpsearch.costs.bit_operations import BitOperations
from mpsearch.costs.millijoules import FLOAT_MAC, Millijoules
from mpsearch.errors import InputError
from mpsearch.layer import Activations, LayerSpec
from mpsearch.packed.layers import kernel_for
from mpsearch.quantizers.round_to_nearest import RoundToNearest
from mpsearch.schemes.base import scheme_from_fields
from mpsearch.schemes.codebook import Codebook
from mpsearch.schemes.histogram import Histogram
from mpsearch.schemes.integer import Integer
from mpsearch.schemes.level_input import LevelInput
from mpsearch.schemes.rotated import Rotated

TORCH = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
FLOATS = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}


def awkward(shape, seed=0):
    """Over many magnitudes, a token of zeros, one that is next to nothing."""
    torch.manual_seed(seed)
    magnitudes = torch.logspace(-20, 20, shape[0]).reshape(-1, *(1 for _ in shape[1:]))
    x = torch.randn(shape) * torch.rand(shape).mul(12).sub(8).exp2() * magnitudes
    x[1], x[2] = 0.0, x[2] * 0 + 1e-41
    return x


def cast(x, scale, levels):
    """As torch casts."""
    steps = (x / scale).clamp(-torch.finfo(TORCH[levels]).max, torch.finfo(TORCH[levels]).max)
    return steps.to(TORCH[levels]).float() * scale


@pytest.mark.parametrize("levels", TORCH)
def test_fp8_is_the_cast_of_torch(levels):
    largest = torch.finfo(TORCH[levels]).max
    x = awkward((6, 70))
    ours = LevelInput(levels).fake_quantize(x, 1)
    scale = x.abs().amax(1, keepdim=True) / largest
    normal = [0, 3, 4, 5]
    assert torch.equal(ours[normal], cast(x, scale, levels)[normal])
    assert not ours[[1, 2]].any()
    feature_maps = awkward((4, 3, 5, 2))
    scale = feature_maps[3].abs().max() / largest
    assert torch.equal(LevelInput(levels).fake_quantize(feature_maps, 3)[3], cast(feature_maps[3], scale, levels))
    assert torch.equal(LevelInput(levels, "tensor").fake_quantize(x, 1), cast(x, x.abs().max() / largest, levels))
    static = LevelInput(levels, "static")
    tensors = static.stored(Histogram.from_values(torch.tensor([-3.0, 1.0])))
    x = torch.randn(5, 40) * 3
    assert tensors["input_scale"] == torch.tensor(3.0) / largest
    assert torch.equal(static.fake_quantize(x, 1, tensors), cast(x, tensors["input_scale"], levels))
    assert static.fake_quantize(x, 1, tensors).abs().max() == pytest.approx(3.0), "what lies beyond saturates"


@pytest.mark.parametrize("levels", FLOATS)
def test_mx_is_what_the_standard_says(levels):
    """MX v1.0, section 6.3, in numpy: X = 2^(floor(log2(max|V|)) - emax), V/X rounded to nearest even, saturated."""
    x = awkward((6, 70))  # two blocks and a ragged one
    ours = LevelInput(levels, "mx").fake_quantize(x, 1).numpy()
    table = LevelInput(levels).table
    for row, begin in ((row, begin) for row in range(6) for begin in (0, 32, 64)):
        v = x[row, begin : begin + 32].numpy().astype(np.float64)
        largest = np.abs(v).max()
        exponent = max(math.floor(math.log2(largest)) - table.exponent, -127) if largest else -127
        element = np.clip(v / 2.0**exponent, -table.largest, table.largest).astype(np.float32).astype(FLOATS[levels])
        expected = element.astype(np.float64) * 2.0**exponent
        assert np.array_equal(ours[row, begin : begin + 32].astype(np.float64), expected)
    assert torch.equal(torch.from_numpy(ours), RoundToNearest().quantize(x, Codebook(levels, 32, "e8m0")).dequantize())


def test_nvfp4_is_that_of_a_weight():
    """With the same tensor scale; an input's is the largest magnitude in the calibration data over 6 x 448."""
    x = awkward((6, 40))[3:]
    nv = LevelInput("e2m1", "nv")
    weight = RoundToNearest().quantize(x, Codebook("e2m1", 16, "e4m3"))
    same = {"input_scale": weight.tensors["tensor_scale"]}
    assert torch.equal(nv.fake_quantize(x, 1, same), weight.dequantize())
    tensors = nv.stored(Histogram.from_values(x))
    assert tensors["input_scale"] == pytest.approx(x.abs().max().item() / (6 * 448))
    beyond = nv.fake_quantize(1e6 * x, 1, tensors).abs().max()
    assert beyond == pytest.approx(x.abs().max().item(), rel=1e-5), "what lies beyond saturates"


def test_blocks_of_a_convolution_are_channels_at_one_position():
    x = torch.randn(2, 70, 3, 4)
    rows = x.permute(0, 2, 3, 1).reshape(-1, 70)
    for wanted in (LevelInput("e4m3", "mx"), LevelInput("e2m1", "nv")):
        tensors = wanted.stored(Histogram.from_values(x))
        expected = wanted.fake_quantize(rows, 1, tensors).reshape(2, 3, 4, 70).permute(0, 3, 1, 2)
        assert torch.equal(wanted.fake_quantize(x, 3, tensors), expected)


@pytest.mark.parametrize("scale", ["token", "tensor", "static", "mx", "nv"])
def test_what_is_not_finite_becomes_nan_and_the_input_is_left_alone(scale):
    wanted = LevelInput("e4m3", scale)
    x = torch.ones(4, 40)
    x[1, 3], x[2, 35] = torch.nan, -torch.inf
    before = x.clone()
    found = wanted.fake_quantize(x, 1, wanted.stored(None)).isnan()
    assert found[1, 3]
    assert found[2, 35]
    assert found[[0, 3]].any() == (scale == "tensor")
    assert torch.equal(x.nan_to_num(), before.nan_to_num())
    assert wanted.fake_quantize(torch.zeros(0, 40), 1, wanted.stored(None)).shape == (0, 40)


@pytest.mark.parametrize(("scale", "stored"), [("token", 0), ("static", 32), ("mx", 0), ("nv", 32)])
def test_what_is_stored_is_counted_and_comes_back(scale, stored):
    for weight in (Codebook("e4m3", 32, "e8m0"), Integer(4)):
        scheme = type(weight)(**{**vars(weight), "input": {"levels": "e4m3", "scale": scale}})
        assert scheme.input == LevelInput("e4m3", scale)
        assert scheme.storage_bits((6, 40)) - weight.storage_bits((6, 40)) == stored
        for of in (scheme, Rotated(scheme)):
            assert 8 * RoundToNearest().quantize(torch.randn(6, 40), of).nbytes == of.storage_bits((6, 40))
            assert scheme_from_fields(json.loads(json.dumps(of.fields()))) == of
        assert (scheme.weight_bits, scheme.input_bits) == (weight.weight_bits, 8)
        assert kernel_for("linear", (6, 40), scheme) is None
        assert scheme.describe().endswith(scheme.input.describe())


def test_costs():
    """Ten tokens of 40 values: a byte each, and a float32 scale a token or a byte a block."""
    activations = Activations(live=9000, without_input=5000, values=400, tokens=10, until_next=100)
    layer = LayerSpec("fc", "linear", (8, 40), 3200, "fc", ("fc",), activations)
    inputs = {
        "fp8": LevelInput(),
        "mx": LevelInput("e4m3", "mx"),
        "nv": LevelInput("e2m1", "nv"),
        "t": LevelInput("e5m2", "tensor"),
    }
    space = SearchSpace.build([layer], {name: Codebook("e2m1", 32, "e8m0", of) for name, of in inputs.items()})
    peaks = [5000 + 400 + 40, 5000 + 400 + 20, 5000 + 200 + 30, 5000 + 400]
    assert ActivationBytes().table(space).values.tolist() == [peaks]
    assert BitOperations().table(space).values.tolist() == [[3200 * 4 * 8, 3200 * 4 * 8, 3200 * 4 * 4, 3200 * 4 * 8]]
    assert (Millijoules().table(space).values[0] >= 1e-9 * 3200 * FLOAT_MAC).all()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"levels": "nf4"}, "input.levels must be one of e2m1, e2m3, e3m2, e4m3, e5m2, int8; got 'nf4'"),
        ({"levels": "e4m3", "scale": "channel"}, "input.scale must be one of token, tensor, static, mx, nv; got 'channel'"),
        ({"levels": "e4m3", "bits": 8}, "input takes levels, scale; got bits"),
        ("fp8", r"or levels and scale: \{levels: e4m3, scale: token\}; got 'fp8'"),
    ],
)
def test_what_an_input_may_be(fields, sentence):
    with pytest.raises(InputError, match=sentence):
        Codebook("e4m3", input=fields)


def test_a_static_scale_needs_calibration_that_is_not_all_0(tiny):
    net = nn.Sequential(nn.Flatten(), nn.Linear(72, 6), nn.ReLU(), nn.Linear(6, 5)).eval()
    nn.init.constant_(net[1].bias, -1e6)
    engine = tiny.engine(net, tiny.task(), {"s": Codebook("e4m3", input={"levels": "e4m3", "scale": "static"})})
    with pytest.raises(InputError, match=r"Layer '3' in scheme 's': its input is 0 in all of the calibration data"):
        engine.score(engine.space.uniform("s"))
