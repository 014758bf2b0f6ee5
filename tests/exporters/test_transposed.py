"""Transposed convolutions, whose weights have input channels first, in the files of runtimes that open graphs."""

import pytest
import torch
from torch import nn

import mpsearch
from mpsearch.exporters.base import ModelCall, Picked
from mpsearch.graph.trace import first_samples
from mpsearch.pipeline.prepare import prepare
from mpsearch.registry import resolve
from mpsearch.schemes.input import IntegerInput
from mpsearch.schemes.integer import Integer

pytestmark = pytest.mark.filterwarnings("ignore")


def net():
    torch.manual_seed(0)
    up = [nn.ConvTranspose2d(16, 24, 3, stride=2, groups=4, bias=False), nn.Hardswish(), nn.ConvTranspose2d(24, 8, 2, stride=2)]
    return nn.Sequential(nn.Conv2d(4, 16, 1), nn.ReLU(), *up, nn.Flatten()).eval()


@pytest.mark.parametrize("scheme", [Integer(8), Integer(4), Integer(2, 16), Integer(8, 8, symmetric=False)], ids=str)
@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_the_runtime_computes_what_was_scored(name, scheme, tmp_path):
    exporter = resolve("exporter", name)
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime" if name == "onnx" else "openvino")
    x = torch.randn(12, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    task = mpsearch.fidelity_task(calibration=x[:4], search=x[4:8], confirm=x[8:])
    schemes = {"w": scheme, "w8": Integer(8), "a8": Integer(8, input=IntegerInput(8, "static"))}
    engine = prepare(net(), task, schemes=schemes, quantizer="round_to_nearest", runtime=exporter.runtime).engine(tmp_path)
    allowed = zip(engine.space.names, engine.space.choices, strict=True)  # not all have whole groups
    allocation = mpsearch.Allocation({group: "w" if "w" in choices else "w8" for group, choices in allowed})
    assert "a8" not in engine.space.choices[-1], "no quantized inputs"
    call = ModelCall.record(engine.model, task.forward, first_samples(engine.batches("calibration")[0][0], 2))
    picked = Picked(type("E", (), {"allocation": allocation}), {}, {}, "agreement", "", (), None, call)
    path = exporter.export(picked, engine, tmp_path / "exported")
    model = exporter.open(path, net())
    with engine.applied(allocation) as simulated, torch.no_grad():
        ours, theirs = simulated(x), model(x)
    assert (theirs - ours).abs().max() <= 1e-5 * ours.abs().max()
    decoded = exporter.decode(path, net())
    for layer, chosen in engine.space.layer_schemes(allocation):
        assert torch.equal(decoded[layer.name], engine.quantized(layer.name, chosen).dequantize()), layer.name
