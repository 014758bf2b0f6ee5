"""What number formats make of ResNet-20 and of stories260K at equal average bits; to `reports/bench_formats/`.

    python scripts/bench_formats.py

Every scheme in all layers, scales and all else counted, by round-to-nearest, clip search and coordinate descent: the weights'
signal to noise ratio, the KL divergence to the float model, and the accuracy or perplexity on data that neither calibration
(which weighs errors and corrects biases) nor anything else has seen. The data are found in `$MPSEARCH_DATA` (default
`../shared/data`). `--json FILE` writes the rows as JSON too.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from bench_resnet20 import DATA
from pages import Row, machine, write
from torch import nn

from mpsearch.allocation import SearchSpace
from mpsearch.engine.calibrate import calibrate
from mpsearch.engine.engine import FLOAT, QuantEngine, load_batches
from mpsearch.graph.fold import fold_batch_norms
from mpsearch.graph.trace import trace_layers
from mpsearch.graph.unsearched import other_bits
from mpsearch.layer import weight_rows
from mpsearch.models.llama import stories260k
from mpsearch.models.resnet import resnet
from mpsearch.quantizers.base import Quantizer
from mpsearch.quantizers.clip_search import ClipSearch
from mpsearch.quantizers.coordinate_descent import CoordinateDescent
from mpsearch.quantizers.round_to_nearest import RoundToNearest
from mpsearch.schemes.base import QuantScheme
from mpsearch.schemes.codebook import Codebook
from mpsearch.schemes.integer import Integer
from mpsearch.schemes.outliers import Outliers
from mpsearch.tasks.base import Task
from mpsearch.tasks.cifar10 import Cifar10
from mpsearch.tasks.language import Stories

QUANTIZERS: dict[str, Quantizer] = {
    "round_to_nearest": RoundToNearest(),
    "clip_search": ClipSearch(),
    "coordinate_descent": CoordinateDescent(),
}
N_IMAGES, N_WINDOWS = 1000, 32

# By the bits of a large layer: what is compared at about the same size.
SCHEMES: dict[str, dict[str, QuantScheme]] = {
    "1 to 2": {
        "w1": Integer(1),
        "ternary": Codebook("ternary"),
        "ternary g64": Codebook("ternary", 64),
        "w2": Integer(2),
    },
    "3 to 4": {
        "w3g32": Integer(3, 32, symmetric=False),
        "w3g64o1": Outliers(Integer(3, 64, symmetric=False)),
        "w3g128o1": Outliers(Integer(3, 128)),
        "w4": Integer(4),
    },
    "4.25": {
        "w4g64 symmetric": Integer(4, 64),
        "nf4": Codebook("nf4", 64),
        "fp4": Codebook("e2m1", 64),
        "mxfp4": Codebook("e2m1", 32, "e8m0"),
    },
    "4.5": {
        "w4g32 symmetric": Integer(4, 32),
        "nf4 g32": Codebook("nf4", 32),
        "fp4 g32": Codebook("e2m1", 32),
        "nvfp4": Codebook("e2m1", 16, "e4m3"),
        "w4o1": Outliers(Integer(4)),
    },
    "6.25": {
        "w6g64 symmetric": Integer(6, 64),
        "mxfp6_e2m3": Codebook("e2m3", 32, "e8m0"),
        "mxfp6_e3m2": Codebook("e3m2", 32, "e8m0"),
    },
    "8 to 8.25": {
        "w8": Integer(8),
        "w8g64 symmetric": Integer(8, 64),
        "fp8_e4m3": Codebook("e4m3", "channel", "float32"),
        "fp8_e5m2": Codebook("e5m2", "channel", "float32"),
        "mxfp8_e4m3": Codebook("e4m3", 32, "e8m0"),
        "mxfp8_e5m2": Codebook("e5m2", 32, "e8m0"),
        "mxint8": Codebook("int8", 32, "e8m0"),
    },
}


def engines_of(model: nn.Module, task: Task) -> dict[str, QuantEngine]:
    """One for each quantizer, over one model and its data."""
    inputs = task.batches("calibration")[0][0]
    fold_batch_norms(model, task.forward, inputs)
    layers = trace_layers(model, task.forward, inputs)
    schemes = {name: scheme for group in SCHEMES.values() for name, scheme in group.items()}
    space = SearchSpace.build(layers, schemes, other_bits=other_bits(model, layers))
    moments = calibrate(model, task, layers, load_batches(task, "calibration", "cpu"))
    engines = {name: QuantEngine(model, task, space, dict.fromkeys(schemes, q), moments) for name, q in QUANTIZERS.items()}
    first = next(iter(engines.values()))
    first.float_logits("confirm")
    for engine in engines.values():
        engine._batches, engine._float_logits = first._batches, first._float_logits  # loaded and computed once
    return engines


def resnet20() -> dict[str, QuantEngine]:
    task = Cifar10(str(DATA), n_calibration=1000, n_search=100, n_confirm=N_IMAGES, seed=0)
    return engines_of(resnet(20, str(DATA / "resnet20.safetensors")).eval(), task)


def llama() -> dict[str, QuantEngine]:
    folder = DATA.parent / "stories260k"
    task = Stories(str(folder), n_calibration=64, n_search=1, n_confirm=N_WINDOWS, window=256, seed=0)
    return engines_of(stories260k(folder / "model.safetensors").eval(), task)


def decibels(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Signal to noise of (weight, what became of it), all together."""
    signal = sum(weight.double().square().sum().item() for weight, _ in pairs)
    return 10 * math.log10(signal / sum((weight - dense).double().square().sum().item() for weight, dense in pairs))


