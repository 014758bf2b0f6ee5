"""GGUF files of a search against llama.cpp's own presets, with an importance matrix, in no more bytes."""

import ctypes
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from harness import PARTIAL, ROOT, Row, UnavailableError, benchmark

import mpsearch
from mpsearch.engine.engine import QuantEngine
from mpsearch.exporters.gguf import GGUF
from mpsearch.exporters.gguf_architecture import Architecture
from mpsearch.exporters.llama_cpp_model import import_llama_cpp
from mpsearch.graph.shared_copy import shared_copy
from mpsearch.graph.surgery import hooked
from mpsearch.models.huggingface import huggingface
from mpsearch.pipeline.prepare import prepare
from mpsearch.registry import names
from mpsearch.tasks.text import Text

LLAMA = Path(os.environ.get("MPSEARCH_LLAMA", ROOT / "build" / "llama"))
FOLDER = PARTIAL / "gguf"
FTYPES = {"Q4_0": 2, "Q2_K": 10, "Q3_K_M": 12, "Q4_K_M": 15}  # `llama_ftype` of include/llama.h
SCHEMES = {
    "legacy": ("q4_0", "q5_0", "q8_0", "fp16"),
    "all": ("q2_k", "q3_k", "q4_0", "q4_1", "q4_k", "iq4_xs", "q5_0", "q5_1", "q5_k", "q6_k", "q8_0", "fp16"),
}


@functools.lru_cache(maxsize=1)
def float_engine() -> QuantEngine:
    """The float model, on text that it was not trained on."""
    if not (LLAMA / "config.json").is_file():
        raise UnavailableError(f"{LLAMA} holds no model: python scripts/train_llama.py TEXTS {LLAMA}")
    task = Text(LLAMA / "held_out.txt", LLAMA, n_calibration=64, n_search=64, n_confirm=128, window=256, batch_size=16)
    prepared = prepare(huggingface(LLAMA), task, schemes=["fp32"], runtime="llama_cpp")
    return prepared.engine(FOLDER)


def write_float(engine: QuantEngine) -> Path:
    """The model in float32 as a GGUF file."""
    picked: Any = SimpleNamespace(evaluation=SimpleNamespace(allocation=engine.space.uniform("fp32")))
    return GGUF().export(picked, engine, FOLDER / "float")


def importance(engine: QuantEngine) -> dict[str, torch.Tensor]:
    """Mean squares of the inputs of each Linear layer in the calibration split, float32 `[columns]`, by names in the file."""
    architecture, sums, counts = Architecture.from_model(engine.model), {}, {}

    def collector(name: str) -> Any:
        def collect(module: Any, args: Any, kwargs: Any) -> None:
            x = args[0].flatten(0, -2).double()
            sums[name] = sums.get(name, 0) + x.square().sum(0)
            counts[name] = counts.get(name, 0) + len(x)

        return collect

    layers = {name: m for name, m in engine.model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"}
    with torch.no_grad(), hooked([(module, collector(name)) for name, module in layers.items()]):
        for inputs, _ in engine.batches("calibration"):
            engine.task.forward(engine.model, inputs)
    return {architecture.tensor_name(f"{name}.weight"): (sums[name] / counts[name]).float() for name in layers}


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


def searched(limit: int, schemes: tuple[str, ...], engine: QuantEngine, preset: str) -> Path:
    """The file of the best point of a search of at most `limit` bytes, headers included."""
    header = write_float(engine).stat().st_size - sum(p.numel() for p in engine.model.parameters()) * 4
    result = mpsearch.search(
        huggingface(LLAMA),
        engine.task,
        schemes=[name for name in schemes if name in names("scheme")],
        runtime="llama_cpp",
        budget={"bytes": limit - header},
        n_trials=60,
        confirm_points=4,
        folder=FOLDER / f"{preset}-{len(schemes)}",
    )
    return result.export("gguf", FOLDER / f"{preset}-{len(schemes)}-file", max_bytes=limit)


@benchmark("gguf", schemes=tuple(SCHEMES), preset=tuple(FTYPES), quick={"preset": ("Q4_0",), "schemes": ("legacy",)})
def gguf(schemes: str, preset: str) -> Iterator[Row]:
    """KL of the logits from those of the float model on unseen text: a search within the bytes of llama.cpp's file of a preset.

    The model is that of scripts/train_llama.py, a Llama whose rows are multiples of 256; all text is of files that it was not
    trained on. llama.cpp's file is made by its `llama_model_quantize` with an importance matrix (mean squares of the inputs of
    each layer in the calibration split). Both files are decoded by the package gguf ("decoded"), and opened by llama.cpp, whose
    CPU kernels round inputs to 8 bits ("in llama.cpp"). The legacy schemes are Q4_0, Q5_0, Q8_0 and F16; "all" has the K-quants
    too.
    """
    engine, exporter = float_engine(), GGUF()
    FOLDER.mkdir(parents=True, exist_ok=True)
    rival = quantize(write_float(engine), FOLDER / f"llama.cpp-{preset}.gguf", preset, importance(engine))
    ours = searched(rival.stat().st_size, SCHEMES[schemes], engine, preset)
    sizes = {"bytes": ours.stat().st_size, "rival_bytes": rival.stat().st_size}
    for place in ("decoded", "in llama.cpp"):
        opened = exporter.load if place == "decoded" else exporter.open
        kl, other = (engine.score_of(opened(path, shared_copy(engine.model)), "confirm").loss for path in (ours, rival))
        row = {"value": kl, "unit": "nats", "rival": f"llama.cpp {preset}", "rival_value": other, "ratio": other / kl}
        yield {"what": "KL", "case": place, **row, "kl_ratio": kl / other, **sizes}
