"""What is in memory when, against sums done by hand."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mpsearch.allocation import SearchSpace
from mpsearch.graph.activation_memory import measure_activations
from mpsearch.graph.sharing import share
from mpsearch.graph.trace import trace_layers
from mpsearch.layer import Activations
from mpsearch.runs.space_json import read_space
from mpsearch.schemes.integer import Integer


def call(model, inputs):
    return model(inputs)


def measured(model, inputs, ties=()):
    layers = share(trace_layers(model, call, inputs), ties)
    return {layer.name: layer.activations for layer in measure_activations(model, call, inputs, layers)}


@pytest.mark.parametrize("inplace", [False, True])
def test_a_chain_holds_input_and_output_and_relu_writes_over_its_input(inplace):
    model = nn.Sequential(nn.Linear(10, 50), nn.ReLU(inplace), nn.Linear(50, 20), nn.ReLU(inplace), nn.Linear(20, 30))
    found = measured(model, torch.randn(1, 10))
    assert found["0"] == Activations(4 * (10 + 50), 4 * 50, 10, 1, 4 * 50)
    assert found["2"] == Activations(4 * (50 + 20), 4 * 20, 50, 1, 4 * 20)
    assert found["4"] == Activations(4 * (20 + 30), 4 * 30, 20, 1, 0)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.register_buffer("scale", torch.ones(1000))

    def forward(self, x):
        y = F.relu(self.conv1(x))
        y = self.conv2(y)
        return F.softmax((x + y).flatten(1) * self.scale[:1], -1)


def test_what_an_addition_reads_later_stays():
    n = 4 * 4 * 5 * 5
    found = measured(Residual(), torch.randn(1, 4, 5, 5))
    assert found["conv1"] == Activations(2 * n, 2 * n, 100, 1, 2 * n), "its input is read again, so that nothing is saved"
    assert found["conv2"] == Activations(3 * n, 2 * n, 100, 1, 2 * n), "with the input of the block"


class Attention(nn.Module):
    """[1, 6, 8]: q, k and v read one input."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8, bias=False) for _ in range(4))

    def forward(self, ids):
        x = self.embed(ids)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.o_proj((q @ k.mT).softmax(-1) @ v)


def test_an_input_that_a_group_shares_is_done_with_where_the_group_is():
    n = 4 * 6 * 8
    ids = torch.zeros(1, 6, dtype=torch.long)
    apart, together = measured(Attention(), ids), measured(Attention(), ids, ["*q_proj|*k_proj|*v_proj"])
    assert apart["embed"].live == 8 * 6 + n
    for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
        assert apart[name].live == together[name].live == (i + 2) * n
        assert together[name].without_input == (i + 1) * n
        assert apart[name].without_input == (i + 2) * n - (n if name == "v_proj" else 0)
        assert (apart[name].values, apart[name].tokens) == (48, 6)
    assert apart["v_proj"].until_next == n + max(2 * n + 4 * 36, 2 * 4 * 36), "v beside q, k and their product"


def test_a_layer_that_is_called_twice_and_a_weight_with_two_owners():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    model.append(model[1])
    assert {name: a.live for name, a in measured(model, torch.randn(1, 8)).items()} == {"0": 64, "1": 64}


def test_the_model_is_left_as_it_was_and_the_space_remembers():
    model, x = Residual(), torch.randn(1, 4, 5, 5)
    before = model(x)
    layers = measure_activations(model, call, x, trace_layers(model, call, x))
    assert torch.equal(model(x), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    space = SearchSpace.build(layers, {"w4": Integer(4)})
    assert read_space(json.loads(json.dumps(space.to_dict()))) == space
    plain = SearchSpace.build(trace_layers(model, call, x), {"w4": Integer(4)}).to_dict()
    assert "activations" not in plain["groups"][0]["layers"][0]