def measure(network: str, engines: dict[str, QuantEngine]) -> list[Row]:
    """The float network, and one row for each scheme and quantizer."""
    space = engines["clip_search"].space
    score = engines["clip_search"].score(FLOAT, "confirm")
    rows: list[Row] = [{"what": network, "case": "float32", "value": score.quality, "unit": "quality", "bits": 32.0}]
    for about, group in SCHEMES.items():
        for name, scheme in group.items():
            bits = sum(scheme.storage_bits(layer.shape) for layer in space.layers) / space.numel
            for quantizer, engine in engines.items():
                score = engine.score(space.uniform(name), "confirm")
                weights = {la.name: weight_rows(engine.model.get_submodule(la.name)).detach() for la in space.layers}
                noise = decibels([(w, engine.quantized(layer, name).dequantize()) for layer, w in weights.items()])
                row: Row = {"what": network, "case": name, "about": about, "quantizer": quantizer, "bits": bits}
                row |= {"value": score.quality, "unit": "quality", "low": score.quality_low, "high": score.quality_high}
                rows.append(row | {"kl": score.loss, "decibels": noise})
                print(f"{name:16s} {quantizer:20s} {score.quality:.4f} {score.loss:.4f} {noise:.1f} dB", flush=True)
    return rows


def table(rows: list[Row], quality: str, percent: bool) -> list[str]:
    """A line for each scheme: round-to-nearest / clip search / coordinate descent."""
    times, digits = (100, 2) if percent else (1, 3)
    lines = [
        f"| about | scheme | bits | dB | KL, nats | {quality} (95 % of the last) |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        f"| | float32 | 32.00 | | 0 | {times * rows[0]['value']:.{digits}f} |",
    ]
    for alike in zip(*(rows[1 + i :: len(QUANTIZERS)] for i in range(len(QUANTIZERS))), strict=True):
        last = alike[-1]
        noise, loss = (" / ".join(format(row[key], form) for row in alike) for key, form in (("decibels", ".1f"), ("kl", ".3g")))
        scores = " / ".join(f"{times * row['value']:.{digits}f}" for row in alike)
        interval = f"{times * last['low']:.{digits}f} to {times * last['high']:.{digits}f}"
        lines.append(f"| {last['about']} | {last['case']} | {last['bits']:.2f} | {noise} | {loss} | {scores} ({interval}) |")
    return lines


def main() -> None:
    """Measure, print the table, and write it to the report folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = measure("resnet20", resnet20())
    stories = measure("stories260k", llama())
    rows = [*found, *stories, machine()]
    notes = [
        "Every layer in one scheme. Each cell: round-to-nearest / clip search / coordinate descent. Bits count scales, zero",
        "points, outliers and padding; rows are short (27 to 576 columns), so that groups of 64 and blocks of 32 end ragged.",
        "dB: signal to noise ratio of the weights, all weighing alike; what the searches make least are errors weighted by the",
        "inputs' second moments, or of the layer's output. Intervals are paired with the float model.",
        "",
        str(rows[-1]["case"]),
    ]
    lines = [
        "# bench_formats",
        "",
        f"ResNet-20 on {N_IMAGES:,} CIFAR-10 test images:",
        "",
        *table(found, "accuracy, %", True),
        "",
    ]
    lines += [f"stories260K on {N_WINDOWS} windows of 256 tokens, its tied embedding and head among the layers:", ""]
    lines += [*table(stories, "perplexity", False), ""]
    write("bench_formats", [*lines, *notes], rows, arguments.json)


if __name__ == "__main__":
    main()
