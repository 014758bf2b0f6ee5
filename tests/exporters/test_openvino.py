"""OpenVINO IR: OpenVINO computes what was scored, also where inputs of convolutions are quantized."""

import pytest
import torch

import mpsearch
from mpsearch.errors import InputError
from mpsearch.exporters.base import ModelCall, Picked
from mpsearch.exporters.openvino import OpenVINO
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
    allowed = zip(engine.space.names, engine.space.choices, strict=True)  # no static inputs of embeddings and 1-D convolutions
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
    assert path.read_text().count('type="FakeQuantize"') == (3 if choice[0] == "s" else 0)


@pytest.mark.parametrize("padding", [0, 1])
def test_convolutions_of_images_run_in_integers(tmp_path, padding):
    def net():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Conv2d(16, 16, 3, padding=padding), torch.nn.Flatten()).eval()

    x = torch.randn(24, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    task = mpsearch.fidelity_task(calibration=x[:8], search=x[8:16], confirm=x[16:])
    prepared = prepare(net(), task, schemes=["w8a8_static"], quantizer="round_to_nearest", runtime="openvino")
    engine = prepared.engine(tmp_path)
    path, allocation = exported(engine, "w8a8_static", tmp_path / "exported")
    outputs = outputs_of(engine, OpenVINO().open(path, net()))
    with engine.applied(allocation) as model:
        ours = outputs_of(engine, model)
    assert (outputs - ours).abs().max() <= 1e-5 * ours.abs().max()
    assert path.read_text().count('type="FakeQuantize"') == 1


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
