"""Folding batch norms: numerically right wherever it is done, and not done where it would be wrong."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from mpsearch.errors import InputError
from mpsearch.graph.fold import TOLERANCE, apply_folds, fold_batch_norms


def call(model, inputs):
    return model(inputs)


def trained(model, inputs=None):
    """`model` in eval mode with batch norms that do something: random gains, shifts and statistics."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.1)
            if module.affine:
                nn.init.normal_(module.weight, generator=generator)
                nn.init.normal_(module.bias, generator=generator)
    return model.eval()


def unchanged(model, before):
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def check_fold(model, x, expected):
    """Folds exactly `expected`, by running and by name, and the outputs stay within rounding."""
    model = trained(model)
    by_name = copy.deepcopy(model)
    with torch.no_grad():
        before = model(x)
        assert fold_batch_norms(model, call, x) == tuple(expected)
        apply_folds(by_name, expected)
        for folded in (model, by_name):
            torch.testing.assert_close(folded(x), before, rtol=0, atol=1e-5 * before.abs().max().item())
            for layer, batch_norm in expected:
                assert isinstance(folded.get_submodule(batch_norm), nn.Identity)
                assert folded.get_submodule(layer).bias.dtype == torch.float32
                assert not folded.get_submodule(batch_norm).training
    assert unchanged(by_name, model.state_dict())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("layer", "batch_norm", "size"),
    [
        (lambda bias: nn.Linear(5, 6, bias=bias), nn.BatchNorm1d(6), (4, 5)),
        (lambda bias: nn.Conv1d(4, 6, 3, bias=bias), nn.BatchNorm1d(6), (4, 4, 9)),
        (lambda bias: nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=bias), nn.BatchNorm2d(6, eps=1e-3), (4, 4, 5, 5)),
        (lambda bias: nn.Conv3d(2, 6, 2, bias=bias), nn.BatchNorm3d(6), (4, 2, 3, 3, 3)),
        (lambda bias: nn.ConvTranspose1d(4, 6, 3, groups=2, bias=bias), nn.BatchNorm1d(6), (4, 4, 5)),
        (lambda bias: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, bias=bias), nn.BatchNorm2d(6), (4, 4, 5, 5)),
        (lambda bias: nn.ConvTranspose3d(4, 6, 2, bias=bias), nn.BatchNorm3d(6, affine=False), (4, 4, 3, 3, 3)),
    ],
)
def test_each_kind_of_layer(layer, batch_norm, size, bias):
    torch.manual_seed(0)
    check_fold(nn.Sequential(layer(bias), copy.deepcopy(batch_norm)), torch.randn(size), [("0", "1")])


def test_nested_modules_and_a_batch_norm_before_a_layer():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.BatchNorm2d(3),
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
        nn.BatchNorm2d(4),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)),
    )
    check_fold(model, torch.randn(4, 3, 8, 8), [("1.0", "1.1")])


class Residual(nn.Module):
    """Each convolution is followed by a batch norm; the output of the second one is also added further on."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv3, self.bn3 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        y = self.conv2(x)
        return self.bn3(self.conv3(self.bn2(y).relu())) + y


def test_a_fold_is_undone_where_the_output_is_used_elsewhere():
    torch.manual_seed(0)
    model = trained(Residual())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.startswith(("conv2", "bn2"))}
    check_fold(model, torch.randn(4, 3, 8, 8), [("conv1", "bn1"), ("conv3", "bn3")])
    fold_batch_norms(model, call, torch.randn(4, 3, 8, 8))
    after = {name: tensor for name, tensor in model.state_dict().items() if name.startswith(("conv2", "bn2"))}
    assert after.keys() == before.keys()  # no bias has been left behind
    assert all(torch.equal(after[name], before[name]) for name in before)


class Forked(nn.Module):
    """Two batch norms read one layer's output."""

    def __init__(self):
        super().__init__()
        self.linear, self.bn1, self.bn2 = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x):
        y = self.linear(x)
        return self.bn1(y) * self.bn2(y).sigmoid()


def two_calls():
    """A convolution that is called twice, with a batch norm after each call."""
    conv = nn.Conv2d(3, 3, 3, padding=1)
    return nn.Sequential(conv, nn.BatchNorm2d(3), conv, nn.BatchNorm2d(3))


def shared_norm():
    norm = nn.BatchNorm2d(3)
    return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), norm, nn.Conv2d(3, 3, 3, padding=1), norm)


def tied_weight():
    model = nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
    )
    model[3].weight = model[0].weight
    return model


