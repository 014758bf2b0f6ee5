"""The packed model: what it computes, what it weighs, that it can be kept in a file, and that the float model comes back."""

import copy
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from mpsearch.allocation import Allocation
from mpsearch.errors import InputError
from mpsearch.graph.fold import fold_batch_norms
from mpsearch.graph.unsearched import other_bits
from mpsearch.layer import kind_of
from mpsearch.models.digits import digits
from mpsearch.models.resnet import resnet
from mpsearch.packed.layers import Dequantized, PackedConv, PackedEmbedding, PackedLinear, PackedModule, kernel_for
from mpsearch.packed.model import QuantizedLayer, load, pack, packed, quantized_layers, save
from mpsearch.quantizers.base import InputMoments
from mpsearch.quantizers.round_to_nearest import RoundToNearest
from mpsearch.schemes.codebook import Codebook
from mpsearch.schemes.floating import Float
from mpsearch.schemes.histogram import Histogram
from mpsearch.schemes.integer import Integer
from mpsearch.schemes.outliers import Outliers
from mpsearch.schemes.rotated import Rotated
from mpsearch.tasks.cifar10 import Cifar10

A8, STATIC = {"bits": 8}, {"bits": 8, "scale": "static"}
SHIFTED = {"bits": 8, "scale": "static", "symmetric": False, "range": "mse"}
SCHEMES = {
    "w1": Integer(1),
    "w3": Integer(3, "tensor"),
    "w4g5": Integer(4, 5, symmetric=False),
    "w5f": Integer(5, scale_dtype="float32"),
    "w4a8": Integer(4, 32, symmetric=False, input=A8),
    "w8a8": Integer(8, input=STATIC),
    "w8a4": Integer(8, input={"bits": 4}),
    "w4a5u": Integer(4, 5, symmetric=False, input={"bits": 5, "symmetric": False}),
    "w3a7su": Integer(3, input={"bits": 7, "symmetric": False, "scale": "static"}),
    "w3a6t": Integer(3, input={"bits": 6, "scale": "tensor"}),
    "w8a8u": Integer(8, input={"bits": 8, "symmetric": False}),
    "w5a8s": Integer(5, input=SHIFTED),
    "w4a8t": Integer(4, "tensor", symmetric=False, input={"bits": 8, "scale": "tensor"}),
    "fp16": Float("float16"),
    "nf4": Codebook("nf4", 5),
    "mxfp4": Codebook("e2m1", 32, "e8m0"),
    "nvfp4": Codebook("e2m1", 16, "e4m3"),
    "ternary": Codebook("ternary", "tensor"),
    "fp8a8": Codebook("e4m3", "channel", "float32", {"levels": "e4m3", "scale": "static"}),
    "mxfp4a8": Codebook("e2m1", 32, "e8m0", {"levels": "e4m3", "scale": "mx"}),
    "nvfp4a4": Codebook("e2m1", 16, "e4m3", {"levels": "e2m1", "scale": "nv"}),
    "w4a8er": Rotated(Integer(4, input={"levels": "e4m3"})),
    "w4r": Rotated(Integer(4, 5, symmetric=False)),
    "w4a8r": Rotated(Integer(4, 32, symmetric=False, input=A8)),
    "w8a4r": Rotated(Integer(8, input={"bits": 4})),
    "w5a8sr": Rotated(Integer(5, input=SHIFTED)),
    "mxfp4r": Rotated(Codebook("e2m1", 32, "e8m0")),
    "w3o": Outliers(Integer(3, 5, symmetric=False), 0.1),
}


