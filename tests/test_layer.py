"""Every weight as rows of output channels, whatever the module's own layout."""

import pytest
import torch
from torch import nn

from mpsearch.errors import InputError
from mpsearch.layer import KINDS, check_finite, from_rows, kind_of, rows_shape, weight_rows, weights_sha256

MODULES = {
    "linear": lambda: (nn.Linear(5, 6), (2, 5)),
    "conv1d": lambda: (nn.Conv1d(4, 6, 3, groups=2), (2, 4, 9)),
    "conv2d": lambda: (nn.Conv2d(4, 6, (3, 2), groups=2), (2, 4, 7, 7)),
    "conv3d": lambda: (nn.Conv3d(2, 6, 2), (2, 2, 4, 4, 4)),
    "conv_transpose1d": lambda: (nn.ConvTranspose1d(4, 6, 3, groups=2), (2, 4, 9)),
    "conv_transpose2d": lambda: (nn.ConvTranspose2d(4, 6, (3, 2), groups=2, stride=2), (2, 4, 5, 5)),
    "conv_transpose3d": lambda: (nn.ConvTranspose3d(4, 6, 2, groups=2), (2, 4, 3, 3, 3)),
    "embedding": lambda: (nn.Embedding(6, 5), None),
}


def test_every_kind_is_tested():
    assert set(MODULES) == set(KINDS.values())


@pytest.mark.parametrize("kind", MODULES)
def test_rows_are_output_channels(kind):
    """Without row o, output channel o falls silent, and no other output changes."""
    module, shape = MODULES[kind]()
    assert kind_of(module) == kind
    x = torch.arange(6)[None] if shape is None else torch.randn(shape)
    rows = weight_rows(module).clone()
    assert tuple(rows.shape) == rows_shape(module)
    assert torch.equal(from_rows(module, rows), module.weight)
    with torch.no_grad():
        if getattr(module, "bias", None) is not None:
            module.bias.zero_()
        before = module(x)
        rows[4] = 0
        module.weight.copy_(from_rows(module, rows))
        after = module(x)
    silent = torch.zeros_like(before, dtype=torch.bool)
    silent[:, 4] = True  # an embedding's sample i is entry i
    assert before[:, 4].abs().max() > 0
    assert torch.equal(after, torch.where(silent, 0.0, before))


def test_other_modules_have_no_kind():
    assert kind_of(nn.BatchNorm2d(3)) is None
    assert kind_of(nn.MultiheadAttention(4, 2)) is None


def test_weights_that_are_not_finite_are_named():
    weight = torch.zeros(3, 4)
    check_finite("conv", weight)
    weight[0, 1], weight[2, 2] = torch.nan, -torch.inf
    with pytest.raises(InputError, match=r"'conv' has 2 weights of 12 that are NaN or infinite"):
        check_finite("conv", weight)


def test_checksum_sees_values_names_shapes_and_dtypes():
    def checksum(**buffers):
        module = nn.Module()
        for name, value in buffers.items():
            module.register_buffer(name, value)
        return weights_sha256(module)

    a, b = torch.arange(6.0), torch.ones(2)
    models = [
        checksum(a=a, b=b),
        checksum(a=a),
        checksum(a=a.reshape(2, 3), b=b),
        checksum(c=a, b=b),
        checksum(a=a, b=b.view(torch.int32)),
        checksum(a=a + 1e-6, b=b),
        checksum(a=a, b=-0.0 * b),
        checksum(a=a, b=0.0 * b),
    ]
    assert len(set(models)) == len(models)
    assert checksum(b=b.clone(), a=a.clone()) == models[0]
    assert weights_sha256(nn.BatchNorm2d(3).half()) != weights_sha256(nn.BatchNorm2d(3))
