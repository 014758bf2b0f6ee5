"""Gradients at tapped outputs, also where the network goes on in place."""

import pytest
import torch
from torch import nn

from mpsearch.files import scratch
from mpsearch.files.scratch import joined
from mpsearch.graph import gradients as gradients_module
from mpsearch.graph.gradients import GradientTaps


def gradients(layers: nn.ModuleList, x: torch.Tensor, in_place: bool) -> dict[str, torch.Tensor]:
    """At the outputs of two layers, of the sum of squares behind the second."""
    taps, seen = GradientTaps(layers), {}
    with taps.recording():
        for i, layer in enumerate(layers):
            y = taps.tap(layer(x), lambda gradient, i=i: seen.__setitem__(i, gradient.clone()))
            x = y.relu_() if in_place else y.relu()
        loss = x.square().sum()
    taps.backward(loss)
    return seen


@pytest.mark.parametrize("in_place", [False, True])
def test_gradients_are_those_at_the_layers_own_outputs(in_place):
    torch.manual_seed(0)
    layers, x = nn.ModuleList([nn.Linear(5, 4), nn.Linear(4, 3)]), torch.randn(7, 5)
    first = layers[0](x).detach().requires_grad_()
    second = layers[1](first.relu())
    expected = torch.autograd.grad(second.relu().square().sum(), (first, second))
    seen = gradients(layers, x, in_place)
    for i, gradient in enumerate(expected):
        torch.testing.assert_close(seen[i], gradient, rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in layers.parameters())


@pytest.mark.parametrize("max_bytes", [0, 100])
def test_a_large_graph_lies_in_files_and_has_the_same_gradients(monkeypatch, max_bytes):
    torch.manual_seed(0)
    layers, x = nn.ModuleList([nn.Linear(5, 4), nn.Linear(4, 3)]), torch.randn(7, 5)
    expected = gradients(layers, x, in_place=False)
    sizes = []
    monkeypatch.setattr(gradients_module, "GRAPH_BYTES", max_bytes)
    monkeypatch.setattr(scratch, "joined", lambda parts, *args: sizes.append(parts[0].nbytes) or joined(parts, *args))
    seen = gradients(layers, x, in_place=False)
    assert sizes
    for i, gradient in expected.items():
        torch.testing.assert_close(seen[i], gradient, rtol=0, atol=0)


def test_a_saved_tensor_that_changed_is_an_error():
    layers = nn.ModuleList([nn.Linear(5, 4)])
    taps = GradientTaps(layers)
    with taps.recording():
        y = taps.tap(layers[0](torch.randn(7, 5)), lambda gradient: None)
        z = y.exp()
        loss = z.sum()
        z.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        taps.backward(loss)
