"""Changes to a model are undone, whatever happens while they last."""

import pytest
import torch
from torch import nn

from mpsearch.graph.surgery import hooked, intercepted, quantize_input, replace_module, snapshot, swapped_data
from mpsearch.quantizers.round_to_nearest import RoundToNearest
from mpsearch.schemes.input import IntegerInput
from mpsearch.schemes.integer import Integer


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


X = torch.linspace(-1, 1, 12).reshape(3, 4)


def fail_within(block):
    with block:
        raise KeyError("inside")


def test_swapped_data(net, tiny):
    before, bias = tiny.state(net), net[0].bias
    with swapped_data([(bias, torch.ones(4)), (bias, torch.zeros(4))]):
        assert net[0].bias is bias
        assert not bias.any(), "the last of the repeated"
    tiny.assert_same_state(net, before)
    with pytest.raises(KeyError, match="inside"):
        fail_within(swapped_data([(bias, torch.ones(4))]))
    tiny.assert_same_state(net, before)


def test_hooks_see_and_change_a_call(net):
    expected, seen = net(2 * X + 1), []
    with hooked(
        [(net[0], lambda module, args, kwargs: ((2 * args[0],), kwargs)), (net[0], lambda *call: ((call[1][0] + 1,), call[2]))],
        [(net[2], lambda module, args, kwargs, output: seen.append(output))],
    ):
        assert torch.equal(net(X), expected)
    assert torch.equal(seen[0], expected)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in net)


def test_inputs_are_quantized_by_position_and_by_name(net):
    weight = RoundToNearest().quantize(net[0].weight.detach(), Integer(8, input=IntegerInput(2)))
    plain = net[0](X)
    undo = quantize_input(net[0], weight)
    assert torch.equal(net[0](X), net[0](input=X))
    assert not torch.equal(net[0](X), plain)
    undo()
    assert torch.equal(net[0](X), plain)


def test_a_replaced_module_comes_back(net):
    relu = net[1]
    undo = replace_module(net, "1", nn.Identity())
    assert isinstance(net[1], nn.Identity)
    undo()
    assert net[1] is relu


def test_a_snapshot_restores_class_attributes_and_parameters_in_order(net, tiny):
    layer, before = net[0], tiny.state(net)
    undo = snapshot(layer)
    del layer.weight
    layer.weight = torch.zeros(4, 4)
    layer.register_buffer("extra", torch.ones(1))
    layer.__class__ = type("Other", (nn.Linear,), {})
    layer.in_features = 7
    undo()
    tiny.assert_same_state(net, before)
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert (type(layer), layer.in_features) == (nn.Linear, 4)


def test_an_intercepted_call_is_the_next_one_only(net):
    expected = net(X)
    with intercepted({net[0]: lambda x: X * 0}):
        assert not torch.equal(net(X), expected)
        assert torch.equal(net(X), expected)
    with pytest.raises(KeyError, match="inside"):
        fail_within(intercepted({net[0]: lambda x: X * 0}))
    assert torch.equal(net(X), expected)
