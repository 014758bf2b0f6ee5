"""Quantized inputs: the codes are those of the kernels, and what a scheme says of its input is what is scored."""

import pytest
import torch
from torch import nn

from mpsearch.allocation import Allocation
from mpsearch.errors import InputError
from mpsearch.kernels import reference
from mpsearch.schemes.histogram import Histogram
from mpsearch.schemes.input import IntegerInput
from mpsearch.schemes.integer import Integer

A8 = Integer(8, input=IntegerInput())
STATIC = Integer(8, input=IntegerInput(scale="static"))


def test_tokens_have_the_codes_of_the_kernels():
    torch.manual_seed(0)
    x = torch.randn(50, 37) * torch.logspace(-40, 30, 50)[:, None]
    x[3], x[4, 5], x[5, 6] = 0, torch.nan, -torch.inf
    codes, scale = reference.quantize_tokens(x, None)
    ours = IntegerInput().fake_quantize(x, 1)
    assert torch.equal(ours.isnan(), (codes * scale).isnan())
    assert torch.equal(ours.nan_to_num(), (codes * scale).nan_to_num())
    assert ours[[4, 5]].isnan().all()
    assert not ours[[0, 3]].any(), "what is below the smallest normal number is 0"
    step = IntegerInput(scale="static").stored(Histogram.of(torch.tensor([-50.0, 3.0])))
    codes, scale = reference.quantize_tokens(x, float(step["input_scale"]))
    ours = IntegerInput(scale="static").fake_quantize(x, 1, step)
    assert torch.equal(ours.nan_to_num(), (codes * scale).nan_to_num())
    assert ours[[4, 5]].isnan().all()


@pytest.mark.parametrize("bits", range(2, 9))
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
    clipped = static.fake_quantize(x, 3, static.stored(Histogram.of(torch.tensor([0.5]))))
    assert clipped.abs().max() == pytest.approx(0.5)


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
        scale = weights["last"].of_input["input_scale"]
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
    def forward(self, x):
        return super().forward(x) * 2


def test_a_static_scale_needs_calibration(tiny):
    net = nn.Sequential(nn.Flatten(), Own(72, 5)).eval()
    engine = tiny.engine(net, tiny.task(), {"a": A8, "s": STATIC})
    assert engine.score(engine.space.uniform("a")).loss > 0
    with pytest.raises(InputError, match=r"Layer '1' in scheme 's': its input was not calibrated"):
        engine.score(engine.space.uniform("s"))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"bits": 17}, "A quantized input has 2 to 16 bits; input.bits=17 came"),
        ({"scale": "batch"}, "input.scale is one of token, tensor, static; 'batch' came"),
        ({"width": 8}, "input takes bits, scale, symmetric, range; width came"),
        (8, "input is null, or bits and scale"),
    ],
)
def test_what_an_input_may_be(fields, sentence):
    with pytest.raises(InputError, match=sentence):
        Integer(8, input=fields)