class Every(nn.Module):
    """Layers of every kind: kernels run some, others are dequantized; tied weights, a shared bias, a module under two names."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.first = nn.Conv2d(1, 6, 3, padding=1, stride=2)
        self.grouped = nn.Conv2d(6, 6, (3, 1), groups=2, padding="same", dilation=2, bias=False)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6, padding=1, padding_mode="reflect")
        self.line = nn.Conv1d(6, 7, 2, stride=2)
        self.up = nn.ConvTranspose1d(7, 4, 2)
        self.norm = nn.LayerNorm(12)
        self.one, self.other = nn.Linear(12, 12), nn.Linear(12, 12)
        self.other.weight, self.other.bias = self.one.weight, self.one.bias
        self.again = self.other
        self.head = nn.Linear(12, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        x = self.embed((x[:, 0].abs() * 10).long() % 11)[:, None]  # [n, 1, 6, 12]
        x = self.depthwise(self.grouped(F.relu(self.first(x))))  # [n, 6, 3, 6]
        x = self.up(self.line(x.flatten(2))).flatten(1)
        x = self.norm(x.unfold(1, 12, 12).mean(1))
        return self.head(F.relu(self.again(F.relu(self.one(x)))))[:, :5]


def every():
    torch.manual_seed(0)
    return Every().eval()


@pytest.fixture(scope="module")
def engine(tiny):
    return tiny.engine(every(), tiny.task(shape=(1, 6)), SCHEMES, quantizer=RoundToNearest())


@torch.no_grad()
def outputs(engine, model, split="search"):
    return torch.cat([engine.task.forward(model, x) for x, _ in engine.batches(split)])


def allocations(space):
    """Uniform ones, and one that gives each layer another scheme."""
    mixed = {
        group: names[(3 * i + 1) % len(names)] for i, (group, names) in enumerate(zip(space.names, space.choices, strict=True))
    }
    return [*map(space.uniform, space.scheme_names), Allocation(mixed)]


@pytest.mark.parametrize("index", range(len(SCHEMES) + 1))
@pytest.mark.thin(2)
def test_packed_and_simulated_agree(engine, tiny, index):
    allocation = allocations(engine.space)[index]
    before = tiny.state(engine.model)
    modules = dict(engine.model.named_modules(remove_duplicate=False))
    with engine.applied(allocation) as model:
        simulated = outputs(engine, model)
    with packed(engine, allocation) as model:
        ours = outputs(engine, model)
        assert sum(isinstance(m, PackedModule | Dequantized) for m in model.modules()) == 9
        for group, scheme in allocation.items():
            for name in engine.space.groups[engine.space.names.index(group)].layers[0].modules:
                assert torch.equal(model.get_submodule(name).weight, engine.swaps(group, scheme)[0][1])
    tiny.assert_same_state(engine.model, before)
    assert dict(engine.model.named_modules(remove_duplicate=False)) == modules
    assert not any(isinstance(m, Dequantized) or m._forward_pre_hooks for m in engine.model.modules())
    # A float product's last bits may move a value over the edge of a code of the next layer's input: a step there, no more.
    quantizes = any(SCHEMES[scheme].input_format for scheme in allocation.values())
    assert (ours - simulated).abs().max() <= (2e-2 if quantizes else 1e-5) * simulated.abs().max()


def test_what_runs(engine):
    with packed(engine, engine.space.uniform("w4a8")) as model:
        kinds = {name: type(module) for name, module in model.named_modules()}
        assert model.again is model.other
        assert model.one.data.data_ptr() == model.other.data.data_ptr(), "tied weights are held once"
        assert model.head.data.data_ptr() == model.embed.data.data_ptr()
    assert kinds["embed"] is PackedEmbedding
    assert kinds["one"] is kinds["head"] is PackedLinear
    assert kinds["first"] is kinds["grouped"] is kinds["depthwise"] is kinds["line"] is PackedConv
    assert issubclass(kinds["up"], Dequantized)
    assert issubclass(kinds["up"], nn.ConvTranspose1d)


@pytest.mark.parametrize(
    ("kind", "shape", "scheme", "op"),
    [
        ("linear", (4, 9), Integer(3), "linear"),
        ("linear", (4, 9), Integer(3, input=A8), "linear_a8"),
        ("linear", (4, 9), Integer(3, input={"bits": 4}), "linear_a8"),
        ("conv2d", (4, 9, 3, 3), Integer(3, input={"bits": 7, "symmetric": False}), "conv_a8"),
        ("linear", (4, 9), Integer(3, input={"bits": 16}), None),
        ("linear", (4, 9), Integer(3, input={"bits": 8, "scale": "tensor"}), "linear_a8"),
        ("linear", (4, 9), Integer(3, input={"bits": 8, "symmetric": False}), None),
        ("conv2d", (4, 9, 3, 3), Integer(3, input=SHIFTED), "conv_a8"),
        ("conv1d", (4, 9, 3), Integer(8, 7), "conv"),
        ("conv2d", (4, 9, 3, 3), Integer(8, input=STATIC), "conv_a8"),
        ("conv3d", (4, 9, 3, 3, 3), Integer(8), None),
        ("embedding", (4, 9), Integer(8, input=A8), "embedding"),
        ("linear", (4, 9), Float("bfloat16"), None),
        ("linear", (4, 9), Codebook("nf4"), None),
        ("linear", (4, 9), Outliers(Integer(4)), None),
        ("linear", (4, 9), Rotated(Integer(4, input=A8)), "linear_a8"),
        ("linear", (4, 9), Rotated(Integer(4, input={"bits": 4})), "linear_a8"),
        ("conv2d", (4, 9, 3, 3), Rotated(Integer(4)), None),
        ("linear", (1, 40_000), Integer(4), None),
        ("linear", (1, 40_000), Integer(4, 128), "linear"),
    ],
)
def test_which_layers_there_is_a_kernel_for(kind, shape, scheme, op):
    assert kernel_for(kind, shape, scheme) == op


OF_INPUT = [
    SHIFTED,
    {"bits": 8, "scale": "tensor"},
    {"bits": 4, "scale": "token", "symmetric": False},
    {"bits": 5, "scale": "static", "symmetric": False},
    {"bits": 4, "scale": "tensor", "symmetric": False},
]
LAYERS = {
    "linear": (lambda: nn.Linear(70, 9), (5, 70)),
    "no bias": (lambda: nn.Linear(70, 9, bias=False), (5, 70)),
    "padded": (lambda: nn.Conv2d(3, 8, 3, padding=1, stride=2), (5, 3, 9, 8)),
    "same": (lambda: nn.Conv2d(4, 6, (5, 2), padding="same", dilation=(1, 2), groups=2), (5, 4, 9, 8)),
    "reflect": (lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="reflect", bias=False), (5, 4, 9)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("input_params", OF_INPUT, ids=lambda of: f"{of['scale']}{of['bits']}")
@pytest.mark.parametrize("offset", [-3.0, 0.4, 5.0])
@pytest.mark.thin(3)
def test_a_layer_on_its_own_input_is_what_is_simulated(tiny, name, input_params, offset):
    """To float rounding, as no code of its input can differ; padding stays 0, which is no middle code."""
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    layer = make().eval()
    x = torch.randn(shape) + offset
    x[0].clamp_(min=0)
    weight = RoundToNearest().quantize(
        layer.weight.detach(),
        scheme := Integer(4, 16, symmetric=False, input=input_params),
        moments_of(Histogram.from_values(x[:3])),
    )
    n_inner = 1 if isinstance(layer, nn.Linear) else x.dim() - 1
    fake = scheme.input.fake_quantize(x, n_inner, weight.input_params)
    expected = torch.func.functional_call(layer, {"weight": weight.dequantize()}, fake)
    model = pack(nn.Sequential(copy.deepcopy(layer)), [QuantizedLayer(kind_of(layer), ("0",), weight, {})])
    assert isinstance(model[0], PackedModule)
    assert (model(x) - expected).abs().max() <= 3e-5 * expected.abs().max()
    assert torch.equal(model[0].weight, weight.dequantize())
    if input_params["scale"] != "tensor":
        x[1] = torch.nan
        assert model(x)[1].isnan().all()
        assert torch.isfinite(model(x)[0]).all()
    else:
        x[1].view(-1)[0] = torch.inf
        assert model(x).isnan().all()
        tiny_x = torch.full_like(x, 1e-40)
        assert torch.equal(model(tiny_x), model(torch.zeros_like(x)))


def moments_of(histogram):
    """What calibration tells, of the histogram alone; the same of the rotated input."""
    moments = InputMoments(None, None, 1, histogram)
    return replace(moments, rotated=moments)


@pytest.mark.parametrize("index", range(len(SCHEMES) + 1))
@pytest.mark.thin(4)
def test_a_packed_model_is_kept_in_a_file(engine, tmp_path, index):
    allocation = allocations(engine.space)[index]
    model = pack(copy.deepcopy(engine.model), quantized_layers(engine, allocation))
    path = save(model, tmp_path / "new" / "model.safetensors")
    space = engine.space
    counted = space.size_bits(space.choice(allocation)) / 8
    assert sum(tensor.nbytes for tensor in load_file(path).values()) == counted, "what the file holds is what was counted"
    assert [file.name for file in path.parent.iterdir()] == ["model.safetensors"]
    for other in (every(), on_meta(Every)):
        loaded = load(path, other)
        assert loaded is other
        assert torch.equal(outputs(engine, loaded), outputs(engine, model))
        assert {name for name, _ in loaded.named_buffers()} == {name for name, _ in model.named_buffers()}
        assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))


def on_meta(build):
    with torch.device("meta"):
        return build().eval()


@pytest.mark.slow  # compiles by PyTorch's inductor
@pytest.mark.parametrize("scheme", ["w4g5", "w8a8", "fp16", "nf4", "nvfp4", "w3o", "w4r", "w4a8r", "w8a4r"])
def test_compiled_and_exported(engine, scheme):
    """Every op is opaque to both: no graph breaks, the same result to the last bit."""
    torch._dynamo.reset()  # else the schemes together reach its limit of versions
    model = pack(copy.deepcopy(engine.model), quantized_layers(engine, engine.space.uniform(scheme)))
    x, _ = engine.batches("search")[0]
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), expected)
        assert torch.equal(torch.export.export(model, (x,)).module()(x), expected)


def test_folds_are_kept(tiny, tmp_path):
    engine = tiny.digits({"w4": Integer(4), "w4a8": Integer(4, input=A8)})
    float_model = digits()
    names = {id(module): name for name, module in float_model.named_modules()}

    folds = fold_batch_norms(digits(), engine.task.forward, engine.task.batches("calibration")[0][0])
    assert folds
    assert names
    allocation = engine.space.uniform("w4a8")
    model = pack(float_model, quantized_layers(engine, allocation), folds)
    with packed(engine, allocation) as within:
        assert torch.equal(outputs(engine, model), outputs(engine, within))
    loaded = load(save(model, tmp_path / "digits.safetensors"), digits())
    assert torch.equal(outputs(engine, loaded), outputs(engine, model))


def test_the_digits_are_told_as_by_the_simulated_model(trained):
    """On 99.9 % of the images the same digit, logits within float rounding."""
    for scheme in ("w2", "w4", "w8"):
        allocation = trained.space.uniform(scheme)
        with trained.applied(allocation) as model:
            simulated = outputs(trained, model, "confirm")
        with packed(trained, allocation) as model:
            ours = outputs(trained, model, "confirm")
        assert (ours.argmax(-1) == simulated.argmax(-1)).float().mean() >= 0.999
        assert torch.allclose(ours, simulated, rtol=1e-4, atol=1e-4 * simulated.abs().max())


def test_own_forward_and_hooks_are_kept(tiny):
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    net = nn.Sequential(nn.Flatten(), Own(6, 8), nn.Linear(8, 5)).eval()
    calls = []
    net[2].register_forward_hook(lambda *args: calls.append(args))
    engine = tiny.engine(net, tiny.task(shape=(1, 6)), {"w4": Integer(4)})
    with packed(engine, engine.space.uniform("w4")) as model:
        ours = outputs(engine, model)
        assert all(isinstance(model[i], Dequantized) for i in (1, 2))
        assert calls
    with engine.applied(engine.space.uniform("w4")) as model:
        assert torch.equal(outputs(engine, model), ours)
    assert type(net[1]) is Own


def test_a_layer_alone_is_packed_too(tiny):
    net = nn.Linear(6, 5).eval()
    weight = RoundToNearest().quantize(net.weight.detach(), Integer(8))
    x = torch.randn(3, 6)
    with torch.no_grad():
        assert torch.equal(pack(net, [QuantizedLayer("linear", ("",), weight)])(x), F.linear(x, weight.dequantize(), net.bias))


@pytest.mark.parametrize("scheme", ["w1", "w4g5", "w5f", "fp16"])
def test_memory_is_what_was_counted(engine, scheme):
    """Beside padding: rows of a kernel's weight to 16, groups to 32 columns, a header of 64 or 128 bytes a tile and group."""
    model = pack(copy.deepcopy(engine.model), quantized_layers(engine, engine.space.uniform(scheme)))
    held = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    space = engine.space
    assert sum(held.values()) >= space.size_bits(space.choice(space.uniform(scheme))) / 8 - other_bits(every(), space.layers) / 8


