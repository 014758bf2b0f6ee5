"""`comparison`: the confirmed fronts of several runs, and their files in the runtimes: loss and quality against size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from mpsearch.divergence import LOSS_FLOOR
from mpsearch.reporting.charts.style import FORMATS, PANEL, Label, lay_out, new_figure, place_labels, save, styled
from mpsearch.runs.run import Run

# Okabe and Ito's palette, darkened.
COLORS = ("#0068a8", "#b84e00", "#007a5a", "#a3216f", "#8a6d00", "#6b4fa0", "#24292f", "#3f7f93")
MOST_LETTERS = 40  # of a name
MARKERS = "oDsv^PX<"  # of runs, as their colours
FLOAT_COLOR = "#57606a"
# stage -> how its points are drawn
STAGES: dict[str, dict[str, Any]] = {
    "": {"ls": "-"},
    "refined": {"ls": "-"},
    "unrefined": {"ls": (0, (2, 2)), "mfc": "white"},
    "trained": {"ls": (0, (6, 2)), "marker": "*", "ms": 11},
    "runtime": {"ls": "", "marker": "p", "ms": 12, "mfc": "none", "mew": 1.8},
}


@dataclass(frozen=True)
class Drawn:
    """A series of the figure.

    `run` is the number of its run, which has a colour; `stage` a key of `STAGES`; `points` have the columns size_bytes, loss,
    quality, quality_low and quality_high.
    """

    name: str
    run: int
    stage: str
    points: pd.DataFrame


def draw_comparison(series: Sequence[Drawn], run: Run, folder: Path) -> None:
    """Write the figure in all formats; `run` says what the quality and the loss are."""
    quality = run.quality
    scale, unit = (1e-3, "kB") if max(s.points.size_bytes.max() for s in series) < 4e6 else (1e-6, "MB")
    with styled():
        figure, ((losses, qualities),) = new_figure(2 * PANEL[0], PANEL[1] + 0.8, 1, 2)
        lines, labels = [], []
        for each in series:
            line = _draw(losses, qualities, each, run, scale)
            lines.append(line)
            labels.append(Label(_short(each.name), line, COLORS[each.run % len(COLORS)]))
        baseline = run.baseline("confirm")
        if baseline is not None:
            qualities.axhline(quality.scale * baseline.quality, color=FLOAT_COLOR, lw=1.2, ls=(0, (6, 3)))
        losses.set(yscale="log", xlabel=f"size ({unit})", ylabel=f"loss: {run.loss_label}", title="Loss on the confirm split")
        better = "" if quality.sign > 0 else " (lower is better)"
        qualities.set(xlabel=f"size ({unit})", ylabel=quality.label + better, title="Bars: 95 % intervals from the float model")
        lay_out(figure)
        if baseline is not None:
            level = np.array([[x, quality.scale * baseline.quality] for x in qualities.get_xlim()])
            points = [[scale * p.size_bytes, quality.scale * p.quality] for s in series for p in s.points.itertuples()]
            place_labels(qualities, [Label("float", level[1:], FLOAT_COLOR)], points, [level])
        place_labels(losses, labels, (), lines)
        if len(losses.texts) < len(labels):  # no space for all
            for text in list(losses.texts):
                text.remove()
            figure.legend(*losses.get_legend_handles_labels(), fontsize=11, loc="outside lower center", ncols=3)
            figure.set_layout_engine("constrained")  # makes space for the legend when the figure is saved
        save(figure, folder, "comparison", FORMATS)


def _draw(losses: Axes, qualities: Axes, each: Drawn, run: Run, scale: float) -> np.ndarray:
    """Draw a series on both axes; returns the corners of its line on the first, `[n, 2]`."""
    quality, points = run.quality, each.points
    color, size = COLORS[each.run % len(COLORS)], scale * points.size_bytes.to_numpy()
    style: dict[str, Any] = {"marker": MARKERS[each.run % len(MARKERS)], "color": color, **STAGES[each.stage]}
    loss = np.maximum(points.loss.to_numpy(), LOSS_FLOOR)
    best = loss <= np.minimum.accumulate(loss)  # the line joins what is not dominated
    if each.stage == "runtime":
        best[:] = True
    losses.plot(size[best], loss[best], label=_short(each.name), **style)
    losses.plot(size[~best], loss[~best], alpha=0.4, **{**style, "ls": ""})
    score, low, high = (quality.scale * points[f"quality{end}"].to_numpy() for end in ("", "_low", "_high"))
    if quality.kind == "share":
        low, high = low.clip(0, 100), high.clip(0, 100)
    bars = np.clip([score - low, high - score], 0, None)
    qualities.errorbar(size, score, yerr=bars, elinewidth=0.8, **{**style, "ls": ""})
    return np.stack([size, loss], 1)[best]


def _short(name: str) -> str:
    """Names of folders differ at their end."""
    return name if len(name) <= MOST_LETTERS else f"…{name[1 - MOST_LETTERS :]}"
