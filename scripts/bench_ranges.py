"""What each way to choose the range of quantized inputs makes of ResNet-20 (CIFAR-10); to `reports/bench_ranges/`.

    python scripts/bench_ranges.py

Weights have 8 bits (clip search), inputs 8, 6 and 4: a range for each token when it comes, or a static one of calibration,
found as min-max, percentile, MSE or entropy; symmetric or asymmetric. Calibrated on 1,000 training images, measured on the test
images. The data are found in `$MPSEARCH_DATA/cifar10` (default `../shared/data/cifar10`). `--json FILE` writes the rows too.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from bench_quantizers import _row
from bench_resnet20 import build_engine
from pages import Row, machine, write

from mpsearch.allocation import SearchSpace
from mpsearch.engine.engine import FLOAT, QuantEngine
from mpsearch.quantizers.clip_search import ClipSearch
from mpsearch.schemes.input import IntegerInput
from mpsearch.schemes.integer import Integer
from mpsearch.schemes.ranges import RANGES

BITS = (8, 6, 4)
KINDS = {"token": ("token", "minmax"), **{f"static {name}": ("static", name) for name in RANGES}}


def accuracy() -> list[Row]:
    """Test accuracy with its paired interval and the KL to the float model, of every range at every width."""
    base = build_engine()
    rows: list[Row] = []
    for bits in BITS:
        schemes = {"float input": Integer(8)}
        for kind, (scale, name) in KINDS.items():
            for symmetric in (True, False):
                words = f"a{bits}, {kind}, {'symmetric' if symmetric else 'asymmetric'}"
                schemes[words] = Integer(8, input=IntegerInput(bits, scale, symmetric, name))  # type: ignore[arg-type]
        space = SearchSpace.build(base.space.layers, schemes, other_bits=base.space.other_bits)
        engine = QuantEngine(base.model, base.task, space, dict.fromkeys(schemes, ClipSearch()), base.moments)
        engine._batches, engine._float_logits = base._batches, base._float_logits  # loaded and computed once
        if not rows:
            rows = [_measured(engine, FLOAT, "float"), _measured(engine, space.uniform("float input"), "w8, float input")]
        for words in list(schemes)[1:]:
            rows.append(_measured(engine, space.uniform(words), words))
            print(f"{words}: {rows[-1]['value']:.2f}", flush=True)
    return rows


def _measured(engine: QuantEngine, allocation, case: str) -> Row:
    return {**_row(engine, allocation, case, "accuracy"), "kl": engine.score(allocation, "confirm").loss}


def main() -> None:
    """Measure, print the table, and write it to the report folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [*accuracy(), machine()]
    by_case = {str(row["case"]): row for row in rows}
    lines = [
        "| input | range | symmetric: accuracy % | 95 % interval | KL | asymmetric: accuracy % | 95 % interval | KL |",
        "| --- | --- | ---: | --- | ---: | ---: | --- | ---: |",
    ]

    def cells(row: Row) -> str:
        return f"{row['value']:.2f} | {row['low']:.2f} to {row['high']:.2f} | {row['kl']:.4g}"

    lines += [f"| {name} | | {cells(by_case[name])} | | | |" for name in ("float", "w8, float input")]
    for bits in BITS:
        for kind in KINDS:
            both = (cells(by_case[f"a{bits}, {kind}, {how}"]) for how in ("symmetric", "asymmetric"))
            lines.append(f"| {bits} bits | {kind} | {' | '.join(both)} |")
    notes = [
        "ResNet-20 on the 5,000 staged CIFAR-10 test images, weights of 8 bits, all 20 layers alike; static ranges from 1,000",
        "training images. The interval is that of the quantized network on these images: the float accuracy plus the paired",
        f"bootstrap of the difference. {rows[-1]['case']}.",
    ]
    write("bench_ranges", ["# bench_ranges", "", *lines, "", *notes], rows, arguments.json)


if __name__ == "__main__":
    main()
