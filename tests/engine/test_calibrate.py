"""The moments of each layer's input, against those of an explicit patch matrix; and what bias correction makes of them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mpsearch.allocation import SearchSpace
from mpsearch.divergence import SoftmaxKL
from mpsearch.engine import fisher_blocks
from mpsearch.engine.calibrate import calibrate, fisher_bytes, hessian_bytes, hessians, output_fishers
from mpsearch.engine.engine import QuantEngine
from mpsearch.engine.scoring import load_batches
from mpsearch.errors import InputError
from mpsearch.graph.trace import trace_layers
from mpsearch.layer import weight_rows
from mpsearch.quantizers.base import InputMoments
from mpsearch.quantizers.clip_search import ClipSearch
from mpsearch.quantizers.coordinate_descent import CoordinateDescent
from mpsearch.quantizers.gptq import GPTQ
from mpsearch.quantizers.kronecker_descent import KroneckerDescent
from mpsearch.quantizers.round_to_nearest import RoundToNearest
from mpsearch.schemes.input import IntegerInput
from mpsearch.schemes.integer import Integer
from mpsearch.tasks.classification import Classification

CONVS = {
    "plain": lambda: nn.Conv2d(4, 6, 3),
    "stride": lambda: nn.Conv2d(4, 6, 3, stride=2),
    "padding": lambda: nn.Conv2d(4, 6, 3, padding=2),
    "all at once": lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 3), padding=(2, 1), dilation=(2, 1), groups=2),
    "same": lambda: nn.Conv2d(4, 6, (5, 3), padding="same", dilation=(1, 2)),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=4),
    "pointwise": lambda: nn.Conv2d(4, 6, 1, stride=2),
    "reflect": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "circular": lambda: nn.Conv2d(4, 6, (3, 5), padding=(1, 2), padding_mode="circular", bias=False),
    "conv1d": lambda: nn.Conv1d(4, 6, 5, stride=3, padding=4, dilation=2, groups=2),
    "conv3d": lambda: nn.Conv3d(4, 6, (2, 3, 1), stride=(1, 2, 1), padding=(1, 0, 0), groups=2),
}


def task_of(shape, n=10):
    """`n` samples in batches of 4, 4, and 2, whose mean is far from 0."""
    torch.manual_seed(0)
    x = torch.randn(n, *shape) + torch.rand(shape)
    split = (x, torch.zeros(n, dtype=torch.long))
    return Classification(split, split, split, n_classes=2, batch_size=4), x


def moments_of(model, task):
    model.eval()
    layers = trace_layers(model, task.forward, task.batches("calibration")[0][0])
    return calibrate(model, task, layers, load_batches(task, "calibration", "cpu"))


def patches(conv, x):
    """[n * positions, groups, columns]: the slow way, one convolution with a single 1 for each column of the weight."""
    per_group = conv.in_channels // conv.groups
    columns = per_group * conv.weight[0, 0].numel()
    picked = []
    probe = type(conv)(
        conv.in_channels,
        conv.groups,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        False,
        conv.padding_mode,
    )
    for column in range(columns):
        with torch.no_grad():
            probe.weight.zero_()
            probe.weight.view(conv.groups, columns)[:, column] = 1
            picked.append(probe(x).flatten(2))  # [n, groups, positions]
    return torch.stack(picked, -1).transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize("name", CONVS)
def test_convolutions(name):
    conv = CONVS[name]()
    task, x = task_of((4, *[9, 8, 7][: conv.weight.ndim - 2]))
    found = moments_of(nn.Sequential(conv), task)["0"]
    columns = patches(conv, x)
    assert found.mean.shape == found.second_moment.shape == (conv.groups, weight_rows(conv)[0].numel())
    assert torch.allclose(found.mean, columns.mean(0), atol=1e-5)
    assert torch.allclose(found.second_moment, columns.square().mean(0), atol=1e-5)


def test_a_convolution_is_its_unfolded_product():
    """The same by `F.unfold`, whose columns are those of the weight matrix."""
    conv = nn.Conv2d(3, 5, 3, stride=2, padding=1, dilation=2)
    task, x = task_of((3, 9, 8))
    unfolded = F.unfold(x, 3, dilation=2, padding=1, stride=2).transpose(1, 2).reshape(-1, 27)
    found = moments_of(nn.Sequential(conv), task)["0"]
    assert torch.allclose(found.mean[0], unfolded.mean(0), atol=1e-5)
    assert torch.allclose(found.second_moment[0], unfolded.square().mean(0), atol=1e-5)


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7)])
def test_linear_layers_average_over_all_but_the_features(shape):
    task, x = task_of(shape)
    found = moments_of(nn.Sequential(nn.Linear(7, 4)), task)["0"]
    assert torch.allclose(found.mean, x.reshape(-1, 7).mean(0, keepdim=True), atol=1e-6)
    assert torch.allclose(found.second_moment, x.reshape(-1, 7).square().mean(0, keepdim=True), atol=1e-6)


@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (2, 0), (2, 1), (3, 1)])
def test_transposed_convolutions_meet_the_mean_of_their_output(stride, padding):
    """W E[x] is the mean output without bias: exact without padding, within what padding crops at the border with it."""
    conv = nn.ConvTranspose2d(4, 6, 3, stride=stride, padding=padding, groups=2, bias=False)
    task, x = task_of((4, 12, 12))
    found = moments_of(nn.Sequential(conv), task)["0"]
    assert found.mean.shape == (2, 2 * 9)
    with torch.no_grad():
        mean_output = conv(x).mean((0, 2, 3))
    predicted = torch.einsum("krc,kc->kr", weight_rows(conv).reshape(2, 3, 18), found.mean).flatten()
    tolerance = 1e-5 if padding == 0 else 0.15 * mean_output.abs().max()
    assert (predicted - mean_output).abs().max() < tolerance


def test_the_histogram_is_the_same_whatever_the_batches():
    x = task_of((4, 9, 8), n=23)[1] * torch.logspace(-3, 3, 23)[:, None, None, None]
    model, labels = nn.Sequential(nn.Conv2d(4, 6, 3)), torch.zeros(23, dtype=torch.long)
    found = []
    for size, order in ((23, torch.arange(23)), (4, torch.arange(23)), (1, torch.arange(23).flip(0))):
        split = (x[order], labels)
        found.append(moments_of(model, Classification(split, split, split, n_classes=2, batch_size=size))["0"].histogram)
    for histogram in found:
        assert (histogram.low, histogram.high) == (x.min().item(), x.max().item())
        assert torch.equal(histogram.counts, found[0].counts)
        assert int(histogram.counts.sum()) == x.numel()


class Shared(nn.Module):
    """A layer that is called twice, two layers with one weight, one that never runs, and an embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.twice = nn.Linear(4, 4)
        self.one, self.other, self.never = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.one.weight

    def forward(self, x):
        self.seen = [self.embed((x.abs() * 10).long() % 9)]
        self.seen.append(self.twice(self.seen[0]))
        self.seen += [self.twice(self.seen[1])]
        return self.other(self.one(self.seen[2]) * 2).sum(1)


