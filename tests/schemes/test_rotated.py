"""Rotated schemes: the same function of x, bytes as without, moments of what is multiplied, and Linear layers alone."""

import copy
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from mpsearch import kernels
from mpsearch.allocation import SearchSpace
from mpsearch.costs.activation_bytes import ActivationBytes
from mpsearch.costs.bit_operations import BitOperations
from mpsearch.costs.millijoules import FLOAT_ADDITION, PICOJOULES, Millijoules
from mpsearch.engine.calibrate import calibrate, hessians
from mpsearch.engine.scoring import load_batches
from mpsearch.errors import InputError
from mpsearch.graph.trace import trace_layers
from mpsearch.layer import Activations, LayerSpec
from mpsearch.packed.layers import PackedLinear, kernel_for
from mpsearch.packed.model import QuantizedLayer, pack, quantized_layers
from mpsearch.quantizers.clip_search import ClipSearch
from mpsearch.quantizers.coordinate_descent import CoordinateDescent
from mpsearch.quantizers.round_to_nearest import RoundToNearest
from mpsearch.schemes.base import scheme_from_fields
from mpsearch.schemes.codebook import Codebook
from mpsearch.schemes.floating import Float
from mpsearch.schemes.histogram import Histogram
from mpsearch.schemes.integer import Integer
from mpsearch.schemes.outliers import Outliers
from mpsearch.schemes.rotated import Rotated

DENSE = [Integer(4), Integer(3, 16, symmetric=False), Integer(8, "tensor"), Codebook("nf4", 16), Codebook("e2m1", 16, "e4m3")]
A8 = {"bits": 8}
STATIC = {"bits": 8, "scale": "static", "symmetric": False, "range": "mse"}


@pytest.mark.parametrize("dense", DENSE, ids=str)
@pytest.mark.parametrize("shape", [(5, 33), (1, 7), (6, 64), (7,), (0, 5)])
def test_the_rotated_weight_is_what_is_stored(dense, shape):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    quantized = RoundToNearest().quantize(weight, Rotated(dense))
    assert 8 * quantized.nbytes == Rotated(dense).storage_bits(shape) == dense.storage_bits(shape)
    turned = weight if len(shape) == 1 else kernels.rotate(weight)
    plain = RoundToNearest().quantize(turned, dense)
    assert all(torch.equal(tensor, plain.tensors[name]) for name, tensor in quantized.tensors.items())
    if weight.dim() > 1:
        x = torch.randn(4, shape[1])
        ours, expected = x @ quantized.dequantize().T, kernels.rotate(x) @ plain.dequantize().T
        assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-5)


def test_a_weight_that_stands_out_costs_less():
    """One column of 20 sigma makes the range of every row."""
    torch.manual_seed(0)
    weight = torch.randn(32, 256)
    weight[:, 5] *= 20
    plain, rotated = ((q.dequantize() - weight).square().sum() for q in (RoundToNearest().quantize(weight, s) for s in PAIR))
    assert rotated < plain / 5


PAIR = Integer(4), Rotated(Integer(4))


def wide(n_in=24):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(n_in, 24), nn.GELU(), nn.Linear(24, 5)).eval()


def test_calibration_sees_the_rotated_input(tiny):
    net, task = wide(), tiny.task(shape=(24,))
    layers = trace_layers(net, task.forward, task.batches("calibration")[0][0])
    batches = load_batches(task, "calibration", "cpu")
    moments = calibrate(net, task, layers, batches, rotated=True)
    assert calibrate(net, task, layers, batches)["1"].rotated is None
    x = torch.cat([inputs for inputs, _ in batches])
    y = kernels.rotate(x)
    found = moments["1"].for_scheme(Rotated(Integer(4)))
    assert torch.allclose(found.mean[0], y.mean(0), atol=1e-5)
    assert torch.allclose(found.second_moment[0], y.square().mean(0), rtol=1e-4)
    assert torch.equal(found.histogram.counts, Histogram.from_values(y).counts)
    assert moments["1"].for_scheme(Integer(4)) is moments["1"]
    with_hessian = replace(moments["1"], hessian=hessians(net, task, ["1"], batches)["1"])
    for given, data in ((with_hessian, y), (with_hessian.centred(), y - y.mean(0))):
        hessian = given.for_scheme(Rotated(Integer(4))).hessian
        assert torch.allclose(hessian[0], data.T @ data / len(data), atol=1e-4)
        assert torch.allclose(hessian[0].diagonal(), given.for_scheme(Rotated(Integer(4))).second_moment[0], atol=1e-4)
    with pytest.raises(InputError, match=r"rotated input are not known\. Calibrate with rotated=True"):
        ClipSearch().quantize(net[1].weight.detach(), Rotated(Integer(4)), calibrate(net, task, layers, batches)["1"])


@pytest.mark.parametrize("quantizer", [ClipSearch(), CoordinateDescent()], ids=lambda q: type(q).__name__)
def test_the_error_of_the_output_is_what_is_made_least(tiny, quantizer):
    """By its own rotated moments no worse than by the moments of the input as it came."""
    net, task = wide(64), tiny.task(shape=(64,), n=200)
    with torch.no_grad():
        for inputs, _ in task.batches("calibration"):
            inputs[:, ::7] *= 6
    engine = tiny.engine(net, task, {"r": Rotated(Integer(3))}, quantizer=quantizer, bias_correction=False)
    x = torch.cat([inputs for inputs, _ in engine.batches("calibration")])

    def error(weight):
        return (x @ (weight - net[1].weight.detach()).T).square().mean().item()

    found = error(engine.quantized("1", "r").dequantize())
    assert found < error(RoundToNearest().quantize(net[1].weight.detach(), Rotated(Integer(3))).dequantize())


