"""The contract of `equalizers/base.py`, which every equalizer fulfils, and what each is for."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import nn

from mpsearch.equalizers.awq import AWQ
from mpsearch.equalizers.base import Equalizer, Network, input_ranges
from mpsearch.equalizers.cross_layer import CrossLayer
from mpsearch.equalizers.smooth_quant import SmoothQuant
from mpsearch.errors import InputError
from mpsearch.exporters.allocation_file import load_allocation
from mpsearch.exporters.base import Picked
from mpsearch.exporters.native import Native
from mpsearch.exporters.packed import Packed
from mpsearch.graph.channel_scaling import ChannelClip, Equalization, load_equalization
from mpsearch.graph.links import find_links
from mpsearch.layer import weight_rows, weights_sha256
from mpsearch.packed.model import load, packed, save
from mpsearch.pipeline.evaluators import SearchEvaluator
from mpsearch.quantizers.round_to_nearest import RoundToNearest
from mpsearch.schemes.input import IntegerInput
from mpsearch.schemes.integer import Integer

CONF = Path(__file__).parents[2] / "conf" / "equalizer"
SCHEMES = {"w3": Integer(3), "w4a8": Integer(4, input=IntegerInput(8))}


class Net(nn.Module):
    """Images [n, 2, 6, 6] -> logits [n, 5]: bounded, depthwise and plain convolutions, then a gated layer on normed pixels."""

    def __init__(self):
        super().__init__()
        self.wide, self.act0 = nn.Conv2d(2, 8, 3), nn.ReLU6()
        self.deep, self.act1 = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU6(inplace=True)
        self.narrow, self.norm = nn.Conv2d(8, 6, 1), nn.RMSNorm(6)
        self.gate, self.up, self.down = nn.Linear(6, 10), nn.Linear(6, 10, bias=False), nn.Linear(10, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.norm(self.narrow(self.act1(self.deep(self.act0(self.wide(x))))).flatten(2).transpose(1, 2))
        return self.head(F.gelu(self.down(F.silu(self.gate(x)) * self.up(x))).mean(1))


def net(seed=0):
    """Channels of very different sizes, some beyond the bound of 6; one that is always 0."""
    torch.manual_seed(seed)
    model = Net().eval()
    with torch.no_grad():
        for layer in (model.wide, model.deep, model.up):
            layer.weight.mul_(torch.logspace(-1.5, 1, len(layer.weight)).view(-1, *[1] * (layer.weight.ndim - 1)))
        model.wide.weight[3], model.wide.bias[3] = 0.0, 0.0
        model.norm.weight.copy_(torch.logspace(-1, 1, 6))
    return model


@pytest.fixture(params=sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def equalizer(request):
    found = instantiate(OmegaConf.load(request.param), _convert_="object")
    assert isinstance(found, Equalizer)
    return found


def network_of(model, task, schemes=SCHEMES):
    batches = task.batches("calibration")
    return Network(model, task, find_links(model, task.forward, batches[0][0]), batches, schemes)


def outputs(model, task, split="confirm"):
    with torch.no_grad():
        return torch.cat([task.forward(model, x) for x, _ in task.batches(split)])


def test_the_network_answers_as_before(equalizer, tiny, tmp_path):
    task, model = tiny.task(), net()
    before, again = outputs(model, task), copy.deepcopy(model)
    done = equalizer.equalize(model, task, task.batches("calibration"), SCHEMES)
    torch.testing.assert_close(outputs(model, task), before, rtol=0, atol=1e-5 * float(before.abs().max()))
    scaled = {name for name, tensor in done.tensors.items() if tensor.max() > 1.5 * tensor.min()}
    assert {"deep.outputs", "narrow.inputs", "act1.high", "up.outputs", "down.inputs"} <= scaled
    assert all(0 < tensor.min() <= tensor.max() < torch.inf for tensor in done.tensors.values())
    assert isinstance(model.act1, ChannelClip)
    assert not model.act1.training
    done.save(tmp_path / "there" / "file")
    found = load_equalization(tmp_path / "there" / "file")
    assert (found.equalizer, found.sha256) == (type(equalizer).__name__, done.sha256)
    repeated = equalizer.equalize(copy.deepcopy(again), task, task.batches("calibration"), SCHEMES)
    assert repeated.sha256 == done.sha256
    tiny_state = found.apply(again).state_dict()
    assert all(torch.equal(tensor, tiny_state[name]) for name, tensor in model.state_dict().items())
    assert "high" in done.names
    assert done.names["high"] == ["act0", "act1"]


def test_it_finds_nothing_to_scale(equalizer, tiny):
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 6), nn.GELU(), nn.Linear(6, 5)).eval()
    task = tiny.task()
    with pytest.raises(InputError, match=r"finds no channels of Sequential that can be scaled"):
        equalizer.equalize(model, task, task.batches("calibration"), SCHEMES)


def test_a_network_for_batches_of_one_size(tiny):
    task, model = tiny.task(n=32), net()
    forward = model.forward
    model.forward = lambda x: forward(x.view(16, 2, 6, 6))
    before = outputs(model, task)
    assert CrossLayer().equalize(model, task, task.batches("calibration"), {}).tensors
    torch.testing.assert_close(outputs(model, task), before)


class Changing(nn.Module):
    """Does with large images what it does not do with small ones."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(72, 6), nn.Linear(6, 5)

    def forward(self, x):
        y = self.one(x.flatten(1))
        return self.two(y if x.abs().max() < 100 else y.sigmoid())


