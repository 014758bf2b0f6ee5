"""The networks of the benchmarks with their tasks, and the engine for one of them in given schemes: what all benchmarks share."""

import copy
import functools
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from harness import ROOT, Row, UnavailableError
from torch import nn

from mpsearch.allocation import Allocation
from mpsearch.engine.calibrate import calibrate
from mpsearch.engine.engine import FLOAT, QuantEngine
from mpsearch.errors import InputError
from mpsearch.evaluation import Score
from mpsearch.layer import kind_of, weight_rows
from mpsearch.packed.model import QuantizedLayer, pack
from mpsearch.pipeline.prepare import prepare
from mpsearch.quantizers.round_to_nearest import RoundToNearest
from mpsearch.registry import node, resolve
from mpsearch.schemes.base import QuantScheme
from mpsearch.schemes.codebook import Codebook
from mpsearch.schemes.input import IntegerInput
from mpsearch.schemes.integer import Integer
from mpsearch.schemes.level_input import LevelInput
from mpsearch.schemes.outliers import Outliers
from mpsearch.schemes.ranges import RANGES
from mpsearch.schemes.rotated import Rotated

DATA = Path(os.environ.get("MPSEARCH_DATA", ROOT / ".." / "shared" / "data"))


class Network(NamedTuple):
    """Of a model of the registry: its task, the folder of its data in `DATA`, its weights there, layers that share a scheme."""

    task: str
    folder: str = ""
    weights: str = ""
    share: tuple[str, ...] = ()


NETWORKS = {
    "digits": Network("digits"),
    "resnet20": Network("cifar10", "cifar10", "resnet20.safetensors"),
    "stories260k": Network(
        "stories", "stories260k", "model.safetensors", ("*.q_proj|*.k_proj|*.v_proj", "*.gate_proj|*.up_proj")
    ),
    "minilm": Network("stsb", "stsb", share=("*.query|*.key|*.value",)),
    "efficientnet_lite0": Network("imagenet_sample", "imagenet_sample"),
    "smollm2": Network("wikitext2", "wikitext2"),
}
FP8, NVFP4 = ("e4m3", "channel", "float32"), ("e2m1", 16, "e4m3")
W4G16A4 = Integer(4, 16, input=IntegerInput(4, symmetric=False))
SCHEMES: dict[str, QuantScheme] = {  # those that conf/scheme does not have
    "w6_tensor": Integer(6, "tensor"),
    "w8_tensor": Integer(8, "tensor"),
    **{f"w{bits}g{size}s": Integer(bits, size) for bits, size in ((4, 64), (4, 32), (6, 64), (8, 64), (4, 16))},
    "w3g32": Integer(3, 32, symmetric=False),
    "w3o1": Outliers(Integer(3)),
    "w4o1": Outliers(Integer(4)),
    "w3g128o1": Outliers(Integer(3, 128)),
    "ternary_g64": Codebook("ternary", 64),
    "nf4_g32": Codebook("nf4", 32),
    "fp4_g32": Codebook("e2m1", 32),
    "fp8a8_static": Codebook(*FP8, LevelInput("e4m3", "static")),
    "fp8a8_e5m2": Codebook(*FP8, LevelInput("e5m2")),
    "mxfp4a4": Codebook("e2m1", 32, "e8m0", LevelInput("e2m1", "mx")),
    "nvfp4a4r": Rotated(Codebook(*NVFP4, LevelInput("e2m1", "nv"))),
    "w4g16a4": W4G16A4,
    "w4g16a4r": Rotated(W4G16A4),
    **{
        f"w{bits}a{input_bits}_static": Integer(bits, input=IntegerInput(input_bits, "static", symmetric=input_bits >= 8))
        for bits, input_bits in ((8, 8), (4, 8), (8, 6), (4, 4))
    },
    "w4a4_static_mse": Integer(4, input=IntegerInput(4, "static", symmetric=False, range="mse")),
    **{
        f"w8a{bits}_{name}_{'symmetric' if symmetric else 'asymmetric'}": Integer(
            8,
            input=IntegerInput(bits, "token" if name == "token" else "static", symmetric, "minmax" if name == "token" else name),
        )
        for bits in (8, 6, 4)
        for name in ("token", *RANGES)
        for symmetric in (True, False)
    },
}


def choice(group: str, name: str) -> Any:
    """The object of a name in a registry, with its defaults, or one of `SCHEMES`."""
    return resolve(group, SCHEMES.get(name, name))


