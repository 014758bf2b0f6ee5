"""Quantized inputs: the codes are those of the kernels, and what a scheme says of its input is what is scored."""

import pytest
import torch
from torch import nn

from mpsearch.allocation import Allocation
from mpsearch.errors import InputError
from mpsearch.kernels import reference
from mpsearch.quantizers.round_to_nearest import RoundToNearest
from mpsearch.schemes.histogram import Histogram
from mpsearch.schemes.input import IntegerInput
from mpsearch.schemes.integer import Integer

A8 = Integer(8, input=IntegerInput())
STATIC = Integer(8, input=IntegerInput(scale="static"))


def test_tokens_have_the_codes_of_the_kernels():
    torch.manual_seed(0)
    x = torch.randn(50, 37) * torch.logspace(-40, 30, 50)[:, None]
    x[3], x[4, 5], x[5, 6] = 0, torch.nan, -torch.inf
    codes, scale = reference.quantize_tokens(x, None, 127, -1)
    ours = IntegerInput().fake_quantize(x, 1)
    assert torch.equal(ours.isnan(), (codes * scale).isnan())
    assert torch.equal(ours.nan_to_num(), (codes * scale).nan_to_num())
    assert ours[[4, 5]].isnan().all()
    assert not ours[[0, 3]].any(), "what is below the smallest normal number is 0"
    step = IntegerInput(scale="static").stored(Histogram.from_values(torch.tensor([-50.0, 3.0])))
    codes, scale = reference.quantize_tokens(x, float(step["input_scale"]), 127, -1)
    ours = IntegerInput(scale="static").fake_quantize(x, 1, step)
    assert torch.equal(ours.nan_to_num(), (codes * scale).nan_to_num())
    assert ours[[4, 5]].isnan().all()


@pytest.mark.parametrize("bits", [*range(2, 9), 12, 16])
def test_the_error_is_half_a_step_at_most(bits):
    torch.manual_seed(bits)
    x = torch.randn(4, 3, 5, 5)
    wanted = IntegerInput(bits)
    ours = wanted.fake_quantize(x, 3)
    step = x.abs().amax((1, 2, 3), keepdim=True) / wanted.largest_code
    assert ((ours - x).abs() <= 0.5001 * step).all()
    assert len(ours[0].unique()) <= 2 * wanted.largest_code + 1
    assert torch.equal(ours[:1], wanted.fake_quantize(x[:1], 3)), "no other sample of the batch counts"
    static = IntegerInput(bits, "static")
    clipped = static.fake_quantize(x, 3, static.stored(Histogram.from_values(torch.tensor([0.5]))))
    assert clipped.abs().max() == pytest.approx(0.5)


@pytest.mark.parametrize("bits", [*range(2, 9), 12, 16])
def test_asymmetric_input_has_half_a_step_of_error_and_an_exact_zero(bits):
    torch.manual_seed(bits)
    for x in (torch.randn(4, 3, 5, 5), torch.rand(4, 3, 5, 5) + 3, -torch.rand(4, 3, 5, 5) - 3):
        x[:, 0, 0, 0] = 0
        wanted = IntegerInput(bits, symmetric=False)
        ours = wanted.fake_quantize(x, 3)
        low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
        step = (high.clamp(min=0) - low.clamp(max=0)) / wanted.largest_code
        assert ((ours - x).abs() <= 0.5001 * step + 1e-6).all()
        assert not ours[x == 0].any()
        assert len(ours[0].unique()) <= wanted.largest_code + 1
        assert torch.equal(ours[:1], wanted.fake_quantize(x[:1], 3)), "no other sample of the batch counts"
        static = IntegerInput(bits, "static", symmetric=False)
        tensors = static.stored(Histogram.from_values(x))
        for sample in x:
            whole = static.fake_quantize(sample, 3, tensors)
            assert ((whole - sample).abs() <= 0.5001 * tensors["input_scale"] + 1e-6).all()