RSS = """
import sys, torch
from torch import nn
from mpsearch.packed.model import load
def rss():
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1])
with torch.device("meta"):
    net = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(6))).eval()
with torch.device("meta"):
    small = nn.Sequential(nn.Linear(64, 64)).eval()
load(sys.argv[2], small)  # what is loaded once: code
before = rss()
load(sys.argv[1], net)
print(rss() - before)
"""


@pytest.mark.slow
def test_a_loaded_model_takes_the_memory_that_was_counted(tmp_path):
    """Six layers of 2048 x 2048: 100 MB in float32, 13 MB at 4 bits; 12 MB more is what is left of the work on one layer."""
    torch.manual_seed(0)
    paths, counted = [], 0
    for n, width in ((6, 2048), (1, 64)):
        net = nn.Sequential(*(nn.Linear(width, width) for _ in range(n))).eval()
        weights = [RoundToNearest().quantize(layer.weight.detach(), Integer(4, 128, symmetric=False)) for layer in net]
        layers = [QuantizedLayer("linear", (str(i),), weight) for i, weight in enumerate(weights)]
        counted = counted or sum(weight.nbytes + 4 * width for weight in weights)
        paths.append(str(save(pack(net, layers), tmp_path / f"{width}.safetensors")))
    done = subprocess.run([sys.executable, "-c", RSS, *paths], capture_output=True, text=True, check=True)
    assert counted < int(done.stdout) < 1.1 * counted + 12e6


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda path: path.unlink(), "does not exist"),
        (lambda path: path.write_bytes(b"no tensors"), "is damaged"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "is damaged"),
        (lambda path: save_file({"x": torch.zeros(1)}, path), "is no packed model of mpsearch"),
    ],
)
def test_a_file_that_cannot_be_read(engine, tmp_path, spoil, sentence):
    model = pack(copy.deepcopy(engine.model), quantized_layers(engine, engine.space.uniform("w4a8")))
    path = save(model, tmp_path / "model.safetensors")
    spoil(path)
    with pytest.raises(InputError, match=sentence):
        load(path, every())


