"""What equalizing channels beforehand makes of three networks; to `reports/bench_equalizers/`.

    python scripts/bench_equalizers.py run efficientnet_lite0     (or stories260k, minilm) measures one network
    python scripts/bench_equalizers.py page                       the table and the figure of all that were measured

Every scheme in all layers, on data that neither calibration nor an equalizer has seen; KL and intervals beside the network as it
came. The data are found in `$MPSEARCH_DATA` (default `../shared/data`).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from bench_resnet20 import DATA
from pages import REPORTS, Row, machine
from torch import nn

from mpsearch.allocation import SearchSpace
from mpsearch.engine.calibrate import calibrate
from mpsearch.engine.engine import FLOAT, QuantEngine, load_batches
from mpsearch.equalizers.awq import AWQ
from mpsearch.equalizers.base import Equalizer, input_ranges
from mpsearch.equalizers.cross_layer import CrossLayer
from mpsearch.equalizers.smooth_quant import SmoothQuant
from mpsearch.graph.fold import fold_batch_norms
from mpsearch.graph.trace import trace_layers
from mpsearch.graph.unsearched import other_bits
from mpsearch.layer import weight_rows
from mpsearch.models.bert import minilm
from mpsearch.models.efficientnet import efficientnet_lite0
from mpsearch.models.llama import stories260k
from mpsearch.quantizers.base import Quantizer
from mpsearch.quantizers.clip_search import ClipSearch
from mpsearch.quantizers.coordinate_descent import CoordinateDescent
from mpsearch.quantizers.round_to_nearest import RoundToNearest
from mpsearch.schemes.input import IntegerInput
from mpsearch.schemes.integer import Integer
from mpsearch.tasks.base import Task
from mpsearch.tasks.imagenet import ImageNetSample
from mpsearch.tasks.language import Stories
from mpsearch.tasks.stsb import STSBenchmark

FOLDER = REPORTS / "bench_equalizers"
EQUALIZERS: dict[str, Equalizer | None] = {
    "none": None,
    "cross_layer": CrossLayer(),
    "awq": AWQ(),
    "smooth_quant": SmoothQuant(),
}
QUANTIZERS: dict[str, Quantizer] = {
    "round_to_nearest": RoundToNearest(),
    "clip_search": ClipSearch(),
    "coordinate_descent": CoordinateDescent(),
}
STATIC = {bits: IntegerInput(bits, "static", symmetric=bits >= 8) for bits in (4, 6, 8)}
SCHEMES = {
    "w2": Integer(2),
    "w3": Integer(3),
    "w4": Integer(4),
    "w3g64": Integer(3, 64, symmetric=False),
    "w8 per tensor": Integer(8, "tensor"),
    "w6 per tensor": Integer(6, "tensor"),
    "w8a8 static": Integer(8, input=STATIC[8]),
    "w4a8 static": Integer(4, input=STATIC[8]),
    "w8a6 static": Integer(8, input=STATIC[6]),
    "w4a4 static": Integer(4, input=STATIC[4]),
    "w4a4 per token": Integer(4, input=IntegerInput(4, "token", symmetric=False)),
}
ALL = tuple(QUANTIZERS)
Build = tuple[Callable[[], nn.Module], Callable[[], Task], dict[str, tuple[str, ...]]]


def networks() -> dict[str, Build]:
    """How each is built, and which schemes it is tried in, by which quantizers."""
    data = DATA.parent
    inputs = {name: ("clip_search",) for name in SCHEMES if "a" in name.split()[0]}
    return {
        "efficientnet_lite0": (
            lambda: efficientnet_lite0().to(memory_format=torch.channels_last),  # type: ignore[call-overload]
            lambda: ImageNetSample(str(data / "imagenet_sample"), n_calibration=100, n_search=28, n_confirm=372),
            {"w4": ALL, "w8 per tensor": ALL[:1], "w6 per tensor": ALL[1:2]}
            | {name: ("clip_search",) for name in ("w8a8 static", "w8a6 static")},
        ),
        "stories260k": (
            lambda: stories260k(data / "stories260k" / "model.safetensors"),
            lambda: Stories(str(data / "stories260k"), n_calibration=64, n_search=1, n_confirm=32),
            {"w3": ALL, "w4": ALL, "w3g64": ALL} | inputs,
        ),
        "minilm": (
            minilm,
            lambda: STSBenchmark(str(data / "stsb"), n_calibration=50, n_search=50, n_confirm=100),
            {"w3": ALL[:2], "w4": ALL[:2]} | {name: ("clip_search",) for name in ("w8a8 static", "w4a4 per token")},
        ),
    }


def measure(network: str) -> None:
    """One row for each equalizer, scheme and quantizer; on disk after each, and not measured again."""
    build, make_task, tried = networks()[network]
    file = FOLDER / f"{network}.json"
    rows: list[Row] = json.loads(file.read_text())[:-1] if file.exists() else []
    known = {(row.get("equalizer"), row.get("quantizer"), row["case"]) for row in rows}
    task = make_task()
    calibration = load_batches(task, "calibration", "cpu")
    schemes = {name: SCHEMES[name] for name in tried}

    def fresh() -> nn.Module:
        model = build().eval()
        fold_batch_norms(model, task.forward, calibration[0][0])
        return model

    def engine_of(model: nn.Module, quantizer: Quantizer) -> QuantEngine:
        layers = trace_layers(model, task.forward, calibration[0][0])
        space = SearchSpace.build(layers, schemes, other_bits=other_bits(model, layers))
        moments = calibrate(model, task, layers, calibration)
        return QuantEngine(model, task, space, dict.fromkeys(schemes, quantizer), moments)

    def record(row: Row) -> None:
        rows.append(row)
        FOLDER.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps([*rows, machine()], indent=1, default=float) + "\n")
        print(*(row.get(key, "") for key in ("case", "quantizer", "equalizer", "value", "kl")), flush=True)

    first = engine_of(fresh(), ClipSearch())  # the network as it came
    score = first.score(FLOAT, "confirm")
    if not rows:
        record({"what": network, "case": "float32", "value": score.quality, "unit": task.quality_name})
    for name, equalizer in EQUALIZERS.items():
        usable = {s: q for s, q in tried.items() if name != "smooth_quant" or SCHEMES[s].input is not None}
        todo = [(q, s) for s, quantizers in usable.items() for q in quantizers if (name, q, s) not in known]
        if not todo:
            continue
        model, about = fresh(), {"seconds": 0.0, "scaled": ""}
        if equalizer is not None:
            start = time.perf_counter()
            done = equalizer.equalize(model, task, calibration, schemes)
            about["seconds"] = time.perf_counter() - start
            about["scaled"] = ", ".join(f"{len(found)} {what}" for what, found in done.names.items() if found)
        base = engine_of(model, ClipSearch())
        bits = {
            s: sum(SCHEMES[s].storage_bits(layer.shape) for layer in base.space.layers) + base.space.other_bits for s in tried
        }
        engines = {q: QuantEngine(model, task, base.space, dict.fromkeys(schemes, QUANTIZERS[q]), base.moments) for q in ALL}
        for quantizer, scheme in todo:
            engine = engines[quantizer]
            engine._batches, engine._float_logits = first._batches, first._float_logits
            score = engine.score(engine.space.uniform(scheme), "confirm")
            row: Row = {"what": network, "case": scheme, "quantizer": quantizer, "equalizer": name}
            row |= {"value": score.quality, "low": score.quality_low, "high": score.quality_high, "unit": task.quality_name}
            record(row | {"kl": score.loss, "size_bytes": bits[scheme] / 8} | about)


def page() -> None:
    """`rows.json`, `table.md` and `ranges.png` of what was measured."""
    file = FOLDER / "rows.json"
    known: list[Row] = json.loads(file.read_text()) if file.exists() else []
    for network in networks():
        if (new := FOLDER / f"{network}.json").exists():
            found = json.loads(new.read_text())
            found[-1]["of"] = network  # the machine
            known = [row for row in known if network not in (row["what"], row.get("of"))] + found
    file.write_text(json.dumps(known, indent=1) + "\n")
    lines = ["# bench_equalizers", ""]
    for network in networks():
        rows = [row for row in known if row["what"] == network]
        if rows:
            lines += [f"## {network}", "", *table(rows), ""]
    lines += [f"{row['of']}: {row['case']}." for row in known if row["what"] == "machine"]
    (FOLDER / "table.md").write_text("\n".join(lines) + "\n")
    draw()


def table(rows: list[Row]) -> list[str]:
    """A line for each scheme and quantizer, a column for each equalizer: quality and KL."""
    by = {(row["case"], row.get("quantizer"), row.get("equalizer")): row for row in rows}
    names = [name for name in EQUALIZERS if any(row.get("equalizer") == name for row in rows)]
    percent = rows[0]["unit"] == "accuracy"

    def quality(value: float) -> str:
        return f"{100 * value:.1f} %" if percent else f"{value:.4g}"

    def cell(row: Row | None) -> str:
        if row is None:
            return ""
        return f"{quality(row['value'])} ({quality(row['low'])} to {quality(row['high'])}), {row['kl']:.3g}"

    lines = [
        f"| scheme | quantizer | {' | '.join(names)} |",
        f"| --- | --- |{' ---: |' * len(names)}",
        f"| float32 | | {quality(rows[0]['value'])} {' |' * len(names)}",
    ]
    for scheme, quantizer in dict.fromkeys((row["case"], row["quantizer"]) for row in rows[1:]):
        cells = (cell(by.get((scheme, quantizer, name))) for name in names)
        lines.append(f"| {scheme} | {quantizer} | {' | '.join(cells)} |")
    lines += ["", f"{rows[0]['unit']} (95 % interval), KL to the float network in nats."]
    for name in names[1:]:
        row = next(row for row in rows if row.get("equalizer") == name)
        before = by[row["case"], row["quantizer"], "none"]
        grows = row["size_bytes"] - before["size_bytes"]
        extra = f", {grows:,.0f} bytes more for the bounds of ReLU6" if grows else ""
        lines.append(f"{name}: {row['scaled']} scaled in {row['seconds']:.0f} s{extra}.")
    return lines


def draw(layer: str = "_blocks.1._depthwise_conv") -> None:
    """Ranges of one depthwise layer's channels, before and after cross-layer equalization: weights read, and input."""
    import matplotlib.pyplot as plt

    _, make_task, _ = networks()["efficientnet_lite0"]
    task = make_task()
    batches = load_batches(task, "calibration", "cpu")[:1]
    model = efficientnet_lite0().eval()
    fold_batch_norms(model, task.forward, batches[0][0])
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for label in ("before", "after"):
        if label == "after":
            CrossLayer().equalize(model, task, batches, {})
        module = model.get_submodule(layer)
        seen: list[torch.Tensor] = []
        hook = module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].abs().amax((0, 2, 3))))
        with torch.no_grad():
            task.forward(model, batches[0][0])
        hook.remove()
        for axis, values in zip(axes, (input_ranges(module, weight_rows(module)), seen[0]), strict=True):
            axis.semilogy(values[values > 1e-4].sort(descending=True).values, label=label)  # without what is dead
    for axis, title in zip(axes, ("largest weight of each channel", "largest input of each channel, one batch"), strict=True):
        axis.set(title=title, xlabel="channels, from the largest")
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"EfficientNet-Lite0, {layer}: cross-layer equalization")
    figure.savefig(FOLDER / "ranges.png", dpi=150)


def main() -> None:
    """Measure one network, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "page"])
    parser.add_argument("network", nargs="?", choices=list(networks()))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.what == "page":
        page()
    elif arguments.network is None:
        parser.error("run needs a network")
    else:
        measure(arguments.network)


if __name__ == "__main__":
    main()