class Unused(nn.Module):
    """A batch norm with a second name, under which nobody calls it."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
        self.alias = self.bn

    def forward(self, x):
        return self.alias(self.conv(x))


class Curious(nn.Module):
    """Its code reads a field of the batch norm."""

    def __init__(self):
        super().__init__()
        self.linear, self.bn = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        return self.bn(self.linear(x)) + self.bn.eps


@pytest.mark.parametrize(
    ("build", "size"),
    [
        (Curious, (4, 4)),
        (Forked, (4, 4)),
        (two_calls, (4, 3, 5, 5)),
        (shared_norm, (4, 3, 5, 5)),
        (tied_weight, (4, 3, 5, 5)),
        (Unused, (4, 3, 5, 5)),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.BatchNorm1d(4)), (4, 4)),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(3)), (4, 3, 4)),  # normalizes tokens, not features
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), (4, 3, 5, 5)),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)), (4, 3, 5, 5)),
        (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.BatchNorm1d(4)), (4, 4)),
    ],
)
def test_what_cannot_be_folded_is_left_bit_for_bit(build, size):
    torch.manual_seed(0)
    model = trained(build())
    before = copy.deepcopy(model.state_dict())
    assert fold_batch_norms(model, call, torch.randn(size)) == ()
    assert unchanged(model, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class NormAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: the activation is a child of the batch norm."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


def test_a_batch_norm_with_an_activation_in_it_leaves_the_activation():
    torch.manual_seed(0)
    model, x = trained(nn.Sequential(nn.Conv2d(3, 4, 3), NormAct(4))), torch.randn(4, 3, 5, 5)
    with torch.no_grad():
        before = model(x)
        assert fold_batch_norms(model, call, x) == (("0", "1"),)
        assert [type(module) for module in model[1]] == [nn.Identity, nn.ReLU]
        torch.testing.assert_close(model(x), before, rtol=0, atol=1e-5 * before.abs().max().item())


def test_training_mode_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=r"Sequential is in training mode. Call model.eval\(\)"):
        fold_batch_norms(model, call, torch.randn(3, 4))
    model.eval()[1].train()
    with pytest.raises(InputError, match="module '1' is in training mode"):
        fold_batch_norms(model, call, torch.randn(3, 4))
    assert unchanged(model, before)


def test_folds_by_name_refuse_what_is_not_there():
    model = trained(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3), nn.ReLU()))
    before = copy.deepcopy(model.state_dict())
    for pairs, message in [
        ([("0", "1"), ("conv9", "1")], "no module 'conv9'"),
        ([("0", "1"), ("2", "1")], "'1' is in more than one fold"),
        ([("0", "3")], r"'3' \(ReLU\) cannot be folded into '0' \(Linear\)"),
        ([("2", "1")], r"cannot be folded into '2'"),
        ([("3", "1")], r"cannot be folded into '3'"),
    ]:
        with pytest.raises(InputError, match=message):
            apply_folds(model, pairs)
    assert unchanged(model, before)
    apply_folds(model, [])


def test_a_fold_just_beyond_the_tolerance_is_undone():
    """The layer's output leaks into the model's output a little: the tolerance is what tells the two apart."""

    class Leak(nn.Module):
        def __init__(self, share):
            super().__init__()
            self.linear, self.bn, self.share = nn.Linear(4, 4), nn.BatchNorm1d(4), share

        def forward(self, x):
            y = self.linear(x)
            return self.bn(y) + self.share * y

    torch.manual_seed(0)
    x = torch.randn(8, 4)
    assert fold_batch_norms(trained(Leak(100 * TOLERANCE)), call, x) == ()
    assert fold_batch_norms(trained(Leak(0.0)), call, x) == (("linear", "bn"),)


class Sometimes(nn.Module):
    """Reads the layer's output without the batch norm where its input is large."""

    def __init__(self):
        super().__init__()
        self.linear, self.bn = nn.Linear(4, 3), nn.BatchNorm1d(3)

    def forward(self, x):
        x = self.linear(x)
        return x if x.abs().max() > 50 else self.bn(x)


def test_folds_are_verified_on_every_batch():
    """On the first batch alone the fold looks right, and the second one's outputs are wrong by their own size."""
    model, batches = trained(Sometimes()), [torch.randn(8, 4), 1000 * torch.randn(8, 4)]
    before = copy.deepcopy(model.state_dict())
    assert fold_batch_norms(model, call, *batches) == ()
    assert unchanged(model, before)
    assert fold_batch_norms(model, call, batches[0]) == (("linear", "bn"),)
