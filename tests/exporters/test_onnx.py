"""ONNX files: ONNX Runtime computes what was scored, for any batch size, and runs integer products where inputs are quantized."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mpsearch
from mpsearch.errors import InputError
from mpsearch.exporters.base import ModelCall, Picked
from mpsearch.exporters.onnx import ONNX
from mpsearch.exporters.onnx_trace import traced
from mpsearch.graph.shared_copy import shared_copy
from mpsearch.graph.trace import first_samples
from mpsearch.pipeline.prepare import prepare
from mpsearch.registry import resolve
from mpsearch.schemes.input import IntegerInput
from mpsearch.schemes.integer import Integer

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.filterwarnings("ignore")


class Words(nn.Module):
    """Token ids [n, 12] and their mask -> logits [n, 5]: an embedding, a Conv1d, Linear layers with and without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(40, 64), nn.Conv1d(64, 64, 3, padding=1)
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64, bias=False)
        self.head = nn.Linear(64, 5)

    def forward(self, ids, mask):
        x = self.embed(ids)
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.down(F.gelu(self.up(x)))
        return {"logits": 4 * self.head((x * mask[..., None]).mean(1))}


class WordsTask(mpsearch.Task):
    divergence, against_float = "softmax_kl", True

    def batches(self, split):
        generator = torch.Generator().manual_seed(len(split))
        ids = torch.randint(40, (20, 12), generator=generator)
        mask = (torch.arange(12) < torch.randint(3, 13, (20, 1), generator=generator)).float()
        return [({"ids": ids[:12], "mask": mask[:12]}, torch.zeros(12)), ({"ids": ids[12:], "mask": mask[12:]}, torch.zeros(8))]

    def forward(self, model, inputs):
        return model(**inputs)["logits"]


def words():
    torch.manual_seed(3)
    return Words().eval()


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """(prepared, engine) with the schemes of the tests."""
    static = {
        f"s8{'u' if not symmetric else ''}": Integer(8, input=IntegerInput(8, "static", symmetric)) for symmetric in (True, False)
    }
    schemes = {
        **static,
        **{f"b{bits}": Integer(bits, 32, symmetric=bits != 4) for bits in (2, 4, 8)},
        "w4": resolve("scheme", "w4"),
        "fp32": resolve("scheme", "fp32"),
    }
    prepared = prepare(words(), WordsTask(), schemes=schemes, quantizer="round_to_nearest", runtime="onnxruntime")
    return prepared, prepared.engine(tmp_path_factory.mktemp("bank"))


def exported(case, choice, folder, exporter=None):
    """`choice`: a scheme for the Linear layers, "w4" elsewhere."""
    prepared, engine = case
    exporter = exporter or ONNX()
    kinds = {group.name: group.layers[0].kind for group in engine.space.groups}
    allocation = mpsearch.Allocation({name: choice if kind == "linear" else "w4" for name, kind in kinds.items()})
    call = ModelCall.record(engine.model, prepared.task.forward, first_samples(prepared.calibration[0][0], 2))
    e = type("E", (), {"allocation": allocation})
    path = exporter.export(Picked(e, {}, {}, "agreement", "", (), None, call), engine, folder)
    return exporter, path, allocation


@torch.no_grad()
def outputs_of(engine, model):
    return torch.cat([engine.task.forward(model, inputs) for inputs, _ in engine.batches("confirm")])


def operators(path):
    return {node.op_type for node in onnx.load(str(path)).graph.node}