def test_a_layer_that_is_called_twice_sees_the_mean_of_both():
    task, x = task_of((6,))
    model = Shared()
    found = moments_of(model, task)
    assert set(found) == {"twice", "one", "other"}, "an embedding's input are indices, and 'never' never runs"
    with torch.no_grad():
        model(x)
        a, b, c = (seen.reshape(-1, 4) for seen in model.seen)
        middle = 2 * model.one(c)
    assert torch.allclose(found["twice"].mean[0], torch.cat([a, b]).mean(0), atol=1e-6)
    assert torch.allclose(found["twice"].second_moment[0], torch.cat([a, b]).square().mean(0), atol=1e-6)
    assert torch.allclose(found["one"].mean[0], c.mean(0), atol=1e-6), "'other' is tied to it, and has a mean of its own"
    assert torch.allclose(found["other"].mean[0], middle.mean(0), atol=1e-6)


def test_the_model_and_its_hooks_are_left_as_they_were(tiny):
    net, task = tiny.net(), tiny.task()
    before = tiny.state(net)
    moments_of(net, task)
    tiny.assert_same_state(net, before)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in net.modules())


@pytest.mark.parametrize("input", [None, IntegerInput(3, symmetric=False), IntegerInput(3, "static", range="mse")], ids=str)
@pytest.mark.parametrize("name", [*CONVS, "linear", "transposed"])
def test_bias_correction_keeps_the_mean_output(tiny, name, input):
    """On the calibration data, for every output channel, of rounded inputs too; without it the mean shifts by far more."""
    makers = {**CONVS, "linear": lambda: nn.Linear(6, 8), "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)}
    layer = makers[name]()
    ndim = layer.weight.ndim - 2
    task, x = task_of((6,) if ndim == 0 else (4, *[9, 8, 7][:ndim]))
    schemes = {"w2": Integer(2, input=input)}
    engine = tiny.engine(nn.Sequential(layer), task, schemes, quantizer=RoundToNearest())
    without = tiny.engine(nn.Sequential(layer), task, schemes, quantizer=RoundToNearest(), bias_correction=False)
    uniform = engine.space.uniform("w2")

    @torch.no_grad()
    def mean_output(model):
        y = model(x).double()
        return y.transpose(0, 1).flatten(1).mean(1)

    expected = mean_output(engine.model)
    with without.applied(uniform) as model:
        shift = (mean_output(model) - expected).abs().max()
    with engine.applied(uniform) as model:
        corrected = (mean_output(model) - expected).abs().max()
    assert shift > 1e-2
    if layer.bias is None:
        assert corrected == shift
        assert engine.biases("0", "w2") == {}
    else:
        assert corrected < 1e-5


def test_bias_correction_of_layers_in_a_network(tiny):
    """Each layer alone: the mean of its own output stays, whatever follows it."""
    engine = tiny.digits({"w2": Integer(2)})
    batches = [inputs for inputs, _ in engine.batches("calibration")]
    for group in engine.space.names[::3]:
        module = engine.model.get_submodule(group)
        means = []
        for allocation in ({}, {group: "w2"}):
            outputs = []
            hook = module.register_forward_hook(lambda _, args, output, outputs=outputs: outputs.append(output.double()))
            with torch.no_grad(), engine.applied(allocation) as model:
                for inputs in batches:
                    model(inputs)
            hook.remove()
            means.append(torch.cat(outputs).transpose(0, 1).flatten(1).mean(1))
        assert (means[0] - means[1]).abs().max() < 1e-5 * (1 + means[0].abs().max()), group


def hessians_of(model, task):
    model.eval()
    names = [layer for layer, module in model.named_modules() if hasattr(module, "weight")]
    return hessians(model, task, names, load_batches(task, "calibration", "cpu"))


@pytest.mark.parametrize("name", CONVS)
def test_hessians_of_convolutions(name, monkeypatch):
    conv = CONVS[name]()
    task, x = task_of((4, *[9, 8, 7][: conv.weight.ndim - 2]))
    columns = patches(conv, x).double()
    expected = torch.einsum("ngc,ngd->gcd", columns, columns) / len(columns)
    for limit in (2**26, 2**14):  # a batch at once, or few samples
        monkeypatch.setattr("mpsearch.graph.products.PATCH_BYTES", limit)
        found = hessians_of(nn.Sequential(conv), task)["0"]
        assert found.shape == (conv.groups, columns.shape[2], columns.shape[2])
        assert torch.allclose(found.double(), expected, atol=1e-5)
    assert hessian_bytes(conv) == found.nbytes
    moments = moments_of(nn.Sequential(conv), task)["0"]
    assert torch.allclose(found.diagonal(dim1=1, dim2=2), moments.second_moment, atol=1e-5)


def test_hessians_of_linear_layers_and_what_has_none():
    task, _ = task_of((6,))
    model = Shared()
    found = hessians_of(model, task)
    assert set(found) == {"twice", "one", "other"}
    model(task.batches("calibration")[0][0])
    task, x = task_of((3, 7))
    found = hessians_of(nn.Sequential(nn.Linear(7, 2)), task)["0"]
    assert torch.allclose(found[0], x.reshape(-1, 7).T @ x.reshape(-1, 7) / 30, atol=1e-5)
    task, _ = task_of((4, 5, 5))
    assert hessians_of(nn.Sequential(nn.ConvTranspose2d(4, 2, 3)), task) == {}


class PadsItself(nn.Conv2d):
    """As TensorFlow pads at stride 2: one more on the right and at the bottom."""

    def forward(self, input):
        return F.conv2d(F.pad(input, (0, 1, 0, 1)), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Standardized(nn.Conv2d):
    def forward(self, input):
        return F.conv2d(input, self.weight / self.weight.std(), self.bias, self.stride)


class AddsItsBias(nn.Linear):
    """The mean of its output does not shift as that of its product."""

    def forward(self, input):
        return 3 * F.linear(input, self.weight) + self.bias


def test_a_module_with_a_forward_of_its_own_is_calibrated_by_its_product(tiny):
    task, x = task_of((4, 9, 9))
    own = PadsItself(4, 6, 3, stride=2, groups=2)
    plain = nn.Conv2d(4, 6, 3, stride=2, groups=2)
    plain.load_state_dict(own.state_dict())
    padded = F.pad(x, (0, 1, 0, 1))
    split = (padded, torch.zeros(len(padded), dtype=torch.long))
    theirs = Classification(split, split, split, n_classes=2, batch_size=4)
    a, b = moments_of(nn.Sequential(own), task)["0"], moments_of(nn.Sequential(plain), theirs)["0"]
    assert torch.allclose(a.mean, b.mean, atol=1e-6)
    assert torch.allclose(a.second_moment, b.second_moment, atol=1e-6)
    assert (a.histogram.low, a.histogram.high) == (x.min().item(), x.max().item())
    assert torch.equal(hessians_of(nn.Sequential(own), task)["0"], hessians_of(nn.Sequential(plain), theirs)["0"])
    engine = tiny.engine(nn.Sequential(own), task, {"w2": Integer(2)}, quantizer=CoordinateDescent())
    with torch.no_grad():
        before = own(x).mean((0, 2, 3))
        with engine.applied(engine.space.uniform("w2")):
            assert (own(x).mean((0, 2, 3)) - before).abs().max() < 1e-5


@pytest.mark.parametrize("module", [lambda: Standardized(4, 6, 3), lambda: nn.Sequential(nn.Flatten(), AddsItsBias(324, 3))])
def test_what_is_no_product_of_weight_and_bias_is_left_out(module):
    task, _ = task_of((4, 9, 9))
    assert moments_of(nn.Sequential(module()), task) == {}
    assert hessians_of(nn.Sequential(module()), task) == {}


def test_inputs_that_are_not_finite_are_named():
    task, _ = task_of((6,))
    model = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 2))
    nn.init.constant_(model[0].bias, 1e30)  # whose square leaves float32's range
    with pytest.raises(InputError, match="NaN or infinite inputs of layer '1'"):
        hessians_of(model, task)


