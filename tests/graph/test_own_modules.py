"""Models, schemes and layouts of the user's own: what runs or is stored in another way than ours is handled as it is."""

import dataclasses

import torch
from torch import nn

from mpsearch.allocation import Allocation, SearchSpace
from mpsearch.engine.calibrate import calibrate
from mpsearch.engine.scoring import load_batches
from mpsearch.graph.trace import trace_layers
from mpsearch.layer import from_rows, weight_rows
from mpsearch.schemes.base import QuantizedTensor, QuantScheme, scheme_from_fields
from mpsearch.schemes.floating import Float
from mpsearch.schemes.integer import Integer


@dataclasses.dataclass(frozen=True)
class Halved(QuantScheme):
    """A scheme that is not in our registry: float16 of half the weight."""

    weight_bits = 16

    def layout(self, shape):
        return {"halves": (torch.float16, shape)}

    def quantize(self, weight, codes, importance, seen=None):
        return QuantizedTensor(self, tuple(weight.shape), {"halves": (weight / 2).half()})

    def dequantize(self, tensors, shape):
        return 2 * tensors["halves"].float().reshape(shape)

    def describe(self):
        return "half the weight in float16"


class Scaled(nn.Linear):
    """Runs a forward of its own."""

    def forward(self, x):
        return nn.functional.linear(x, 0.05 * self.weight, self.bias)


def test_a_scheme_of_ones_own_is_quantized_and_read_again(tiny):
    engine = tiny.engine(tiny.net(), tiny.task(), {"halved": Halved(), "w8": Integer(8)})
    assert engine.score(engine.space.uniform("halved")).loss < 1e-3
    assert scheme_from_fields(Halved().fields()) == Halved()


def test_a_module_with_a_forward_of_its_own_is_not_corrected(tiny):
    """Its output is not W x + b, so that the shift of its mean is not that of dW E[x]."""
    torch.manual_seed(0)
    model, task = nn.Sequential(Scaled(8, 6), nn.ReLU(), nn.Linear(6, 4)).eval(), tiny.task(shape=(8,))
    engine = tiny.engine(model, task)
    assert engine.biases("0", "w2") == {}
    assert set(engine.biases("2", "w2")) == {"2"}


def test_a_layer_may_be_called_by_keyword(tiny):
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x):
            return self.layer(input=x)

    model, task = Keyword().eval(), tiny.task(shape=(8,))
    inputs = task.batches("calibration")[0][0]
    layers = trace_layers(model, task.forward, inputs)
    found = calibrate(model, task, layers, load_batches(task, "calibration", "cpu"))
    expected = torch.cat([x for x, _ in task.batches("calibration")]).mean(0)
    assert torch.allclose(found["layer"].mean[0], expected, atol=1e-6)


def test_weights_are_swapped_in_their_own_memory_format(tiny):
    """Another format runs other kernels, and scores other last bits than the exported model."""
    model, task = tiny.net().to(memory_format=torch.channels_last), tiny.task()
    engine = tiny.engine(model, task)
    conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    stride = conv.weight.stride()
    with engine.applied(engine.space.uniform("w2")):
        assert conv.weight.stride() == stride
        assert torch.equal(from_rows(conv, weight_rows(conv)), conv.weight)


def test_uniform_is_the_scheme_itself_where_others_weigh_the_same(tiny):
    space = tiny.engine(tiny.net(), tiny.task(), {"fp16": Float("float16"), "bf16": Float("bfloat16")}).space
    assert isinstance(space, SearchSpace)
    for scheme in ("fp16", "bf16"):
        assert space.uniform(scheme) == Allocation(dict.fromkeys(space.names, scheme))
