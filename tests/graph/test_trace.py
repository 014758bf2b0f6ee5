"""Tracing a zoo of tiny models: which layers, in which order, with what shapes and work."""

import json
from collections import UserDict
from dataclasses import asdict

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from mpsearch.errors import InputError
from mpsearch.graph.trace import first_samples, trace_layers
from mpsearch.layer import KINDS, from_rows, rows_shape, weight_rows
from mpsearch.tree import tensors_in


def call(model, inputs):
    return model(inputs)


def only(model, inputs):
    """The one layer of a model."""
    (layer,) = trace_layers(model, call, inputs)
    return layer


# module, input of 2 samples, shape of the rows, macs of one sample counted by hand
ZOO = [
    (nn.Linear(5, 3), (2, 5), (3, 5), 3 * 5),
    (nn.Linear(5, 3), (2, 7, 5), (3, 5), 7 * 3 * 5),
    (nn.Conv1d(4, 6, 3), (2, 4, 10), (6, 4, 3), 8 * 6 * 4 * 3),
    (nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 8, 8), (6, 4, 3, 3), 4 * 4 * 6 * 4 * 9),
    (nn.Conv2d(4, 8, 3, groups=4), (2, 4, 5, 5), (8, 1, 3, 3), 3 * 3 * 8 * 9),
    (nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4), (3, 2, 2, 2, 2), 27 * 3 * 2 * 8),
    (nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), (2, 4, 5), (6, 2, 3), 5 * 4 * 3 * 3),
    (nn.ConvTranspose2d(4, 6, 2, stride=2), (2, 4, 5, 5), (6, 4, 2, 2), 25 * 4 * 6 * 4),
    (nn.ConvTranspose3d(2, 4, 2, groups=2), (2, 2, 3, 3, 3), (4, 1, 2, 2, 2), 27 * 2 * 2 * 8),
]


@pytest.mark.parametrize(("module", "size", "shape", "macs"), ZOO, ids=lambda value: str(value))
def test_every_kind_has_its_shape_and_work(module, size, shape, macs):
    layer = only(nn.Sequential(module), torch.randn(size))
    assert (layer.name, layer.kind, layer.shape, layer.macs) == ("0", KINDS[type(module)], shape, macs)
    assert (layer.group, layer.modules) == ("0", ("0",))
    assert layer.shape == rows_shape(module) == tuple(weight_rows(module).shape)
    assert json.loads(json.dumps(asdict(layer)))["shape"] == list(shape)


@pytest.mark.parametrize("module", [row[0] for row in ZOO] + [nn.Embedding(7, 3)], ids=str)
def test_rows_round_trip(module):
    rows = weight_rows(module)
    assert torch.equal(from_rows(module, rows), module.weight)
    assert torch.equal(from_rows(module, rows.clone()), module.weight)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("cls", "ndim"), [(nn.ConvTranspose1d, 1), (nn.ConvTranspose2d, 2), (nn.ConvTranspose3d, 3)])
def test_a_row_of_a_transposed_convolution_makes_its_output_channel(cls, ndim, groups):
    module = cls(4, 6, 3, stride=2, groups=groups, bias=False)
    x = torch.randn(2, 4, *[5] * ndim)
    before = module(x)
    for o in range(6):
        rows = weight_rows(module).clone()
        rows[o] = 0
        changed = cls(4, 6, 3, stride=2, groups=groups, bias=False)
        changed.weight = nn.Parameter(from_rows(module, rows))
        after = changed(x)
        assert (after[:, o] == 0).all()
        others = [i for i in range(6) if i != o]
        assert torch.equal(after[:, others], before[:, others])


class Tied(nn.Module):
    """An embedding whose weight the head shares, and a head that is declared first."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 11, bias=False)
        self.inner = nn.Linear(8, 8)
        self.embed = nn.Embedding(11, 8)
        self.unreached = nn.Linear(8, 11)
        self.head.weight = self.embed.weight
        self.unreached.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.inner(self.embed(ids)))


def test_tied_weights_are_one_layer():
    embed, inner = trace_layers(Tied(), call, torch.zeros(3, 5, dtype=torch.long))
    assert (embed.name, embed.kind, embed.shape) == ("embed", "embedding", (11, 8))
    assert embed.modules == ("embed", "head", "unreached")
    assert embed.macs == 5 * 11 * 8  # the head's; looking up costs none
    assert (inner.name, inner.modules, inner.macs) == ("inner", ("inner",), 5 * 8 * 8)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.late, self.early, self.never = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.late(self.early(self.early(x)))


def test_forward_order_repeated_calls_and_unreached_layers():
    layers = trace_layers(Twice(), call, torch.randn(2, 4))
    assert [(layer.name, layer.macs) for layer in layers] == [("early", 32), ("late", 16)]


def test_a_module_under_two_names_is_one_layer():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.append(model[0])
    layer = only(model, torch.randn(2, 4))
    assert (layer.name, layer.modules, layer.macs) == ("0", ("0",), 32)


class Wrapped(nn.Module):
    """Takes a mapping or a tuple, and calls its layer by keyword."""

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose1d(3, 2, 2)

    def forward(self, inputs):
        return self.up(input=inputs["x"] if not isinstance(inputs, tuple) else inputs[1]["x"])


def test_inputs_may_be_mappings_and_tuples():
    x = torch.randn(4, 3, 6)
    for inputs in ({"x": x}, UserDict(name="a", x=x), (None, {"x": x})):
        assert only(Wrapped(), inputs).macs == 6 * 3 * 2 * 2
    assert [t.shape[0] for t in tensors_in([x, ({"a": x[:2]},), "no", None])] == [4, 2]


def test_weights_computed_at_each_call_are_left_out():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    assert only(model, torch.randn(2, 4)).name == "1"


def test_attention_keeps_what_its_parent_reads_directly():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert [layer.name for layer in trace_layers(model, call, torch.randn(2, 3, 8))] == ["linear1", "linear2"]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training):
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()).train(training)
    model[2].train(not training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    only(model, torch.randn(2, 4))
    assert [module.training for module in model] == [training, training, not training]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_hooks_are_removed_when_the_forward_fails():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(RuntimeError):
        trace_layers(model, call, torch.randn(2, 3))
    assert not model[0]._forward_hooks


def test_bad_models_and_inputs():
    x = torch.randn(2, 4)
    with pytest.raises(InputError, match=r"layer '0' is torch.float16.*model.float\(\)"):
        trace_layers(nn.Sequential(nn.Linear(4, 4)).half(), call, x.half())
    with pytest.raises(InputError, match="No quantizable layer was called in Sequential"):
        trace_layers(nn.Sequential(nn.ReLU()), call, x)
    for inputs in ({}, None, torch.randn(0, 4), torch.tensor(1.0)):
        with pytest.raises(InputError, match="hold no tensor with samples"):
            trace_layers(nn.Sequential(nn.Linear(4, 4)), call, inputs)


def test_first_samples():
    x, y, mask = torch.arange(6).reshape(3, 2), torch.arange(3), torch.ones(4, 4)
    batch = first_samples({"x": x, "more": [y, (x, "word"), mask]}, 2)
    assert torch.equal(batch["x"], x[:2])
    assert torch.equal(batch["more"][0], y[:2])
    assert batch["more"][1][1] == "word"
    assert batch["more"][2] is mask, "holds no samples"
