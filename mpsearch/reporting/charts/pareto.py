"""`pareto.png` and `.svg`: loss and quality against cost, and, where it tells points apart, quality against time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mpsearch.divergence import LOSS_FLOOR
from mpsearch.evaluation import Evaluation
from mpsearch.quality import Quality
from mpsearch.reporting.charts.style import CONFIRM, FLOAT, PICK, SEARCH, UNIFORM, lay_out, new_figure, place_labels, save
from mpsearch.reporting.findings import budget_positions, times_differ
from mpsearch.reporting.tables import front_table, trained_table, uniform_table
from mpsearch.runs.run import Run

SPLITS: dict[str, dict[str, Any]] = {
    "search": {"color": SEARCH, "marker": "o", "mfc": SEARCH, "ms": 4.5},
    "confirm": {"color": CONFIRM, "marker": "D", "mfc": "white", "ms": 4.5},
}

MAX_INTERVALS = 20  # bars of a curve; with more they cover its points


@dataclass(frozen=True)
class Panel:
    """One pair of axes: the columns that it shows of every table, and what they are multiplied by."""

    axes: Axes
    x_column: str
    x_scale: float
    y_column: str
    y_scale: float

    def x(self, table: pd.DataFrame) -> pd.Series:
        """Horizontal positions."""
        return self.x_scale * table[self.x_column]

    def y(self, table: pd.DataFrame, suffix: str = "") -> pd.Series:
        """Vertical positions; losses are cut off at the smallest that a logarithm can show."""
        values = self.y_scale * table[self.y_column + suffix]
        return values.clip(lower=LOSS_FLOOR) if self.y_column == "loss" else values

    def points(self, table: pd.DataFrame) -> NDArray[np.float64]:
        """Both, `[n, 2]`."""
        return np.stack([self.x(table), self.y(table)], 1).astype(float)

    def plot(self, table: pd.DataFrame, label: str, **style: Any) -> None:
        """Markers, joined by a line where `lw` is above 0."""
        self.axes.plot(self.x(table), self.y(table), label=label, **{"lw": 0.0, **style})

    def mark_picked(self, front: pd.DataFrame, picked: Evaluation | None) -> None:
        """A ring around the picked point, where it is on the front."""
        chosen = front[front.allocation == (picked and picked.allocation.to_json())]
        style: dict[str, Any] = {"s": 260, "facecolors": "none", "edgecolors": PICK, "linewidths": 2, "zorder": 5}
        if not chosen.empty:
            self.axes.scatter(self.x(chosen), self.y(chosen), label="picked", **style)

    def mark_trained(self, trained: pd.DataFrame) -> None:
        """A star for each point that was trained, with an arrow from where it was before."""
        for split, points in trained.groupby("split"):
            color = SPLITS[str(split)]["color"]
            self.plot(points, f"trained, {split} split", color=color, marker="*", ms=13, mec="black", mew=0.6, zorder=6)
            for at, start, end in zip(self.x(points), self.y(points, "_before"), self.y(points), strict=True):
                self.axes.annotate("", (at, end), (at, start), arrowprops={"arrowstyle": "->", "color": color, "lw": 1.5})


def draw_pareto(run: Run, picked: Evaluation, folder: Path) -> None:
    """Write the figure in both formats."""
    save(pareto_figure(run, picked), folder, "pareto", ("png", "svg"))


def pareto_figure(run: Run, picked: Evaluation | None = None) -> Figure:
    """The front on both splits, the uniform allocations, the budgets, the float model, and the picked point.

    One row of panels per objective; with two, the front on the search split is coloured by the other one. Where the forward
    passes of the points differ in time, a third panel shows quality against time.
    """
    quality, timed = run.quality, times_differ(run)
    front, uniform, trained = front_table(run), uniform_table(run), trained_table(run)
    shown = uniform[uniform.split == ("confirm" if (uniform.split == "confirm").any() else "search")]
    figure, grid = new_figure(19 if timed else 13, 5.8 * len(run.objectives), len(run.objectives), 2 + timed)
    panels: list[Panel] = []
    for axes, objective in zip(grid, run.objectives, strict=True):
        scale, label = _cost_axis(objective, front[objective].max())
        loss = Panel(axes[0], objective, scale, "loss", 1.0)
        score = Panel(axes[1], objective, scale, quality.name, quality.scale)
        _draw_losses(loss, run, front)
        _draw_qualities(score, run, front)
        for panel in (loss, score):
            panel.mark_trained(trained)
            panel.axes.set_xlabel(label)
            _mark_budgets(panel, budget_positions(run, objective))
        panels += [loss, score]
    if timed:
        for spare in grid[1:, 2]:
            spare.set_axis_off()
        panels.append(Panel(grid[0, 2], "measured_ms", 1.0, quality.name, quality.scale))
        _draw_times(panels[-1], run, front)
        panels[-1].axes.set_ylim(grid[0, 1].get_ylim())
    line = {"ls": "--", "lw": 0.8} if len(run.objectives) == 1 else {}
    for panel in panels:
        joined = line if panel.x_column != "measured_ms" else {}
        panel.plot(shown, f"uniform, {'/'.join(shown.split.unique())} split", color=UNIFORM, marker="s", ms=6, **joined)
        panel.mark_picked(front, picked)
        panel.axes.grid(alpha=0.25)
    legends = [panel.axes.get_legend_handles_labels() for panel in panels]
    named = {text: handle for handles, texts in legends for handle, text in zip(handles, texts, strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=5, fontsize=9)
    lay_out(figure)
    for panel in panels:
        place_labels(panel.axes, panel.points(shown), shown.scheme, np.concatenate([panel.points(front), panel.points(shown)]))
    return figure


def _draw_losses(panel: Panel, run: Run, front: pd.DataFrame) -> None:
    """All allocations that were tried, and the front on both splits."""
    tried = list(run.on("search").values())
    losses = np.maximum([e.loss for e in tried], LOSS_FLOOR)
    at = [panel.x_scale * e.cost(panel.x_column) for e in tried]
    panel.axes.scatter(at, losses, s=9, c=SEARCH, alpha=0.2, lw=0, label=f"{len(tried)} allocations tried, search split")
    other = next((column for column in run.objectives if column != panel.x_column), None)
    for split, points in front.groupby("split", sort=False):
        if other is None or split == "confirm":
            panel.plot(points, f"front, {split} split", **SPLITS[str(split)], lw=0.0 if other else 1.3)
            continue
        scale, unit = _cost_axis(other, front[other].max())
        style: dict[str, Any] = {"s": 34, "cmap": "viridis", "zorder": 4}
        shades = panel.axes.scatter(
            panel.x(points), panel.y(points), c=scale * points[other], label="front, search split", **style
        )
        panel.axes.figure.colorbar(shades, ax=panel.axes, label=unit, pad=0.01)
    panel.axes.set(yscale="log", ylabel=f"loss: {run.loss_label}", title="Loss against cost (lower left is better)")


def _draw_qualities(panel: Panel, run: Run, front: pd.DataFrame) -> None:
    """The front on both splits, intervals of some of its points, and the float model."""
    quality, lines = run.quality, 1.3 if len(run.objectives) == 1 else 0.0
    for split, points in front.groupby("split", sort=False):
        value = panel.y(points)
        intervals = np.clip([value - panel.y(points, "_low"), panel.y(points, "_high") - value], 0, None)
        style = {**SPLITS[str(split)], "lw": lines, "alpha": 1.0 if split == "confirm" else 0.45}
        style |= {"elinewidth": 0.8, "capsize": 2, "errorevery": -(-len(points) // MAX_INTERVALS)}
        panel.axes.errorbar(panel.x(points), value, yerr=intervals, label=f"front, {split} split", **style)
    for split, baseline in run.baselines.items():
        label = f"float model, {split} split: {quality.text(baseline.quality)}"
        panel.axes.axhline(quality.scale * baseline.quality, color=SPLITS[split]["color"], lw=1, ls="-.", alpha=0.8, label=label)
    _zoom(panel, run, front)
    better = "" if quality.sign > 0 else " (lower is better)"
    title = f"{_capitalized(quality)} against cost{better}\nbars: 95 % intervals, paired with the float model"
    panel.axes.set_ylabel(quality.label)
    panel.axes.set_title(title, fontsize=11)


def _draw_times(panel: Panel, run: Run, front: pd.DataFrame) -> None:
    """Quality on the confirm split against the measured time of a forward pass there."""
    panel.plot(front[front.split == "confirm"], "front, confirm split", **SPLITS["confirm"])
    baseline = run.baseline("confirm")
    if baseline is not None and baseline.measured_ms is not None:
        at = [baseline.measured_ms], [run.quality.scale * baseline.quality]
        panel.axes.plot(*at, "*", color=FLOAT, ms=13, label="float model, confirm split")
    panel.axes.set(xlabel="measured milliseconds of a forward pass", ylabel=run.quality.label)
    panel.axes.set_title(f"{_capitalized(run.quality)} against time, confirm split")


def _mark_budgets(panel: Panel, positions: Mapping[str, float]) -> None:
    """A dotted line for each, with its name at a height of its own."""
    for i, (name, position) in enumerate(positions.items()):
        at = panel.x_scale * position
        panel.axes.axvline(at, color="black", lw=1, ls=":")
        height = 0.02 + 0.33 * (i % 3)
        panel.axes.annotate(name, (at, height), xycoords=("data", "axes fraction"), rotation=90, ha="right", fontsize=9)


def _zoom(panel: Panel, run: Run, front: pd.DataFrame) -> None:
    """Cut the quality axis so that a point at chance level does not flatten all others."""
    sign = run.quality.sign  # times this, more is better
    measured = sign * panel.y(front)
    best = max([measured.max(), *(sign * panel.y_scale * baseline.quality for baseline in run.baselines.values())])
    point = 0.01 * abs(best)  # of accuracy, or a hundredth of a perplexity
    worst, middle = measured.min(), measured.median()
    bottom = max(worst, middle - 4 * max(best - middle, point) - 8 * point)
    ends = bottom - 0.04 * (best - bottom) - 0.1 * point, best + 0.06 * (best - bottom) + 0.1 * point
    panel.axes.set_ylim(*sorted(sign * end for end in ends))


def _cost_axis(objective: str, largest: float) -> tuple[float, str]:
    """(factor, label) of an objective's axis."""
    if objective != "size_bytes":
        return 1.0, {"latency_ms": "predicted milliseconds of a forward pass"}.get(objective, objective.replace("_", " "))
    scale, unit = (1e-3, "kB") if largest < 1e6 else (1e-6, "MB")
    return scale, f"size of all parameters and buffers as stored ({unit})"


def _capitalized(quality: Quality) -> str:
    return quality.name[:1].upper() + quality.name[1:]
