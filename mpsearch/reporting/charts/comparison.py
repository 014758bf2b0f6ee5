"""`comparison`: the confirmed fronts of several runs: loss and quality against size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mpsearch.divergence import LOSS_FLOOR
from mpsearch.evaluation import Evaluation
from mpsearch.reporting.charts.style import FORMATS, PANEL, Label, lay_out, new_figure, place_labels, save, styled
from mpsearch.runs.run import Run

# Okabe and Ito's palette, darkened; markers differ as well.
COLORS = ("#0068a8", "#b84e00", "#007a5a", "#a3216f", "#8a6d00", "#6b4fa0", "#24292f", "#3f7f93")
MARKERS = "oDs^vP*X"


def draw_comparison(series: Sequence[tuple[str, Sequence[Evaluation]]], run: Run, folder: Path) -> None:
    """Write the figure in all formats; `run` says what the quality and the loss are."""
    quality = run.quality
    largest = max(e.size_bytes for _, points in series for e in points)
    scale, unit = (1e-3, "kB") if largest < 4e6 else (1e-6, "MB")
    with styled():
        figure, ((losses, qualities),) = new_figure(2 * PANEL[0], PANEL[1] + 0.8, 1, 2)
        labels: list[Label] = []
        lines = []
        for i, (name, points) in enumerate(series):
            color, marker = COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]
            size = scale * np.array([e.size_bytes for e in points])
            loss = np.array([max(e.loss, LOSS_FLOOR) for e in points])
            best = loss <= np.minimum.accumulate(loss)  # the line joins what is not dominated
            losses.plot(size[best], loss[best], color=color, marker=marker, label=name)
            losses.plot(size[~best], loss[~best], color=color, marker=marker, ls="", alpha=0.4)
            ends = (np.array([getattr(e, f"quality{end}") for e in points]) for end in ("", "_low", "_high"))
            score, low, high = (quality.scale * values for values in ends)
            if quality.kind == "share":
                low, high = low.clip(0, 100), high.clip(0, 100)
            bars = np.clip([score - low, high - score], 0, None)
            qualities.errorbar(size, score, yerr=bars, color=color, marker=marker, ls="", elinewidth=0.8)
            lines.append(np.stack([size, loss], 1)[best])
            labels.append(Label(name, lines[-1], color))
        for split, baseline in run.baselines.items():
            if split == "confirm":
                qualities.axhline(quality.scale * baseline.quality, color="#57606a", lw=1.2, ls=(0, (6, 3)))
        losses.set(yscale="log", xlabel=f"size of all tensors ({unit})", ylabel=f"loss: {run.loss_label}", title="Loss")
        better = "" if quality.sign > 0 else " (lower is better)"
        qualities.set(xlabel=f"size of all tensors ({unit})", ylabel=quality.label + better, title="Bars: 95 % intervals")
        lay_out(figure)
        place_labels(losses, labels, (), lines)
        if len(losses.texts) < len(labels):  # no space for all
            for text in list(losses.texts):
                text.remove()
            losses.legend(fontsize=11)
        save(figure, folder, "comparison", FORMATS)
