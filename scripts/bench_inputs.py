"""What number formats of inputs make of stories260K and MiniLM-L6, beside weights alone; to `reports/bench_inputs_*/`.

    python scripts/bench_inputs.py stories260k
    python scripts/bench_inputs.py minilm

All Linear layers in one scheme by clip search, embeddings in float32; calibrated on data of their own, static scales too, and
measured on the confirm split. Data as in `bench_rotation.py`. `--json FILE` writes the rows as JSON too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from bench_rotation import network_of
from pages import Row, machine, write

from mpsearch.allocation import SearchSpace
from mpsearch.engine.calibrate import calibrate
from mpsearch.engine.engine import QuantEngine, load_batches
from mpsearch.graph.trace import trace_layers
from mpsearch.graph.unsearched import other_bits
from mpsearch.quantizers.clip_search import ClipSearch
from mpsearch.schemes.base import QuantScheme
from mpsearch.schemes.codebook import Codebook
from mpsearch.schemes.input import IntegerInput
from mpsearch.schemes.integer import Integer
from mpsearch.schemes.level_input import LevelInput
from mpsearch.schemes.rotated import Rotated

FP8, MXFP8, MXFP4, NVFP4 = (
    ("e4m3", "channel", "float32"),
    ("e4m3", 32, "e8m0"),
    ("e2m1", 32, "e8m0"),
    ("e2m1", 16, "e4m3"),
)
SCHEMES: dict[str, QuantScheme] = {
    "w8": Integer(8),
    "w8a8": Integer(8, input=IntegerInput(8)),
    "fp8_e4m3": Codebook(*FP8),
    "fp8a8": Codebook(*FP8, LevelInput()),
    "fp8a8, static": Codebook(*FP8, LevelInput("e4m3", "static")),
    "fp8a8, E5M2 inputs": Codebook(*FP8, LevelInput("e5m2")),
    "mxfp8a8": Codebook(*MXFP8, LevelInput("e4m3", "mx")),
    "mxfp4": Codebook(*MXFP4),
    "mxfp4a8": Codebook(*MXFP4, LevelInput("e4m3", "mx")),
    "mxfp4a4": Codebook(*MXFP4, LevelInput("e2m1", "mx")),
    "nvfp4": Codebook(*NVFP4),
    "nvfp4a4": Codebook(*NVFP4, LevelInput("e2m1", "nv")),
    "nvfp4a4, rotated": Rotated(Codebook(*NVFP4, LevelInput("e2m1", "nv"))),
    "w4g16": Integer(4, 16),
    "w4g16a4": Integer(4, 16, input=IntegerInput(4, symmetric=False)),
    "w4g16a4, rotated": Rotated(Integer(4, 16, input=IntegerInput(4, symmetric=False))),
}


def measure(network: str) -> list[Row]:
    """One row for each scheme."""
    model, task = network_of(network)
    layers = [la for la in trace_layers(model, task.forward, task.batches("calibration")[0][0]) if la.kind == "linear"]
    space = SearchSpace.build(layers, SCHEMES, other_bits=other_bits(model, layers))
    moments = calibrate(model, task, layers, load_batches(task, "calibration", "cpu"), rotated=True)
    engine = QuantEngine(model, task, space, dict.fromkeys(SCHEMES, ClipSearch()), moments)
    rows: list[Row] = []
    for name, scheme in SCHEMES.items():
        score = engine.score(space.uniform(name), "confirm")
        bits = sum(scheme.storage_bits(layer.shape) for layer in layers) / space.numel
        row: Row = {"what": network, "case": name, "value": score.quality, "unit": task.quality_name, "kl": score.loss}
        rows.append(row | {"low": score.quality_low, "high": score.quality_high, "bits": bits, "input_bits": scheme.input_bits})
        print(f"{name}: KL {score.loss:.3g}, {task.quality_name} {score.quality:.4g}", flush=True)
    return rows


def main() -> None:
    """Measure, print the table, and write it to the report folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=["stories260k", "minilm"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [*measure(arguments.network), machine()]
    lines = [
        f"| scheme | bits a weight | bits a value of the input | KL, nats | {rows[0]['unit']} (95 %) |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows[:-1]:
        quality = f"{row['value']:.4g} ({row['low']:.4g} to {row['high']:.4g})"
        lines.append(f"| {row['case']} | {row['bits']:.2f} | {row['input_bits']} | {row['kl']:.3g} | {quality} |")
    notes = ["", "Scales of weights are counted, those of inputs are not. Intervals are paired with the float model.", ""]
    page = [f"# bench_inputs {arguments.network}", "", *lines, *notes, str(rows[-1]["case"])]
    write(f"bench_inputs_{arguments.network}", page, rows, arguments.json)


if __name__ == "__main__":
    main()
