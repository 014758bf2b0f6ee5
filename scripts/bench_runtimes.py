"""Exported files in their runtimes: logits against ours, milliseconds against the runtime's own float32 and int8 quantizer."""

import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Row, UnavailableError, benchmark, interleaved
from networks import load

from mpsearch.allocation import Allocation
from mpsearch.engine.engine import QuantEngine
from mpsearch.errors import InputError
from mpsearch.exporters.base import ModelCall, Picked
from mpsearch.exporters.onnx import ONNX
from mpsearch.exporters.onnx_session import RuntimeModule, Session
from mpsearch.exporters.onnx_trace import named_inputs, traced
from mpsearch.graph.shared_copy import shared_copy
from mpsearch.graph.trace import first_samples
from mpsearch.pipeline.check_export import tensor_bytes
from mpsearch.pipeline.evaluators import SearchEvaluator
from mpsearch.registry import resolve

SCHEMES = ("w8", "w4", "w4g64s", "w2", "w8a8_static", "fp32")
SECONDS = 1.0
SPLITS = {  # fewer samples than the tasks have
    "resnet20": {"n_confirm": 1000, "n_search": 200},
    "efficientnet_lite0": {"n_confirm": 100},
    "minilm": {"n_confirm": 200},
    "digits": {},
}


def uniform(engine: QuantEngine, scheme: str, runtime: Any) -> Allocation:
    """The scheme where the runtime runs it, 8-bit weights where it does not."""
    schemes = engine.space.schemes
    return Allocation(
        {
            group.name: scheme if all(runtime.runs(layer, schemes[scheme]) for layer in group.layers) else "w8"
            for group in engine.space.groups
        }
    )


def float_file(engine: QuantEngine, network: str, folder: str) -> Path:
    """The float model as ONNX, for the runtime's own float32 and quantizer."""
    path = Path(folder) / f"{network}.onnx"
    path.write_bytes(traced(shared_copy(engine.model), call_of(engine), opset=21).SerializeToString())
    return path


def engine_of(network: str) -> QuantEngine:
    return load(network, SCHEMES, "round_to_nearest", **SPLITS[network])


def call_of(engine: QuantEngine) -> ModelCall:
    return ModelCall.record(engine.model, engine.task.forward, first_samples(engine.batches("calibration")[0][0], 2))


