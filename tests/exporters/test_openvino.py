"""OpenVINO IR: OpenVINO computes what was scored, also where inputs of convolutions are quantized."""

import numpy as np
import pytest
import torch

import mpsearch
from mpsearch.errors import InputError
from mpsearch.exporters.base import ModelCall, Picked
from mpsearch.exporters.openvino import OpenVINO, Request, saturates
from mpsearch.graph.trace import first_samples
from mpsearch.pipeline.prepare import prepare
from mpsearch.schemes.floating import Float
from mpsearch.schemes.input import IntegerInput
from mpsearch.schemes.integer import Integer
from tests.exporters.test_onnx import WordsTask, outputs_of, words

pytest.importorskip("openvino")

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    schemes = {
        "s8": Integer(8, input=IntegerInput(8, "static")),
        **{f"w{bits}": Integer(bits, 32 if bits > 3 else "channel", symmetric=bits != 6) for bits in (2, 3, 4, 6, 8)},
        "fp32": Float("float32"),
    }
    prepared = prepare(words(), WordsTask(), schemes=schemes, quantizer="round_to_nearest", runtime="openvino")
    return prepared.engine(tmp_path_factory.mktemp("bank"))


def exported(engine, choice, folder):
    allowed = zip(engine.space.names, engine.space.choices, strict=True)  # no static inputs of embeddings
    allocation = mpsearch.Allocation({name: choice if choice in choices else "w8" for name, choices in allowed})
    call = ModelCall.record(engine.model, engine.task.forward, first_samples(engine.batches("calibration")[0][0], 2))
    e = type("E", (), {"allocation": allocation})
    return OpenVINO().export(Picked(e, {}, {}, "agreement", "", (), None, call), engine, folder), allocation


@pytest.mark.parametrize("choice", ["w2", "w3", "w4", "w6", "w8", "s8"])
def test_the_runtime_computes_what_was_scored(engine, tmp_path, choice):
    path, allocation = exported(engine, choice, tmp_path)
    outputs = outputs_of(engine, OpenVINO().open(path, words()))
    with engine.applied(allocation) as model:
        ours = outputs_of(engine, model)
    assert (outputs - ours).abs().max() <= (1e-2 if choice[0] == "s" else 1e-4) * ours.abs().max()
    decoded = OpenVINO().decode(path, words())
    for name, scheme in allocation.items():
        assert torch.equal(decoded[name], engine.quantized(name, scheme).dequantize()), name
    assert path.read_text().count('type="FakeQuantize"') == (4 if choice[0] == "s" else 0)


LAYERS = {
    "linear": (lambda: torch.nn.Linear(24, 16), (24,)),
    "padded": (lambda: torch.nn.Conv2d(16, 16, 3, padding=1), (16, 8, 8)),
    "strided": (lambda: torch.nn.Conv2d(3, 16, 3, stride=2), (3, 9, 9)),
    "depthwise": (lambda: torch.nn.Conv2d(16, 16, 3, padding=1, groups=16), (16, 8, 8)),
    "of sequences": (lambda: torch.nn.Conv1d(16, 24, 3, padding=1), (16, 20)),
}


@pytest.mark.parametrize("before", [torch.nn.Identity, torch.nn.ReLU])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_with_quantized_inputs_run_in_integers_exactly(tmp_path, name, symmetric, before):
    make, shape = LAYERS[name]

    def net():
        torch.manual_seed(0)
        return torch.nn.Sequential(before(), make(), torch.nn.Flatten()).eval()

    x = torch.randn(24, *shape, generator=torch.Generator().manual_seed(0))
    task = mpsearch.fidelity_task(calibration=x[:8], search=x[8:16] * 2, confirm=x[16:])
    schemes = {"a8": Integer(8, input=IntegerInput(8, "static", symmetric, "mse"))}
    engine = prepare(net(), task, schemes=schemes, quantizer="round_to_nearest", runtime="openvino").engine(tmp_path)
    path, allocation = exported(engine, "a8", tmp_path / "exported")
    request = Request(path)
    with engine.applied(allocation) as model, torch.no_grad():
        ours = model(x * 2)  # some of it is beyond the range
    (theirs,) = request([(x * 2).numpy()])
    assert np.abs(theirs - ours.numpy()).max() <= 1e-5 * ours.abs().max()
    assert path.read_text().count('type="FakeQuantize"') == 1
    if not saturates():
        about = [op.get_rt_info() for op in request.compiled.get_runtime_model().get_ops()]
        (kernel,) = (
            info["primitiveType"].astype(str)
            for info in about
            if info["layerType"].astype(str) in ("Convolution", "FullyConnected", "GroupConvolution")
        )
        assert kernel.lower().endswith("i8"), kernel


def test_from_a_search_to_a_verified_file(tiny, undrawn, tmp_path):
    options = {"schemes": ["w3", "w6", "w5"], "equalizer": "cross_layer", "n_trials": 4, "n_seeds": 2, "runtime": "openvino"}
    result = mpsearch.search(tiny.net(), tiny.task(), verify=True, confirm_points=1, folder=tmp_path / "run", **options)
    assert "w5" not in result.run.space.schemes
    (verified,) = result.verified
    assert (verified.exporter, verified.runtime) == ("openvino", "openvino")
    assert verified.loss == pytest.approx(verified.packed_loss, rel=1e-3, abs=1e-6)
    assert verified.file_bytes == (tmp_path / "run" / "openvino" / "model.bin").stat().st_size


def test_a_damaged_file_and_a_folder_that_cannot_be_written_are_one_sentence(engine, tmp_path):
    path, _ = exported(engine, "w4", tmp_path)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(InputError, match="OpenVINO cannot open"):
        OpenVINO().open(path, words())
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        exported(engine, "w4", tmp_path / "file")


def test_a_missing_package_is_named_with_the_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "openvino" else name)
    with pytest.raises(InputError, match=r"needs the package openvino: pip install 'mpsearch\[openvino\]'"):
        OpenVINO().check_installed()