@pytest.mark.parametrize("choice", ["w4", "b2", "b4", "b8", "s8", "s8u"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_runtime_computes_what_was_scored(case, tmp_path, choice, packed):
    if packed and choice[0] != "b":
        pytest.skip("no blocks")
    _, engine = case
    exporter, path, allocation = exported(case, choice, tmp_path, ONNX(packed_products=packed))
    decoded = exporter.decode(path, words())
    for group in engine.space.groups:
        expected = engine.quantized(group.name, allocation[group.name]).dequantize()
        assert torch.equal(decoded[group.name], expected), group.name
    opened = exporter.open(path, words())
    outputs = outputs_of(engine, opened)
    with engine.applied(allocation) as model:
        ours = outputs_of(engine, model)
    assert len(outputs) == 20, "batches of another size than the one that was traced"
    tolerance = 1e-4 if choice[0] != "s" else 1e-2  # a code of the input may differ by one
    assert (outputs - ours).abs().max() <= tolerance * ours.abs().max()
    if choice[0] == "s":
        assert "MatMulInteger" in operators(path)
    assert ("MatMulNBits" in operators(path)) == packed
    assert "DequantizeLinear" not in operators(path), "it would be computed at each call"


class Residual(nn.Module):
    """Images [n, 3, 16, 16] -> logits [n, 5]: convolutions behind activations, pooling and padding, and around an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.next = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3)
        self.depthwise, self.project = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 32, 1)
        self.expand, self.last, self.head = nn.Conv2d(32, 16, 1), nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        x = F.hardtanh(self.next(F.pad(x, (1, 1, 1, 1))), 0, 0.3)
        x = self.expand(self.project(F.relu6(self.depthwise(x))))
        return self.head(F.relu(x + self.last(F.relu(x))).mean((2, 3)))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("chosen", ["minmax", "mse"])
def test_convolutions_with_quantized_outputs_are_integer_kernels(tmp_path, symmetric, chosen):
    """Without its fusions ONNX Runtime computes what was scored; with them it rounds biases, by which a few codes differ."""
    import onnxruntime

    torch.manual_seed(1)
    net = Residual().eval()
    task = mpsearch.fidelity_task(**{split: [torch.randn(16, 3, 16, 16)] for split in ("calibration", "search", "confirm")})
    schemes = {"s8": Integer(8, input=IntegerInput(8, "static", symmetric, chosen)), "w8": Integer(8)}
    prepared = prepare(net, task, schemes=schemes, quantizer="round_to_nearest", runtime="onnxruntime")
    engine = prepared.engine(tmp_path / "bank")
    e = type("E", (), {"allocation": engine.space.uniform("s8")})
    call = ModelCall.record(engine.model, task.forward, first_samples(prepared.calibration[0][0], 2))
    path = ONNX().export(Picked(e, {}, {}, "agreement", "", (), None, call), engine, tmp_path)
    decoded = ONNX().decode(path, net)
    for group in engine.space.groups:
        assert torch.equal(decoded[group.name], engine.quantized(group.name, "s8").dequantize()), group.name
    with engine.applied(e.allocation) as model:
        ours = outputs_of(engine, model)

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    onnxruntime.InferenceSession(str(path), options)
    fused = [node.op_type for node in onnx.load(str(tmp_path / "fused.onnx")).graph.node]
    assert (fused.count("QLinearConv"), fused.count("Conv") + fused.count("FusedConv")) == (4, 2)
    assert "Pad" not in operators(path)
    opened = ONNX().open(path, net)
    assert (outputs_of(engine, opened) - ours).abs().max() <= 2e-2 * ours.abs().max()
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    opened.session.session = onnxruntime.InferenceSession(str(path), options)
    assert (outputs_of(engine, opened) - ours).abs().max() <= 2e-3 * ours.abs().max(), "a code of the input"


def test_biases_are_the_corrected_ones(case, tmp_path):
    _, engine = case
    _, path, _ = exported(case, "b2", tmp_path)
    (stored,) = (tensor for tensor in onnx.load(str(path)).graph.initializer if tensor.name == "up.bias")
    corrected = engine.biases("up", "b2")["up"]
    assert torch.equal(torch.from_numpy(onnx.numpy_helper.to_array(stored).copy()), corrected)
    assert not torch.equal(corrected, engine.model.get_submodule("up").bias)


def test_tensors_of_more_than_two_gigabytes_are_next_to_the_graph(case, tmp_path, monkeypatch):
    exporter, path, allocation = exported(case, "b8", tmp_path / "one")
    monkeypatch.setattr("mpsearch.exporters.onnx.MOST_BYTES", 1000)
    _, other, _ = exported(case, "b8", tmp_path / "two")
    (data,) = (file for file in exporter.files(other) if file != other)
    assert data.suffix == ".data"
    assert data.stat().st_size > 1000
    assert other.stat().st_size < path.stat().st_size - 1000
    _, engine = case
    results = [outputs_of(engine, exporter.open(file, words())) for file in (path, other)]
    assert torch.equal(*results)
    one, two = exporter.decode(path, words()), exporter.decode(other, words())
    assert all(torch.equal(one[name], two[name]) for name in allocation)
    exported(case, "b8", tmp_path / "two")
    assert len(exporter.files(other)) == 2, "the same tensors have the same name"


def test_inputs_and_outputs_have_names_and_a_free_batch(case, tmp_path):
    _, path, _ = exported(case, "w4", tmp_path)
    graph = onnx.load(str(path)).graph
    assert [value.name for value in graph.input] == ["ids", "mask"]
    assert [value.name for value in graph.output] == ["logits"]
    assert all(dim.dim_param for value in graph.input for dim in value.type.tensor_type.shape.dim)
    x = torch.randint(40, (3, 9)), torch.ones(3, 9)
    with torch.no_grad():
        assert ONNX().open(path, words())(*x)["logits"].shape == (3, 5), "another length than the one that was traced"
    n_stored = sum(len(tensor.raw_data) for tensor in graph.initializer)
    assert path.stat().st_size < n_stored + 200 * len(graph.node), "without stack traces"


@pytest.mark.parametrize("runtime", ["onnxruntime"])
def test_from_a_search_to_a_verified_file(tiny, undrawn, tmp_path, runtime):
    """With folded batch norms, equalized channels and refined weights."""
    options = {"schemes": ["w2", "w4", "w8", "w3"], "equalizer": "cross_layer", "n_trials": 6, "n_seeds": 3, "runtime": runtime}
    result = mpsearch.search(tiny.net(), tiny.task(), verify=True, confirm_points=2, folder=tmp_path / "run", **options)
    assert "w3" not in result.run.space.schemes
    assert result.run.exporter == "onnx"
    (verified,) = result.verified
    assert (verified.exporter, verified.runtime) == ("onnx", "onnxruntime")
    assert verified.loss == pytest.approx(verified.packed_loss, rel=1e-3, abs=1e-6)
    path = tmp_path / "run" / "onnx" / "model.onnx"
    assert verified.file_bytes == path.stat().st_size
    assert [file.name for file in path.parent.iterdir() if not file.name.startswith(".")] == ["model.onnx"]


def test_what_has_no_form_is_refused(case, tiny, tmp_path):
    engine = tiny.engine(tiny.net(), tiny.task(), {"w3": Integer(3)})
    e = type("E", (), {"allocation": engine.space.uniform("w3")})
    with pytest.raises(InputError, match=r"Layer 'first' \(conv2d\) in scheme 'w3' .* has no form in the files of onnxruntime"):
        ONNX().export(Picked(e, {}, {}, "accuracy", "", ()), engine, tmp_path)
    e.allocation = case[1].space.uniform("w4")
    with pytest.raises(InputError, match="samples of the task's data, which are absent"):
        ONNX().export(Picked(e, {}, {}, "accuracy", "", ()), case[1], tmp_path)
    assert not list(tmp_path.iterdir())


class Strange(nn.Module):
    def forward(self, x):
        return torch.special.zeta(2 + x.abs(), 1.0)


class Branching(nn.Module):
    def forward(self, x):
        return x + 1 if float(x.sum()) > 0 else x


@pytest.mark.parametrize(
    ("model", "said"), [(Strange(), r"its operator prims.zeta has no form in ONNX"), (Branching(), "cannot trace it")]
)
def test_a_model_that_cannot_be_traced_is_one_sentence(model, said):
    with pytest.raises(InputError, match=said) as raised:
        traced(model.eval(), ModelCall((torch.randn(2, 3),), {}), opset=21)
    assert "\n" not in str(raised.value)


def test_a_full_disk_leaves_the_earlier_file(case, tmp_path, monkeypatch):
    _, path, _ = exported(case, "w4", tmp_path)
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="no space is left on the disk"):
        exported(case, "b8", tmp_path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_a_damaged_file_is_one_sentence(case, tmp_path):
    exporter, path, _ = exported(case, "w4", tmp_path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match="ONNX Runtime cannot open"):
        exporter.open(path, shared_copy(case[0].original))


def test_a_missing_package_is_named_with_the_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxruntime" else name)
    with pytest.raises(InputError, match=r"needs the package onnxruntime: pip install 'mpsearch\[onnxruntime\]'"):
        ONNX().check_installed()