@functools.lru_cache(maxsize=2)
def load(
    network: str,
    schemes: tuple[str, ...],
    quantizer: str = "clip_search",
    equalizer: str = "none",
    float_layers: str = "",
    shared: bool = False,
    prefix_max_bytes: int = 10**9,
    **splits: int | str | None,
) -> QuantEngine:
    """The engine of a network in the schemes, calibrated; layers that match the pattern `float_layers` stay float.

    `shared`: layers that runtimes fuse share a scheme. `splits` are arguments of the task, `n_confirm=100` for example.
    Raises `UnavailableError` where the data or the weights are missing.
    """
    about = NETWORKS[network]
    folder = DATA / about.folder
    weights = {"weights": str(folder / about.weights)} if about.weights else {}
    data = {"data_dir": str(folder)} if about.folder else {}
    try:
        model = resolve("model", {**node("model", network), **weights})
        task = resolve("task", {**node("task", about.task), **data, **splits})
    except InputError as error:
        raise UnavailableError(str(error)) from error
    if network == "efficientnet_lite0":
        model = model.to(memory_format=torch.channels_last)  # three times as fast
    prepared = prepare(
        model,
        task,
        schemes={name: SCHEMES.get(name, name) for name in (*schemes, *(["fp32"] if float_layers else []))},
        quantizer=quantizer,
        equalizer=None if equalizer == "none" else equalizer,
        share_patterns=about.share if shared else (),
        pin=[f"*:{'|'.join(schemes)}", f"{float_layers}:fp32"] if float_layers else (),
    )
    rotated = any(isinstance(scheme, Rotated) for scheme in prepared.space.schemes.values())
    moments = calibrate(prepared.model, prepared.task, prepared.space.layers, prepared.calibration, rotated=rotated)
    return QuantEngine(
        prepared.model, prepared.task, prepared.space, prepared.plan.quantizers, moments, prefix_max_bytes=prefix_max_bytes
    )


def packed_copy(model: nn.Module, schemes: Mapping[str, QuantScheme]) -> nn.Module:
    """A copy of the model with the weights of the named layers packed, rounded to nearest."""
    model, quantizer = copy.deepcopy(model), RoundToNearest()
    modules = {name: model.get_submodule(name) for name in schemes}
    weights = {name: quantizer.quantize(weight_rows(module), schemes[name]) for name, module in modules.items()}
    return pack(model, [QuantizedLayer(str(kind_of(modules[name])), (name,), weight) for name, weight in weights.items()])


def quantize_all(engine: QuantEngine, schemes: tuple[str, ...] = ()) -> float:
    """Quantize every layer in the schemes (default: all that it may take); processor seconds."""
    start = time.process_time()
    for group, names in zip(engine.space.groups, engine.space.choices, strict=True):
        for layer in group.layers:
            for scheme in (name for name in names if not schemes or name in schemes):
                engine.swaps(layer.name, scheme)
    return time.process_time() - start


def confirmed(engine: QuantEngine, allocation: Allocation) -> Score:
    """The score on the confirm split with the qualities of its samples; of `FLOAT` that of the float model."""
    engine.float_logits("confirm")
    if not allocation:
        return engine.score_of(None, "confirm")
    with engine.applied(allocation) as model:
        return engine.score_of(model, "confirm")


def quality_row(engine: QuantEngine, allocation: Allocation, score: Score | None = None) -> Row:
    """The quality on the confirm split against the float model's, its interval, the KL, and bits of the quantized layers."""
    score, base = score or confirmed(engine, allocation), engine.score(FLOAT, "confirm")
    scale, sign = engine.quality.scale, engine.quality.sign
    row = {"value": scale * score.quality, "unit": "%" if scale == 100 else engine.quality.name, "rival": "float32"}
    row |= {"rival_value": scale * base.quality, "ratio": (score.quality / base.quality) ** sign, "kl": score.loss}
    return row | {"low": scale * score.quality_low, "high": scale * score.quality_high, "bits": average_bits(engine, allocation)}


def average_bits(engine: QuantEngine, allocation: Allocation) -> float:
    """Bits a weight, scales counted, of the layers that do not stay float."""
    space = engine.space
    pairs = [(g, space.schemes[allocation[g.name]]) for g in space.groups if allocation[g.name] != "fp32"] if allocation else []
    bits = sum(scheme.storage_bits(layer.shape) for group, scheme in pairs for layer in group.layers)
    return bits / sum(group.numel for group, _ in pairs) if pairs else 32.0


def weight_decibels(engine: QuantEngine, scheme: str) -> float:
    """Signal to noise of all weights in the scheme, in decibels."""
    signal = noise = 0.0
    for layer in engine.space.layers:
        weight = weight_rows(engine.model.get_submodule(layer.name)).detach().double()
        signal += weight.square().sum().item()
        noise += (weight - engine.quantized(layer.name, scheme).dequantize()).square().sum().item()
    return 10 * float(np.log10(signal / noise))
