"""`search`: predicted against measured losses, and the hypervolume as it grew; each panel is a file, too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mpsearch.reporting.charts.style import FORMATS, PANEL, SEARCH, UNIFORM, new_figure, save, styled
from mpsearch.reporting.curves import Curve, hypervolume_curve, kendall, predicted_losses
from mpsearch.runs.run import Run


def draw_search(run: Run, folder: Path, every: bool = False) -> list[str]:
    """Write the figure, with `every` each panel and all formats, too; returns the names, none where there is nothing to show."""
    drawn = _panels(run)
    if not drawn:
        return []
    with styled():
        save(_figure(drawn), folder, "search", FORMATS if every else ("png",))
        for name, draw in drawn.items() if every else ():
            save(_figure({name: draw}), folder, name, FORMATS)
    return ["search", *(drawn if every else ())]


def _panels(run: Run) -> Mapping[str, Callable[[Axes], None]]:
    drawn: dict[str, Callable[[Axes], None]] = {}
    predicted, measured = predicted_losses(run)
    shown = (predicted > 0) & (measured > 0)
    if shown.sum() > 2:
        drawn["search_predicted"] = partial(_draw_predicted, predicted[shown], measured[shown])
    curve = hypervolume_curve(run)
    if curve is not None and len(curve.volumes) > 1:
        drawn["search_hypervolume"] = partial(_draw_hypervolume, curve)
    return drawn


def _figure(drawn: Mapping[str, Callable[[Axes], None]]) -> Figure:
    figure, grid = new_figure(PANEL[0] * len(drawn), PANEL[1], 1, len(drawn))
    for axes, draw in zip(grid.flat, drawn.values(), strict=True):
        draw(axes)
    return figure


def _draw_predicted(predicted: np.ndarray, measured: np.ndarray, axes: Axes) -> None:
    low, high = min(predicted.min(), measured.min()) / 1.3, max(predicted.max(), measured.max()) * 1.3
    axes.plot((low, high), (low, high), color=UNIFORM, lw=1, ls=(0, (5, 4)))
    axes.plot(predicted, measured, "o", color=SEARCH, ms=4, alpha=0.6)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    axes.set(xlabel="loss predicted from the sensitivities", ylabel="measured loss, search split")
    axes.set_title(f"Predicted and measured loss (Kendall's tau {kendall(predicted, measured):.2f})", fontsize=13)


def _draw_hypervolume(curve: Curve, axes: Axes) -> None:
    axes.plot(curve.evaluations, curve.volumes, color=SEARCH)
    axes.set(xlabel="evaluations", ylabel="bits x decades of loss")
    axes.set_title("Hypervolume on the search split", fontsize=13)
