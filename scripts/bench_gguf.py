"""GGUF files against llama.cpp's own presets, with an importance matrix, in no more bytes."""

import ctypes
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from harness import PARTIAL, ROOT, Row, UnavailableError, benchmark, ratio_interval

from mpsearch.allocation import Allocation
from mpsearch.engine.engine import QuantEngine
from mpsearch.errors import InfeasibleBudget
from mpsearch.exporters.gguf import GGUF
from mpsearch.exporters.gguf_architecture import Architecture
from mpsearch.exporters.llama_cpp_model import import_llama_cpp
from mpsearch.graph.shared_copy import shared_copy
from mpsearch.models.huggingface import huggingface
from mpsearch.optimize.knapsack import solve
from mpsearch.pipeline.prepare import prepare
from mpsearch.pipeline.sensitivity import measure_sensitivity
from mpsearch.refiners.error_propagation import ErrorPropagation
from mpsearch.registry import names, resolve
from mpsearch.tasks.text import Text

LLAMA = Path(os.environ.get("MPSEARCH_LLAMA", ROOT / "build" / "llama"))
FOLDER = PARTIAL / "gguf"
FTYPES = {"Q2_K": 10, "Q3_K_M": 12, "Q4_0": 2, "Q4_K_M": 15, "Q5_K_M": 17}  # `llama_ftype` of include/llama.h
SCHEMES = {
    "legacy": ("q4_0", "q5_0", "q8_0", "fp16"),
    "k_quants": ("q2_k", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0"),
}


@functools.lru_cache(maxsize=1)
def float_engine() -> QuantEngine:
    """The float model, on text that it was not trained on."""
    if not (LLAMA / "config.json").is_file():
        raise UnavailableError(f"{LLAMA} holds no model: python scripts/train_llama.py TEXTS {LLAMA}")
    task = Text(LLAMA / "held_out.txt", LLAMA, n_calibration=64, n_search=32, n_confirm=64, window=256, batch_size=16)
    prepared = prepare(huggingface(LLAMA), task, schemes=["fp32"], runtime="llama_cpp")
    return prepared.engine(FOLDER)


def written(engine: QuantEngine, allocation: Allocation, folder: Path) -> Path:
    """The allocation as a GGUF file."""
    picked: Any = SimpleNamespace(evaluation=SimpleNamespace(allocation=allocation))
    return GGUF().export(picked, engine, folder)


def write_float(engine: QuantEngine) -> Path:
    """The model in float32 as a GGUF file."""
    return written(engine, engine.space.uniform("fp32"), FOLDER / "float")


def importance(engine: QuantEngine) -> dict[str, torch.Tensor]:
    """Mean squares of the inputs of each Linear layer in the calibration split, float32 `[columns]`, by names in the file."""
    architecture, calibration = Architecture.from_model(engine.model), engine.bank.calibration
    linear = [layer for layer in engine.space.layers if layer.kind == "linear" and "lm_head" not in layer.modules]
    moments = {architecture.tensor_name(layer.weight_name): calibration.input_moments(layer) for layer in linear}
    return {name: known.second_moment[0] for name, known in moments.items() if known is not None}


def quantize(source: Path, target: Path, preset: str, matrix: dict[str, torch.Tensor]) -> Path:
    """What llama.cpp makes of the file `source` by its own preset."""
    llama_cpp = import_llama_cpp().llama_cpp
    entries = (llama_cpp.llama_model_imatrix_data * (len(matrix) + 1))()  # the last has no name
    kept = {name: values.contiguous().numpy() for name, values in matrix.items()}
    for entry, (name, values) in zip(entries, kept.items(), strict=False):
        entry.name, entry.size = name.encode(), len(values)
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread, options.imatrix = FTYPES[preset], 1, entries
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options))
    if failed:
        raise RuntimeError(f"llama_model_quantize returned {failed} for {preset}")
    return target