def test_another_network_is_refused(engine, tmp_path):
    path = save(
        pack(copy.deepcopy(engine.model), quantized_layers(engine, engine.space.uniform("w1"))), tmp_path / "model.safetensors"
    )
    with pytest.raises(InputError, match="belongs to another model: this Linear has no module '"):
        load(path, nn.Linear(3, 3))
    other = every()
    other.embed = nn.Embedding(11, 13)
    with pytest.raises(
        InputError, match=r"the layer 'embed' is a embedding with a weight of shape \[11, 12\] .* has a embedding \[11, 13\]"
    ):
        load(path, other)
    other = every()
    other.norm = nn.LayerNorm(12, bias=False)
    with pytest.raises(InputError, match=r"0 tensors are missing and 1 unknown, such as 'norm.bias'"):
        load(path, other)
    with pytest.raises(InputError, match="is not packed"):
        save(every(), tmp_path / "float.safetensors")


def test_groups_that_are_left_out_stay_float(engine):
    with packed(engine, Allocation({"one": "w8a8"})) as model:
        assert isinstance(model.one, PackedLinear)
        assert type(model.first) is nn.Conv2d


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("schemes", [("w4", "w8"), ("w4a8", "w8a8")], ids="-".join)
def test_resnet20_tells_the_same_packed_and_simulated(tiny, data_dir, schemes):
    """Uniform and mixed: the same class on at least 99.9 % of 2,000 test images.

    With quantized inputs, of those whose two largest logits differ by more than 0.2: a value on the edge of two codes, which the
    order of float32 sums decides on each machine, moves logits by up to 0.4.
    """
    every = {name: Integer(int(name[1]), input=A8 if "a8" in name else None) for name in schemes}
    net = resnet(20, data_dir / "cifar10" / "resnet20.safetensors")
    task = Cifar10(str(data_dir / "cifar10"), n_calibration=100, n_search=100, n_confirm=2000, seed=0)
    fold_batch_norms(net, task.forward, task.batches("calibration")[0][0])
    engine = tiny.engine(net, task, every, quantizer=RoundToNearest())
    mixed = engine.space.allocation([i % 2 for i in range(len(engine.space.groups))])
    for allocation in (engine.space.uniform(schemes[0]), mixed):
        with engine.applied(allocation) as model:
            simulated = outputs(engine, model, "confirm")
        with packed(engine, allocation) as model:
            assert all(isinstance(m, PackedModule) for m in model.modules() if hasattr(m, "scheme"))
            ours = outputs(engine, model, "confirm")
        first, second = simulated.topk(2, dim=-1).values.unbind(-1)
        decided = first - second > (0.2 if every[schemes[0]].input_format else 0.0)
        assert decided.float().mean() > 0.98
        assert (ours.argmax(-1) == simulated.argmax(-1))[decided].float().mean() >= 0.999


