"""Exported files in their runtimes: logits against ours, milliseconds against the runtime's own float32 and int8 quantizer."""

import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Row, UnavailableError, benchmark, interleaved, ratio_row
from networks import load

from mpsearch.allocation import Allocation
from mpsearch.engine.engine import QuantEngine
from mpsearch.errors import InputError
from mpsearch.evaluation import Score
from mpsearch.exporters.base import ModelCall, Picked
from mpsearch.exporters.onnx import ONNX
from mpsearch.exporters.onnx_session import RuntimeModule, Session
from mpsearch.exporters.onnx_trace import named_inputs, traced
from mpsearch.exporters.packed import Packed
from mpsearch.graph.shared_copy import shared_copy
from mpsearch.graph.trace import first_samples
from mpsearch.layer import weight_rows
from mpsearch.metrics.base import squared_weight_error
from mpsearch.optimize import knapsack
from mpsearch.pipeline.check_export import tensor_bytes
from mpsearch.pipeline.evaluators import SearchEvaluator
from mpsearch.registry import resolve

SCHEMES = ("w8", "w4", "w4g64s", "w2", "w8a8_static", "fp32")
CASES = ("w8", "w4", "mixed", "w8a8_static")
BATCHES, SECONDS = (1, 16), 1.0
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
    return load(network, SCHEMES, "clip_search", **SPLITS[network])


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


def openers() -> dict[str, tuple[Any, Any, Callable[[Path], Any] | None]]:
    """Runtime -> its exporter, its profile, and what opens a float ONNX file there; `None`: PyTorch is its float32."""
    known: dict[str, tuple[Any, Any, Callable[[Path], Any] | None]] = {}
    known["onnxruntime"] = (ONNX(), resolve("runtime", "onnxruntime"), Session)
    known["onnxruntime, MatMulNBits"] = (ONNX(packed_products=True), resolve("runtime", "onnxruntime"), Session)
    known["mpsearch"] = (Packed(), resolve("runtime", "mpsearch"), None)
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
    runtime=("onnxruntime", "onnxruntime, MatMulNBits", "openvino", "mpsearch"),
    quick={"network": ("digits",)},
)
def runtimes(network: str, runtime: str) -> Iterator[Row]:
    """Allocations (scales by `clip_search`), exported and opened by the runtime, against the same allocation in our simulation.

    `mixed`: 2, 4 and 8 bits, chosen by an exact knapsack on relative errors of weights, in the bytes of `w4`. `distance`: the
    norm of the differences of all outputs over the norm of the outputs; `same`: the share of samples with the same largest
    output; `quality` and `kl` in the runtime, `ours` and `kl / ours` against the simulation, all on the confirm split. `file`:
    bytes of the files with tensors. Milliseconds are medians of interleaved forward passes on one thread, of batches of 1 and
    16; `ratio` above 1: ours is faster. Rivals are the runtime's own float32, and ONNX Runtime's own static int8 quantizer
    (`quantize_static`, per channel, QDQ; its `rival_quality`). Layers that a runtime does not run in the scheme have 8-bit
    weights.
    """
    known = openers()
    if runtime not in known:
        raise UnavailableError(f"{runtime} is not installed")
    if "MatMulNBits" in runtime and network in ("resnet20", "efficientnet_lite0"):
        raise UnavailableError("it has one Linear layer")
    exporter, profile, opened = known[runtime]
    engine = engine_of(network)
    engine.float_logits("confirm")
    with tempfile.TemporaryDirectory() as folder:
        models: dict[str, Any] = {"float32": engine.model}
        static = {}
        if opened is not None:
            float_path = float_file(engine, network, folder)
            models["float32"] = RuntimeModule(opened(float_path), engine.model)
        if opened is not None and "onnxruntime" in runtime:
            models["quantize_static"] = RuntimeModule(opened(statically_quantized(engine, float_path)), engine.model)
            static = {"rival_quality": quality(engine, outputs_of(engine, models["quantize_static"]))}
        rows = {}
        for scheme in ("w4g64s",) if "MatMulNBits" in runtime else CASES:
            allocation = mixed(engine, profile) if scheme == "mixed" else uniform(engine, scheme, profile)
            models[scheme], rows[scheme] = exported(engine, allocation, exporter, Path(folder) / scheme)
        for batch in BATCHES:
            inputs = first_samples(engine.batches("confirm")[0][0], batch)
            times = interleaved({name: functools.partial(engine.task.forward, m, inputs) for name, m in models.items()}, SECONDS)
            for scheme, row in rows.items():
                for rival in (name for name in ("float32", "quantize_static") if name in times):
                    extra = static if rival == "quantize_static" else {}
                    yield {"case": f"{scheme}, batch {batch}", **row, **ratio_row(times[scheme], rival, times[rival]), **extra}


def exported(engine: QuantEngine, allocation: Allocation, exporter: Any, folder: Path) -> tuple[Any, Row]:
    """The opened file, and how it agrees with the simulation."""
    point = SearchEvaluator(engine)(allocation, "user")
    picked = Picked(point, {"search": point}, {}, "quality", "", (), None, call_of(engine))
    path = exporter.export(picked, engine, folder)
    model = exporter.open(path, shared_copy(engine.model))
    with engine.applied(allocation) as simulated:
        ours, expected = scored(engine, simulated)
    theirs, score = scored(engine, model)
    row = {"distance": float((theirs - ours).norm() / ours.norm()), "same": same(theirs, ours)}
    row |= {"quality": quality(engine, theirs), "ours": quality(engine, ours), "kl": score.loss}
    row |= {"kl / ours": score.loss / expected.loss, "counted": point.size_bytes, "file": tensor_bytes(exporter.files(path))}
    return model, row


def scored(engine: QuantEngine, model: Any) -> tuple[torch.Tensor, Score]:
    """The outputs on the confirm split, and their score."""
    outputs = list(engine.scorer.outputs(model, "confirm"))
    return torch.cat(outputs), engine.scorer.score(outputs, "confirm")


def mixed(engine: QuantEngine, runtime: Any) -> Allocation:
    """2, 4 or 8 bits for each group, where the runtime runs them: least relative errors of weights in the bytes of `w4`."""
    space, schemes = engine.space, ("w2", "w4", "w8")
    losses, costs = [], []
    for group in space.groups:
        weights = [weight_rows(engine.model.get_submodule(layer.name)).square().sum().item() for layer in group.layers]
        errors = [sum(squared_weight_error(engine, layer.name, scheme) for layer in group.layers) for scheme in schemes]
        losses.append([error / sum(weights) for error in errors])
        costs.append([sum(space.schemes[scheme].storage_bits(layer.shape) for layer in group.layers) for scheme in schemes])
    choice = knapsack.solve(losses, costs, sum(cost[1] for cost in costs))
    return Allocation({group.name: schemes[int(i)] for group, i in zip(space.groups, choice, strict=True)})


def same(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.argmax(1) == b.argmax(1)).float().mean())


def quality(engine: QuantEngine, outputs: torch.Tensor) -> float:
    targets = torch.cat([target for _, target in engine.batches("confirm")])
    return float(engine.quality.score(float(torch.as_tensor(engine.task.quality(outputs, targets)).double().mean())))