def test_hessians_come_a_few_layers_at_a_time(tiny, monkeypatch):
    """The codes do not depend on how many Hessians fit into memory, and nothing but the float model makes them."""
    codes = []
    for limit in (2 * 10**9, 1):
        calls = []
        monkeypatch.setattr("mpsearch.engine.calibrate.hessians", lambda *of, calls=calls: calls.append(of[2]) or hessians(*of))
        engine = tiny.engine(tiny.net(), tiny.task(), {"w2": Integer(2)}, quantizer=GPTQ(), hessian_max_bytes=limit)
        before = tiny.state(engine.model)
        engine.score(engine.space.uniform("w2"))
        tiny.assert_same_state(engine.model, before)
        codes.append([engine.quantized(layer.name, "w2").tensors["codes"] for layer in engine.space.layers])
        assert len(calls) == (1 if limit > 1 else 3)
    assert all(torch.equal(a, b) for a, b in zip(*codes, strict=True))


def test_a_layer_without_a_hessian_is_named(tiny):
    task, _ = task_of((4, 5, 5))
    model = nn.Sequential(nn.ConvTranspose2d(4, 2, 3), nn.Flatten(), nn.Linear(98, 2)).eval()
    engine = tiny.engine(model, task, {"w3": Integer(3)}, quantizer=GPTQ())
    with pytest.warns(UserWarning, match="Layer '0' is quantized without a Hessian"):
        found = engine.quantized("0", "w3").dequantize()
    plain = tiny.engine(model, task, {"w3": Integer(3)}, quantizer=ClipSearch())
    assert not torch.equal(found, engine.quantized("2", "w3").dequantize())
    assert found.shape == plain.quantized("0", "w3").dequantize().shape