class Bounded(nn.Module):
    """Rows of the embedding are scaled to a norm of at most 1 when they are looked up."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 12, max_norm=1.0)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        return self.head(self.embed((x.flatten(1).abs() * 10).long() % 11).mean(1))


def test_an_embedding_with_a_largest_norm_keeps_it(tiny):
    torch.manual_seed(0)
    engine = tiny.engine(Bounded().eval(), tiny.task(shape=(6,)), {"w4": Integer(4)}, quantizer=RoundToNearest())
    weight = engine.quantized("embed", "w4").dequantize()
    assert weight.norm(dim=1).max() > 1.0001, "quantized, rows are longer than allowed"
    head = engine.quantized("head", "w4").dequantize()
    rows = weight / weight.norm(dim=1, keepdim=True).clamp(min=1)
    allocation = engine.space.uniform("w4")
    bias = engine.biases("head", "w4")["head"]
    expected = [F.linear(rows[(x.flatten(1).abs() * 10).long() % 11].mean(1), head, bias) for x, _ in engine.batches("search")]
    with packed(engine, allocation) as model:
        assert torch.allclose(outputs(engine, model), torch.cat(expected), atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:You are using the legacy TorchScript")
def test_a_traced_graph_is_refused(engine, tmp_path):
    """Its kernels would become constants, without a word."""
    x, _ = engine.batches("search")[0]
    with packed(engine, engine.space.uniform("w4g5")) as model:
        with pytest.raises(InputError, match="A packed model cannot be traced"):
            torch.jit.trace(model, x)
        with pytest.raises(InputError, match="A packed model cannot be traced"):
            torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=False)
        model(x)


class Positions(nn.Module):
    """With a buffer that is computed and not stored."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("positions", torch.arange(4.0), persistent=False)

    def forward(self, x):
        return self.fc(x + self.positions)


def test_buffers_that_no_file_holds_are_named(tmp_path):
    model = Positions().eval()
    weight = RoundToNearest().quantize(model.fc.weight.detach(), SCHEMES["w3"])
    path = save(pack(model, [QuantizedLayer("linear", ("fc",), weight)]), tmp_path / "model.safetensors")
    assert torch.equal(load(path, Positions())(torch.ones(1, 4)), model(torch.ones(1, 4)))
    with pytest.raises(InputError, match=r"This Positions computes 'positions' when it is built .* Build the network on the CPU"):
        load(path, on_meta(Positions))