def test_four_bits_behind_a_relu_have_sixteen_codes():
    x = torch.linspace(0, 3, 1000)[None]
    for scale in ("token", "tensor", "static"):
        counts = []
        for symmetric in (True, False):
            wanted = IntegerInput(4, scale, symmetric)
            counts.append(len(wanted.fake_quantize(x, 1, wanted.stored(Histogram.from_values(x))).unique()))
        assert counts == [8, 16]


def test_asymmetric_input_that_is_not_finite_or_tiny():
    for scale in ("token", "tensor"):
        wanted = IntegerInput(6, scale, symmetric=False)
        x = torch.tensor([[1.0, torch.nan], [2.0, torch.inf], [3.0, 1.0], [0.0, 0.0]])
        nan = wanted.fake_quantize(x, 1).isnan().all(1).tolist()
        assert nan == ([True, True, False, False] if scale == "token" else [True] * 4)
    assert not IntegerInput(6, symmetric=False).fake_quantize(torch.full((1, 3), 1e-40), 1).any()
    extreme = torch.tensor([[-3e38, 3e38, 0.0]])
    assert IntegerInput(6, symmetric=False).fake_quantize(extreme, 1)[0, 1] == pytest.approx(3e38, rel=0.02)


def test_one_scale_for_the_tensor_is_that_of_its_largest_value():
    x = torch.tensor([[1.0, 0.3], [100.0, 0.4]])
    ours = IntegerInput(8, "tensor").fake_quantize(x, 1)
    assert ours.flatten().tolist() == pytest.approx([100 / 127, 0, 100, 100 / 127])
    assert torch.equal(ours, IntegerInput(8).fake_quantize(x.flatten(), 1).reshape(x.shape))


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_stored_of_a_static_range_is_counted(bits, symmetric):
    scheme = Integer(4, input=IntegerInput(bits, "static", symmetric))
    quantized = RoundToNearest().quantize(torch.randn(6, 9), scheme)
    assert quantized.nbytes * 8 == scheme.storage_bits((6, 9))
    names = {"input_scale"} | (set() if symmetric else {"input_zero_point"})
    assert set(quantized.input_params) == names
    assert scheme.storage_bits((6, 9)) - Integer(4).storage_bits((6, 9)) == 32 + (0 if symmetric else 8 if bits <= 8 else 32)


@pytest.mark.parametrize("range", ["minmax", "percentile", "mse", "entropy"])
def test_the_range_is_that_of_the_layer_s_input(tiny, range):
    wanted = IntegerInput(4, "static", symmetric=False, range=range)
    engine = tiny.engine(tiny.net(), tiny.task(), {"s": Integer(8, input=wanted)})
    seen = []
    hook = engine.model.second.register_forward_hook(lambda _, args, output: seen.append(args[0]))
    with torch.no_grad():
        for inputs, _ in engine.batches("calibration"):
            engine.model(inputs)
    hook.remove()
    x = torch.cat(seen)
    assert engine.quantized("second", "s").input_params == wanted.stored(Histogram.from_values(x))
    assert engine.quantized("second", "s").input_params["input_zero_point"] == 0, "it comes from a ReLU"
    assert engine.score(engine.space.uniform("s")).loss > 0


def test_calibration_that_gives_no_range_is_refused(tiny):
    net = nn.Sequential(nn.Flatten(), nn.Linear(72, 6), nn.ReLU(), nn.Linear(6, 5)).eval()
    nn.init.constant_(net[1].bias, -1e6)
    engine = tiny.engine(net, tiny.task(), {"a": A8, "s": STATIC})
    assert engine.score(engine.space.uniform("a")).loss == 0
    with pytest.raises(InputError, match=r"Layer '3' in scheme 's': its input is 0 in all of the calibration data"):
        engine.score(engine.space.uniform("s"))
    task, net = tiny.task(shape=(8,)), nn.Sequential(nn.Linear(8, 5)).eval()
    task.batches("calibration")[0][0][0, 0] = torch.nan
    with pytest.raises(InputError, match="make NaN or infinite inputs of layer '0'"):
        tiny.engine(net, task)


