"""Transposed convolutions in ONNX files and OpenVINO's: they stay float, and hold input channels first."""

import pytest
import torch
from torch import nn

import mpsearch
from mpsearch.exporters.base import ModelCall, Picked
from mpsearch.graph.trace import first_samples
from mpsearch.pipeline.prepare import prepare
from mpsearch.registry import resolve

pytest.importorskip("onnxscript", reason="needs onnxscript: pip install -e '.[onnxruntime]'")


@torch.no_grad()
@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_transposed_convolutions_are_as_they_were_scored(tmp_path, name):
    pytest.importorskip({"onnx": "onnxruntime"}.get(name, name), reason=f"needs {name}")
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 12, 2, 2, groups=2), nn.BatchNorm2d(12), nn.Flatten()
    )
    net[3].running_var.uniform_(0.5, 2)
    data = {split: [torch.randn(6, 3, 6, 6)] for split in ("calibration", "search", "confirm")}
    task = mpsearch.fidelity_task(**data)
    schemes = {name: resolve("scheme", name) for name in ("w8", "fp32")}
    runtime = {"onnx": "onnxruntime"}.get(name, name)
    prepared = prepare(net.eval(), task, schemes=schemes, quantizer="round_to_nearest", runtime=runtime)
    engine = prepared.engine(tmp_path / "bank")
    exporter = resolve("exporter", name)
    allocation = mpsearch.Allocation({group.name: "w8" if group.name == "0" else "fp32" for group in engine.space.groups})
    assert "2" in allocation, "the transposed convolution is a group"
    e = type("E", (), {"allocation": allocation})
    call = ModelCall.record(engine.model, task.forward, first_samples(prepared.calibration[0][0], 2))
    path = exporter.export(Picked(e, {}, {}, "agreement", "", (), None, call), engine, tmp_path / "out")
    decoded = exporter.decode(path, engine.model)
    assert torch.equal(decoded["2"], engine.quantized("2", "fp32").dequantize())
    with engine.applied(allocation) as model:
        ours = task.forward(model, data["confirm"][0])
    opened = exporter.open(path, engine.model)
    assert (task.forward(opened, data["confirm"][0]) - ours).abs().max() <= 1e-4 * ours.abs().max()