def statically_quantized(engine: QuantEngine, float_path: Path) -> Path:
    """By onnxruntime.quantization.quantize_static, QDQ, on the first calibration batches."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            names = Session(float_path).names
            self.feeds = iter([dict(zip(names, arrays_of(engine, x), strict=True)) for x, _ in engine.batches("calibration")[:4]])

        def get_next(self) -> Any:
            return next(self.feeds, None)

    prepared, path = float_path.with_suffix(".prepared.onnx"), float_path.with_suffix(".int8.onnx")
    quant_pre_process(str(float_path), str(prepared), skip_symbolic_shape=True)
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "per_channel": True}
    quantize_static(str(prepared), str(path), Reader(), quant_format=QuantFormat.QDQ, **types)
    return path


def arrays_of(engine: QuantEngine, inputs: Any) -> list[np.ndarray]:
    call = ModelCall.record(engine.model, engine.task.forward, inputs)
    return [tensor.numpy() for tensor in named_inputs(engine.model, call).values()]


def openers() -> dict[str, tuple[Any, Any, Callable[[Path], Any]]]:
    """Runtime -> its exporter, its profile, and what opens a float ONNX file there."""
    known: dict[str, tuple[Any, Any, Callable[[Path], Any]]] = {}
    known["onnxruntime"] = (ONNX(), resolve("runtime", "onnxruntime"), Session)
    known["onnxruntime, MatMulNBits"] = (ONNX(packed_products=True), resolve("runtime", "onnxruntime"), Session)
    try:
        from mpsearch.exporters.openvino import OpenVINO, Request

        OpenVINO().check_installed()
        known["openvino"] = (OpenVINO(), resolve("runtime", "openvino"), Request)
    except InputError:
        pass
    return known


def outputs_of(engine: QuantEngine, model: Any) -> torch.Tensor:
    return torch.cat(list(engine.scorer.outputs(model, "confirm")))


@benchmark(
    "runtimes",
    network=("resnet20", "efficientnet_lite0", "minilm"),
    runtime=("onnxruntime", "onnxruntime, MatMulNBits", "openvino"),
    batch=(1, 16),
    quick={"network": ("digits",), "batch": (4,), "runtime": ("onnxruntime", "openvino")},
)
def runtimes(network: str, runtime: str, batch: int) -> Iterator[Row]:
    """Uniform allocations (round to nearest), exported and opened by the runtime, against the same allocation in our simulation.

    `distance`: the largest difference of an output, as a share of the largest output; `same`: the share of samples with the same
    largest output; `quality` in the runtime, `ours` in the simulation. Milliseconds are medians of interleaved forward passes of
    one batch on one thread; rivals are the runtime's own float32 (`float32`) and ONNX Runtime's own static int8 quantizer in the
    same runtime (`quantize_static`, per channel, QDQ; `rival_same` compares it with the float model). Layers that a runtime does
    not run in the scheme have 8-bit weights.
    """
    known = openers()
    if runtime not in known:
        raise UnavailableError(f"{runtime} is not installed")
    exporter, profile, opened = known[runtime]
    engine = engine_of(network)
    reference = engine.float_logits("confirm")
    inputs = first_samples(engine.batches("confirm")[0][0], batch)
    evaluate = SearchEvaluator(engine)
    with tempfile.TemporaryDirectory() as folder:
        float_path = float_file(engine, network, folder)
        models: dict[str, Any] = {"float32": RuntimeModule(opened(float_path), engine.model)}
        static = {}
        if "onnxruntime" in runtime:
            models["quantize_static"] = RuntimeModule(opened(statically_quantized(engine, float_path)), engine.model)
            outputs = outputs_of(engine, models["quantize_static"])
            static = {"rival_quality": quality(engine, outputs), "rival_same": same(outputs, reference)}
        rows = []
        for scheme in SCHEMES[:-1]:
            if "MatMulNBits" in runtime and scheme != "w4g64s":
                continue
            allocation = uniform(engine, scheme, profile)
            point = evaluate(allocation, "user")
            picked = Picked(point, {"search": point}, {}, "quality", "", (), None, call_of(engine))
            path = exporter.export(picked, engine, Path(folder) / scheme)
            models[scheme] = exporter.open(path, engine.model)
            with engine.applied(allocation) as model:
                ours = outputs_of(engine, model)
            theirs = outputs_of(engine, models[scheme])
            about = {"distance": float((theirs - ours).abs().max() / ours.abs().max()), "same": same(theirs, ours)}
            about |= {
                "quality": quality(engine, theirs),
                "ours": quality(engine, ours),
                "counted": point.size_bytes,
                "file": tensor_bytes(exporter.files(path)),
            }
            rows.append({"case": scheme, **about})
        times = interleaved({name: functools.partial(engine.task.forward, m, inputs) for name, m in models.items()}, SECONDS)
        for row in rows:
            seconds = times[row["case"]]
            for rival in ("float32", "quantize_static"):
                if rival in times:
                    extra = static if rival == "quantize_static" else {}
                    milliseconds = {"value": 1e3 * seconds, "unit": "ms", "rival": rival, "rival_value": 1e3 * times[rival]}
                    yield {**row, **milliseconds, "ratio": times[rival] / seconds, **extra}


def same(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.argmax(1) == b.argmax(1)).float().mean())


def quality(engine: QuantEngine, outputs: torch.Tensor) -> float:
    targets = torch.cat([target for _, target in engine.batches("confirm")])
    return float(engine.quality.score(float(torch.as_tensor(engine.task.quality(outputs, targets)).double().mean())))