def test_what_holds_on_a_few_samples_alone_is_refused(equalizer, tiny):
    torch.manual_seed(0)
    model, task = Changing().eval(), tiny.task()
    with torch.no_grad():
        model.one.weight.mul_(torch.logspace(-1, 1, 6)[:, None])
    batches = [*task.batches("calibration"), (torch.full((2, 2, 6, 6), 200.0), torch.zeros(2, dtype=torch.int64))]
    with pytest.raises(InputError, match=r"would change the outputs of Changing by"):
        equalizer.equalize(model, task, batches, SCHEMES)


def test_cross_layer_gives_both_sides_of_a_channel_one_range(tiny):
    model, task = net(), tiny.task()
    CrossLayer(tolerance=1e-6, max_sweeps=1000).equalize(model, task, task.batches("calibration"), {})
    live = torch.arange(8) != 3
    for made, read in (("wide", "deep"), ("deep", "narrow"), ("up", "down")):
        of_outputs = weight_rows(model.get_submodule(made)).abs().flatten(1).amax(1)
        ranges = input_ranges(model.get_submodule(read), weight_rows(model.get_submodule(read)))
        keep = live if len(ranges) == 8 else slice(None)
        # Float16 keeps the bounds of ReLU6, and thereby the scales, to 1 in 2,000.
        torch.testing.assert_close(of_outputs[keep], ranges[keep], rtol=3e-3, atol=0)


def test_cross_layer_leaves_norms_alone(tiny):
    network = network_of(net(), tiny.task())
    assert "norm" in [link.producer for link in network.links]
    assert [link.producer for link in CrossLayer().usable(network)] == ["wide", "deep", "up"]


def test_smooth_quant_is_equation_4(tiny):
    task = tiny.task()
    model = net()
    network = network_of(model, task)
    (scale,) = [s for s, link in zip(SmoothQuant(0.3).scales(network), network.links, strict=True) if link.producer == "norm"]
    seen = []
    handle = model.up.register_forward_pre_hook(lambda _, args: seen.append(args[0].abs().amax((0, 1))))
    outputs(model, task, "calibration")
    handle.remove()
    weights = torch.cat([model.gate.weight, model.up.weight]).abs().amax(0)
    torch.testing.assert_close(scale, torch.stack(seen).amax(0) ** 0.3 / weights**0.7)


def test_smooth_quant_needs_inputs_that_are_quantized(tiny):
    task = tiny.task()
    with pytest.raises(InputError, match=r"no scheme of this run \(w3, w8\) quantizes any"):
        SmoothQuant().equalize(net(), task, task.batches("calibration"), {"w3": Integer(3), "w8": Integer(8)})