@functools.lru_cache(maxsize=1)
def quantized(schemes: str) -> tuple[QuantEngine, np.ndarray]:
    """An engine of the default quantizer in these schemes, and the sensitivities of the default metric."""
    task, known = float_engine().task, [name for name in SCHEMES[schemes] if name in names("scheme")]
    engine = prepare(huggingface(LLAMA), task, schemes=known, runtime="llama_cpp").engine(FOLDER / schemes)
    return engine, measure_sensitivity(engine, resolve("metric", "gauss_newton")).losses()


def file_within(limit: int, schemes: str, preset: str) -> Path:
    """The file of the knapsack's allocation of at most `limit` bytes, header included, refined by the default refiner."""
    float_model = float_engine().model
    tensors = 4 * sum(parameter.numel() for parameter in float_model.parameters())
    header = write_float(float_engine()).stat().st_size - tensors
    engine, losses = quantized(schemes)
    space = engine.space
    try:
        allocation = space.allocation(solve(losses, space.storage_bits, 8 * (limit - header) - space.other_bits))
    except InfeasibleBudget:
        raise UnavailableError(f"no allocation of {schemes} has at most {limit:,} bytes") from None
    refined = ErrorPropagation().start(engine)(allocation)
    return written(refined, allocation, FOLDER / f"{schemes}-{preset}")


CHART = {"x": "bytes", "y": "kl_ratio", "line": "schemes", "panel": "reader", "log": "y"}


@benchmark("gguf", schemes=tuple(SCHEMES), preset=tuple(FTYPES), quick={"preset": ("Q4_0",), "schemes": ("legacy",)}, chart=CHART)
def gguf(schemes: str, preset: str) -> Iterator[Row]:
    """KL of the logits from those of the float model on unseen text: our file within the bytes of llama.cpp's file of a preset.

    The model is that of scripts/train_llama.py, a Llama of 4.2 million parameters whose rows are multiples of 256, after 500
    steps: 5.14 nats a token on files that it was not trained on, of which all text here is. So early its activations are of low
    rank (of the 256 inputs of an attention projection 43 to 74 directions hold more than 1e-4 of the power, all but the first
    layer's), which favours quantizers that compensate errors. Ours is the exact knapsack solution of the default sensitivities,
    refined, without a search after it; schemes: "legacy" are Q4_0, Q5_0, Q8_0 and F16 (skipped where a preset is smaller than
    Q4_0), "k_quants" are Q2_K to Q6_K with IQ4_XS and Q8_0. llama.cpp's file is made by its `llama_model_quantize` with an
    importance matrix (mean squares of the inputs of each layer in the calibration split). Both files are decoded by the package
    gguf ("decoded"), and opened by llama.cpp, whose CPU kernels round inputs to 8 bits ("in llama.cpp"). `kl_ratio` is ours
    over llama.cpp's, with its 95 % interval (a bootstrap of the windows).
    """
    engine, exporter = float_engine(), GGUF()
    FOLDER.mkdir(parents=True, exist_ok=True)
    rival = quantize(write_float(engine), FOLDER / f"llama.cpp-{preset}.gguf", preset, importance(engine))
    ours = file_within(rival.stat().st_size, schemes, preset)
    sizes = {"bytes": ours.stat().st_size, "rival_bytes": rival.stat().st_size}
    for place in ("decoded", "in llama.cpp"):
        opened = exporter.load if place == "decoded" else exporter.open
        scores = [engine.score_of(opened(path, shared_copy(engine.model)), "confirm") for path in (ours, rival)]
        kl, other = (score.loss for score in scores)
        low, high = ratio_interval(*(score.losses for score in scores))
        row = {"value": kl, "unit": "nats", "rival": f"llama.cpp {preset}", "rival_value": other, "ratio": other / kl}
        yield {"what": "KL", "case": place, "reader": place, **row, "kl_ratio": kl / other, "low": low, "high": high, **sizes}
