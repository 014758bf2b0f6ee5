"""What number formats make of ResNet-20 and of stories260K's weights at equal average bits; to `reports/bench_formats/`.

    python scripts/bench_formats.py

Every scheme in all layers, scales and all else counted, by round-to-nearest and by the clip search: the weights' signal to noise
ratio, the KL divergence to the float model and the accuracy on 2,000 test images. Calibration (which weighs the clip search's
errors, and corrects biases) uses training images only. Of stories260K, a small Llama, weights alone are looked at. The data are
found in `$MPSEARCH_DATA` (default `../shared/data`). `--json FILE` writes the rows as JSON too.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from bench_resnet20 import DATA, REPORTS, Row, _machine
from safetensors.torch import load_file

from mpsearch.allocation import SearchSpace
from mpsearch.calibrate import calibrate
from mpsearch.engine import FLOAT, QuantEngine, load_batches, other_bits
from mpsearch.fold import fold_batch_norms
from mpsearch.layer import weight_rows
from mpsearch.models.resnet import resnet
from mpsearch.quantizers.base import Quantizer
from mpsearch.quantizers.clip_search import ClipSearch
from mpsearch.quantizers.round_to_nearest import RoundToNearest
from mpsearch.schemes.base import QuantScheme
from mpsearch.schemes.codebook import Codebook
from mpsearch.schemes.integer import Integer
from mpsearch.schemes.outliers import Outliers
from mpsearch.tasks.cifar10 import Cifar10
from mpsearch.trace import trace_layers

QUANTIZERS: dict[str, Quantizer] = {"round_to_nearest": RoundToNearest(), "clip_search": ClipSearch()}
N_IMAGES = 2000

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


def build_engines() -> dict[str, QuantEngine]:
    """One for each quantizer, over one model and its data."""
    task = Cifar10(str(DATA), n_calibration=1000, n_search=100, n_confirm=N_IMAGES, seed=0)
    model = resnet(20, str(DATA / "resnet20.safetensors")).eval()
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


def decibels(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Signal to noise of (weight, what became of it), all together."""
    signal = sum(weight.double().square().sum().item() for weight, _ in pairs)
    return 10 * math.log10(signal / sum((weight - dense).double().square().sum().item() for weight, dense in pairs))


def measure() -> list[Row]:
    """One row for each scheme and quantizer, ResNet-20's and stories260K's in it."""
    engines = build_engines()
    space = engines["clip_search"].space
    llama = {name: w for name, w in load_file(DATA.parent / "stories260k" / "model.safetensors").items() if w.dim() == 2}
    rows: list[Row] = []
    score = engines["clip_search"].score(FLOAT, "confirm")
    rows.append({"what": "formats", "case": "float32", "value": 100 * score.quality, "unit": "%", "bits": 32.0, "kl": 0.0})
    for about, group in SCHEMES.items():
        for name, scheme in group.items():
            for quantizer, engine in engines.items():
                score = engine.score(space.uniform(name), "confirm")
                weights = [(weight_rows(engine.model.get_submodule(la.name)).detach(), la.name) for la in space.layers]
                own = decibels([(weight, engine.quantized(layer, name).dequantize()) for weight, layer in weights])
                other = decibels([(w, QUANTIZERS[quantizer].quantize(w, scheme).dequantize()) for w in llama.values()])
                bits = sum(scheme.storage_bits(layer.shape) for layer in space.layers) / space.numel
                n_llama = sum(w.numel() for w in llama.values())
                rows.append(
                    {
                        "what": "formats",
                        "case": name,
                        "about": about,
                        "quantizer": quantizer,
                        "value": 100 * score.quality,
                        "unit": "%",
                        "low": 100 * score.quality_low,
                        "high": 100 * score.quality_high,
                        "bits": bits,
                        "kl": score.loss,
                        "decibels": own,
                        "llama_bits": sum(scheme.storage_bits(tuple(w.shape)) for w in llama.values()) / n_llama,
                        "llama_decibels": other,
                    }
                )
            print(
                *(f"{r['case']:16s} {r['quantizer']:16s} {r['value']:.2f} {r['kl']:.4f}" for r in rows[-2:]), sep="\n", flush=True
            )
    return rows


def table(rows: list[Row]) -> list[str]:
    """A line for each scheme: round-to-nearest / clip search."""
    lines = [
        "| about | scheme | bits | dB | KL, nats | accuracy, % (95 %, clip search) | stories260K bits | dB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        f"| | float32 | 32.00 | | 0 | {rows[0]['value']:.2f} | | |",
    ]
    schemes = [row for row in rows if "about" in row]
    for nearest, clip in zip(schemes[::2], schemes[1::2], strict=True):
        lines.append(
            f"| {clip['about']} | {clip['case']} | {clip['bits']:.2f} | {nearest['decibels']:.1f} / {clip['decibels']:.1f} | "
            f"{nearest['kl']:.3g} / {clip['kl']:.3g} | {nearest['value']:.2f} / {clip['value']:.2f} "
            f"({clip['low']:.2f} to {clip['high']:.2f}) | {clip['llama_bits']:.2f} | "
            f"{nearest['llama_decibels']:.1f} / {clip['llama_decibels']:.1f} |"
        )
    return lines


def main() -> None:
    """Measure, print the table, and write it to the report folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure()
    rows.append(_machine())
    notes = [
        f"ResNet-20, every layer in one scheme, on {N_IMAGES:,} test images; intervals are paired with the float model.",
        "Bits count scales, zero points, outliers and padding; rows are short here (27 to 576 columns), so that groups of 64",
        "and blocks of 32 end ragged. Each cell: round-to-nearest / clip search. dB: signal to noise ratio of the weights, all",
        "weighing alike; on ResNet-20 the search weighs errors by the inputs' second moments instead.",
        "",
        str(rows[-1]["case"]),
    ]
    text = "\n".join(["# bench_formats", "", *table(rows), "", *notes]) + "\n"
    print(text)
    folder = REPORTS / "bench_formats"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(text)
    for file in filter(None, (arguments.json, folder / "rows.json")):
        file.write_text(json.dumps(rows, indent=1, default=float) + "\n")


if __name__ == "__main__":
    main()