def test_awq_lowers_the_error_of_what_reads_the_channels(tiny):
    """Against the errors of the outputs themselves, layer by layer, on the calibration data."""
    task, scheme = tiny.task(n=60), Integer(3)
    model = net()

    def errors(model):
        seen, found = {}, {}
        for name in ("up", "gate", "down", "narrow"):
            module = model.get_submodule(name)
            handle = module.register_forward_hook(
                lambda m, args, out, name=name: seen.setdefault(name, []).append((args[0], out))
            )
            outputs(model, task, "calibration")
            handle.remove()
            rounded = copy.deepcopy(module)
            with torch.no_grad():
                rounded.weight.copy_(RoundToNearest().quantize(module.weight.detach(), scheme).dequantize())
                found[name] = sum(float((rounded(x) - out).square().sum()) for x, out in seen[name])
        return found

    before = errors(model)
    AWQ().equalize(model, task, task.batches("calibration"), {"w3": scheme})
    after = errors(model)
    assert after["up"] + after["gate"] < 0.7 * (before["up"] + before["gate"])
    assert after["down"] <= before["down"] * (1 + 1e-4)
    # The scales of "deep" as a consumer went through its rows, which have scales of their own.
    assert sum(after.values()) < sum(before.values())


@pytest.mark.parametrize(("make", "sentence"), [(lambda: SmoothQuant(1.5), "from 0 to 1"), (lambda: AWQ(1), "at least 2")])
def test_settings_that_make_no_sense(make, sentence):
    with pytest.raises(InputError, match=sentence):
        make()


def test_what_is_exported_is_the_equalized_network(tiny, tmp_path):
    """To the last bit what was scored, from the float network as it came, dequantized and packed."""
    task, model = tiny.task(), net()
    sha256, before = weights_sha256(model), outputs(model, task)
    done = SmoothQuant().equalize(model, task, task.batches("calibration"), SCHEMES)
    engine = tiny.engine(model, task, SCHEMES)
    e = SearchEvaluator(engine)(engine.space.uniform("w4a8"), "uniform")
    with engine.applied(e.allocation):
        scored = outputs(engine.model, task)
    assert (scored - before).abs().max() < 0.2 * before.abs().max()
    picked = Picked(e, {"search": e}, {}, "accuracy", sha256, (), done)
    path = Native().export(picked, engine, tmp_path)
    stored = load_file(next(tmp_path.glob("allocation-*.safetensors")))
    rest = sum(t.nbytes for n, t in model.state_dict().items() if "high" in n or n == "norm.weight" or n == "norm.bias")
    assert sum(tensor.nbytes for tensor in stored.values()) + rest == e.size_bytes
    exported = load_allocation(path)
    assert exported.data["equalization"]["equalizer"] == "SmoothQuant"
    assert "norm" in exported.data["equalization"]["outputs"]
    assert torch.equal(outputs(exported.apply(net()), task), scored)
    again = exported.pack(net())
    with packed(engine, e.allocation) as confirmed:
        expected = outputs(confirmed, task)
    assert torch.equal(outputs(again, task), expected)
    for file in (save(again, tmp_path / "one"), Packed().export(picked, engine, tmp_path / "two")):
        with torch.device("meta"):
            other = Net().eval()
        assert torch.equal(outputs(load(file, other), task), expected)
        assert sum(tensor.nbytes for tensor in load_file(file).values()) == e.size_bytes


def test_damage_is_a_sentence(tiny, tmp_path):
    task, model = tiny.task(), net()
    done = CrossLayer().equalize(model, task, task.batches("calibration"), {})
    with pytest.raises(InputError, match="does not exist"):
        load_equalization(tmp_path / "none")
    (tmp_path / "some").write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match="damaged"):
        load_equalization(tmp_path / "some")
    done.save(tmp_path / "some")
    content = (tmp_path / "some").read_bytes()
    for place in range(0, len(content), 97):  # of a byte with one flipped bit
        (tmp_path / "some").write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(InputError, match="some is damaged or was edited: "):
            load_equalization(tmp_path / "some")
    with pytest.raises(InputError, match="has no module 'act0'"):
        done.apply(nn.Sequential(nn.Linear(2, 2)))
    wrong = Equalization("CrossLayer", {"up.outputs": torch.ones(3)})
    with pytest.raises(InputError, match="'up' is not the module that was equalized"):
        wrong.apply(net())


def test_the_bound_of_each_channel_is_that_of_a_relu6_scaled():
    torch.manual_seed(0)
    x = (4 * torch.randn(3, 5, 4, 4)).requires_grad_()
    scale = torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0]).view(5, 1, 1)
    clip = ChannelClip((6 * scale).half())
    torch.testing.assert_close(clip(x * scale), F.relu6(x) * scale, rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(clip(x * scale).sum(), x)  # training goes through it
    torch.testing.assert_close(gradient, scale * ((x > 0) & (x < 6)))