@pytest.mark.parametrize("quantizer", [ClipSearch(), CoordinateDescent()], ids=lambda q: type(q).__name__)
@pytest.mark.parametrize("what", ["ones", "zeros", "one sample"])
def test_inputs_that_never_vary_or_come_once_still_calibrate(tiny, quantizer, what):
    """Centred on its mean such an input has a Hessian of zeros, one sample gives one of rank 1; groups may exceed a layer."""
    _, x = task_of((6,))
    x = {"ones": torch.ones(10, 6), "zeros": torch.zeros(10, 6), "one sample": x[:1]}[what]
    split = (x, torch.zeros(len(x), dtype=torch.long))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    task = Classification(split, split, split, n_classes=3, batch_size=4)
    for scheme in (Integer(3), Integer(3, 64, symmetric=False)):
        engine = tiny.engine(model, task, {"w3": scheme}, quantizer=quantizer)
        for name in ("0", "2"):
            weight = model.get_submodule(name).weight
            error = (engine.quantized(name, "w3").dequantize() - weight).abs().max()
            assert error < weight.abs().max() / 2  # a step of 3 bits is at most a third of that, and clipping little more
            assert torch.isfinite(engine.biases(name, "w3")[name]).all()
        whole = tiny.engine(model, task, {"w3": Integer(3, symmetric=scheme.symmetric)}, quantizer=quantizer)
        for name in ("0", "2"):  # a group larger than a row is the row
            assert torch.equal(engine.quantized(name, "w3").dequantize(), whole.quantized(name, "w3").dequantize())