def test_one_sample_calibrates(tiny):
    engine = tiny.engine(tiny.net(), tiny.task(n=1), {"s": Integer(8, input=IntegerInput(8, "static", False, "entropy"))})
    assert engine.score(engine.space.uniform("s")).loss < 0.1


def test_what_is_scored_has_its_input_quantized(tiny):
    net, task = tiny.net(), tiny.task()
    engine = tiny.engine(net, task, {"w8": Integer(8), "w8a8": A8, "w8a8s": STATIC}, bias_correction=False)
    before, hooks = tiny.state(net), dict(net.last._forward_pre_hooks)
    inputs, _ = engine.batches("search")[0]
    with torch.no_grad(), engine.applied(Allocation({"second": "w8a8", "last": "w8a8s"})):
        ours = net(inputs)
        assert len(net.last._forward_pre_hooks) == 1
    with torch.no_grad():
        x = IntegerInput().fake_quantize(torch.relu(net.first(inputs)), 3)
        weights = {name: engine.quantized(name, scheme) for name, scheme in (("second", "w8a8"), ("last", "w8a8s"))}
        x = torch.relu(net.norm(torch.conv2d(x, weights["second"].dequantize(), stride=2, groups=2)))
        scale = weights["last"].input_params["input_scale"]
        assert scale == pytest.approx(engine.moments["last"].histogram.high / 127)
        codes = (x.mean((2, 3)) / scale).round().clamp(-127, 127)
        expected = codes * scale @ weights["last"].dequantize().T + net.last.bias
    assert torch.allclose(ours, expected, rtol=1e-5, atol=1e-5)
    assert dict(net.last._forward_pre_hooks) == hooks
    tiny.assert_same_state(net, before)
    losses = [engine.score(engine.space.uniform(name)).loss for name in ("w8", "w8a8", "w8a8s")]
    assert len(set(losses)) == 3


def test_fisher_sees_the_input(tiny):
    from mpsearch.metrics.fisher import Fisher

    coarse = Integer(8, input=IntegerInput(bits=2))
    engine = tiny.engine(tiny.net(), tiny.task(), {"w8": Integer(8), "w8a8": A8, "w8a2": coarse})
    fine, middle, worst = Fisher().measure(engine, [("last", name) for name in ("w8", "w8a8", "w8a2")])
    assert fine < middle < worst


def test_an_embedding_keeps_its_input(tiny):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 8), nn.Linear(8, 5)

        def forward(self, x):
            return self.head(self.embed((x[:, 0].abs() * 10).long() % 5))

    engine = tiny.engine(Net().eval(), tiny.task(shape=(2,)), {"a": A8, "s": STATIC})
    assert engine.score(engine.space.uniform("s")).loss > 0
    assert engine.quantized("embed", "s").nbytes * 8 == STATIC.storage_bits((5, 8))


class Own(nn.Linear):
    """Changes its weight first, so that calibration sees no product of it."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight * 2, self.bias)


def test_a_static_scale_needs_calibration(tiny):
    net = nn.Sequential(nn.Flatten(), Own(72, 5)).eval()
    engine = tiny.engine(net, tiny.task(), {"a": A8, "s": STATIC})
    assert engine.score(engine.space.uniform("a")).loss > 0
    with pytest.raises(InputError, match=r"Layer '1' in scheme 's': its input was not calibrated"):
        engine.score(engine.space.uniform("s"))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"bits": 17}, "input.bits must be an integer from 2 to 16; got 17. Give input=null"),
        ({"symmetric": "no"}, "input.symmetric must be true or false; got 'no'"),
        ({"scale": "static", "range": "max"}, "input.range must be one of minmax, percentile, mse, entropy; got 'max'"),
        ({"range": "mse"}, "input.range=mse is found by calibration, but input.scale=token finds its range at run time"),
        ({"scale": "batch"}, "input.scale must be one of token, tensor, static; got 'batch'"),
        ({"width": 8}, "input takes bits, scale, symmetric, range; got width"),
        (8, "input must be null, or bits and scale"),
    ],
)
def test_what_an_input_may_be(fields, sentence):
    with pytest.raises(InputError, match=sentence):
        Integer(8, input=fields)