PACKED = [Integer(4), Integer(4, 5, False, input=A8), Integer(5, input=STATIC), Integer(4, input={"bits": 4})]


@pytest.mark.parametrize("dense", PACKED, ids=str)
def test_packed_rotates_and_agrees(tiny, dense):
    net, task = wide(), tiny.task(shape=(24,))
    engine = tiny.engine(net, task, {"r": Rotated(dense)})
    x, _ = engine.batches("search")[0]
    with torch.no_grad(), engine.applied(engine.space.uniform("r")) as model:
        simulated = model(x)
    model = pack(copy.deepcopy(net), quantized_layers(engine, engine.space.uniform("r")))
    runs = kernel_for("linear", (24, 24), dense) is not None
    assert isinstance(model[1], PackedLinear) == runs
    assert torch.allclose(model(x), simulated, atol=(2e-2 if dense.input else 1e-5) * simulated.abs().max().item())
    if runs:
        assert torch.equal(model[1].weight, engine.quantized("1", "r").dequantize())


def test_the_packed_input_is_the_rotated_one():
    """Against the plain layer of the rotated weight, given the rotated input: the same bits."""
    torch.manual_seed(0)
    layer, x = nn.Linear(40, 7).eval(), torch.randn(6, 40)
    for dense in (Integer(4), Integer(4, input=A8)):
        weight = RoundToNearest().quantize(layer.weight.detach(), Rotated(dense))
        rotated = RoundToNearest().quantize(kernels.rotate(layer.weight.detach()), dense)
        layers = [QuantizedLayer("linear", ("0",), of) for of in (weight, rotated)]
        ours, plain = (pack(nn.Sequential(copy.deepcopy(layer)), [of]) for of in layers)
        assert torch.equal(ours(x), plain(kernels.rotate(x)))


def spec(kind, shape, macs, **activations):
    return LayerSpec(kind, kind, shape, macs, kind, (kind,), Activations(**activations) if activations else None)


def test_the_rotation_is_paid_for():
    """Ten tokens of 384 columns: 256 x 8 + 128 x 7 additions each, of 32 bits."""
    layer = spec("linear", (64, 384), 10 * 64 * 384, live=9000, without_input=5000, values=3840, tokens=10, until_next=100)
    schemes = {"w4": Integer(4), "w4r": Rotated(Integer(4)), "w4a8": Integer(4, input=A8), "w4a8r": Rotated(Integer(4, input=A8))}
    space = SearchSpace.build([layer], schemes)
    additions = 10 * (256 * 8 + 128 * 7)
    plain, rotated, plain8, rotated8 = BitOperations().table(space).values[0]
    assert rotated - plain == rotated8 - plain8 == 32 * additions
    assert plain8 == 10 * 64 * 384 * 4 * 8
    energy = Millijoules().table(space).values[0]
    assert np.allclose(np.diff(energy)[[0, 2]], additions * FLOAT_ADDITION / PICOJOULES)
    assert ActivationBytes().table(space).values[0].tolist() == [9000, 5000 + 4 * 3840, 5000 + 3840 + 40, 5000 + 3840 + 40]


def test_only_linear_layers_are_rotated():
    layers = [spec("conv2d", (8, 3, 3, 3), 1000), spec("linear", (8, 72), 1000), spec("embedding", (9, 8), 0)]
    space = SearchSpace.build(layers, {"w4": Integer(4), "w4r": Rotated(Integer(4))})
    assert space.choices == (("w4",), ("w4", "w4r"), ("w4",))
    assert dict(space.uniform("w4r")) == {"conv2d": "w4", "linear": "w4r", "embedding": "w4"}
    message = r"Layer 'conv2d' \(conv2d\) cannot be stored in any of w4r: only Linear layers can be rotated"
    with pytest.raises(InputError, match=message):
        SearchSpace.build(layers, {"w4": Integer(4), "w4r": Rotated(Integer(4))}, ["conv2d:w4r"])
    assert kernel_for("embedding", (9, 8), Rotated(Integer(4))) is None


def test_fields_come_back():
    for dense in (*DENSE, Integer(4, input=STATIC)):
        scheme = Rotated(dense)
        assert scheme_from_fields(json.loads(json.dumps(scheme.fields()))) == scheme
    assert scheme.describe().startswith("rotated 4-bit integer")
    assert (scheme.weight_bits, scheme.input_bits, scheme.input_format.has_static_scale) == (4, 8, True)
    assert scheme.input_format.describe() == "rotated 8-bit asymmetric input, static scale (mse)"
    for wrong in (Float("float16"), Outliers(Integer(4)), 4):
        with pytest.raises(InputError, match="dense must be an Integer or a Codebook"):
            Rotated(wrong)


def test_error_falls_with_bits():
    weight = torch.randn(8, 48)
    for quantizer in (RoundToNearest(), ClipSearch(20), CoordinateDescent()):
        errors = [(quantizer.quantize(weight, Rotated(Integer(b))).dequantize() - weight).square().sum() for b in range(2, 9)]
        assert all(b < a for a, b in itertools.pairwise(errors))