def test_a_layer_that_the_calibration_data_do_not_reach_falls_back_and_is_named(tiny):
    """Reached by the batch that the layers are found with, but by none that calibrates: the clip search without data."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.usual, self.rare = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x):
            return self.rare(x) if x.sum() > 1e3 else self.usual(x)

    task, _ = task_of((6,))
    model = Branches().eval()
    layers = [*trace_layers(model, task.forward, torch.zeros(2, 6)), *trace_layers(model, task.forward, torch.full((2, 6), 1e3))]
    space = SearchSpace.build(layers, {"w3": Integer(3)}, other_bits=0)
    moments = calibrate(model, task, layers, load_batches(task, "calibration", "cpu"))
    engine = QuantEngine(model, task, space, {"w3": CoordinateDescent()}, moments)
    with pytest.warns(UserWarning, match="Layer 'rare' is quantized without a Hessian"):
        found = engine.quantized("rare", "w3")
    expected = ClipSearch().quantize(model.rare.weight.detach(), Integer(3))
    assert torch.equal(found.dequantize(), expected.dequantize())
    assert not torch.equal(engine.quantized("usual", "w3").dequantize(), expected.dequantize())


@pytest.mark.parametrize("conv", [lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2)])
def test_the_fisher_information_of_outputs_is_that_of_their_gradients(conv, monkeypatch):
    """Where the signs drawn are known, and the next layer works in place on what came before."""
    task, x = task_of((4, 6, 6))
    model = nn.Sequential(conv(), nn.ReLU(inplace=True), nn.Flatten(), nn.LazyLinear(3))
    model(x)
    model.eval()
    monkeypatch.setattr(torch, "randint", lambda low, high, shape, generator, **_: torch.ones(shape, dtype=torch.long))
    outputs = [model[0](x).detach().requires_grad_()]
    outputs.append(model[3](outputs[0].relu().flatten(1)))
    gradients = torch.autograd.grad(SoftmaxKL().probe(outputs[1], torch.ones(10, 3)), outputs)
    found = output_fishers(model, task, ["0", "3"], load_batches(task, "calibration", "cpu"), SoftmaxKL())
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():  # as where a metric asks for a layer that is not quantized yet
        again = output_fishers(model, task, ["0", "3"], load_batches(task, "calibration", "cpu"), SoftmaxKL())
    assert all(torch.equal(found[name], again[name]) for name in found)
    for name, gradient, k in (("0", gradients[0], model[0].groups), ("3", gradients[1], 1)):
        rows = gradient.flatten(2).transpose(1, 2).flatten(0, 1) if gradient.ndim == 4 else gradient
        rows = rows.reshape(len(rows), k, -1).transpose(0, 1)
        assert torch.allclose(found[name], rows.transpose(1, 2) @ rows / rows.shape[1], atol=1e-7)
        assert fisher_bytes(model.get_submodule(name)) == found[name].nbytes


def test_an_output_fisher_of_many_rows_is_its_blocks(monkeypatch, capsys):
    task, _ = task_of((6,))
    model = nn.Sequential(nn.Linear(6, 12)).eval()
    batches = load_batches(task, "calibration", "cpu")
    whole = output_fishers(model, task, ["0"], batches, SoftmaxKL())["0"]
    monkeypatch.setattr(fisher_blocks, "MOST_ROWS", 11)
    monkeypatch.setattr(fisher_blocks, "BLOCK_ROWS", 5)
    blocks = output_fishers(model, task, ["0"], batches, SoftmaxKL())["0"]
    assert fisher_bytes(model[0]) == blocks.nbytes
    for i, block in enumerate(blocks):
        assert torch.allclose(block, whole[0, 4 * i : 4 * i + 4, 4 * i : 4 * i + 4], atol=1e-7)
    given = InputMoments(torch.zeros(1, 6), torch.ones(1, 6), hessian=torch.eye(6)[None], fisher=blocks)
    quantized = KroneckerDescent().quantize(model[0].weight.detach(), Integer(3), given)
    assert len(blocks) == 3
    assert (quantized.dequantize() - model[0].weight).abs().max() < 0.2
    for _ in range(2):
        fisher_blocks.say_if_in_blocks("head", 49152)
    assert capsys.readouterr().err.count("The output Fisher of layer 'head' would take 9.7 GB: ") == 1
    assert fisher_blocks.fisher_blocks(13) == 13  # a prime number


def test_a_model_without_gradients_is_quantized_without(tiny):
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x):
            return self.layer(x).detach()

    engine = tiny.engine(Detached().eval(), task_of((6,))[0], {"w2": Integer(2)}, quantizer=KroneckerDescent())
    plain = tiny.engine(engine.model, engine.task, {"w2": Integer(2)}, quantizer=CoordinateDescent())
    with pytest.warns(UserWarning, match="The model has no gradients"):
        found = engine.quantized("layer", "w2").dequantize()
    assert torch.equal(found, plain.quantized("layer", "w2").dequantize())
