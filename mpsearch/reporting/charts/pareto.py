"""`pareto`: loss and quality against cost, and, where it tells points apart, quality against time; each panel is a file, too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import NDArray

from mpsearch.divergence import LOSS_FLOOR
from mpsearch.evaluation import Evaluation
from mpsearch.optimize.pareto import non_dominated
from mpsearch.quality import Quality
from mpsearch.reporting.charts.style import (
    CONFIRM,
    FORMATS,
    PALE,
    PANEL,
    PICK,
    SEARCH,
    TRAINED,
    TRIED,
    UNIFORM,
    Label,
    lay_out,
    new_figure,
    place_labels,
    save,
    styled,
)
from mpsearch.reporting.findings import budget_positions, times_differ
from mpsearch.reporting.tables import front_table, trained_table, uniform_table
from mpsearch.runs.run import Run

SPLITS: dict[str, dict[str, Any]] = {
    "search": {"color": SEARCH, "marker": "o", "mfc": SEARCH, "ms": 5},
    "confirm": {"color": CONFIRM, "marker": "D", "mfc": "white", "ms": 6},
}
MAX_LABELS = 8  # uniform allocations that all have a label
WIDE = 3.0  # times whose ratio is larger are drawn on a logarithmic axis
MAX_INTERVALS = 20  # bars of a curve; with more they cover its points
APART = 2.5  # splits whose qualities take this many times the larger of their ranges together get axes of their own
ALONG = np.linspace(0.05, 0.95, 15)  # where along a line its label may be

Draw = Callable[[Axes], tuple[list[Label], list[Any], list[Any]]]  # draws a panel: (labels, points and lines not to be covered)


@dataclass(frozen=True)
class Shown:
    """The tables that the panels draw."""

    run: Run
    front: pd.DataFrame
    uniform: pd.DataFrame
    trained: pd.DataFrame
    picked: str  # its allocation as JSON


def draw_pareto(run: Run, picked: Evaluation | None, folder: Path, every: bool = False) -> list[str]:
    """Write `pareto.png` and `.svg`, and with `every` each panel and all formats; returns the names of the figures."""
    drawn = panels(run, picked)
    each = drawn if every else {}
    with styled():
        save(_figure(drawn), folder, "pareto", FORMATS if every else ("png", "svg"))
        for name, draw in each.items():
            save(_figure({name: draw}), folder, name, FORMATS)
    return ["pareto", *each]


def pareto_figure(run: Run, picked: Evaluation | None = None) -> Figure:
    """All panels in one figure: the front on both splits, uniform allocations, budgets, the float model and the picked point."""
    with styled():
        return _figure(panels(run, picked))


def panels(run: Run, picked: Evaluation | None) -> Mapping[str, Draw]:
    """Name -> what draws the panel. A panel without information is left out.

    Two objectives have a loss and a quality panel each. Splits whose qualities are far apart have a quality panel each.
    """
    uniform = uniform_table(run)
    tables = front_table(run), uniform, trained_table(run)
    shown = Shown(run, *tables, "" if picked is None else picked.allocation.to_json())
    drawn: dict[str, Draw] = {}
    for objective in run.objectives:
        suffix = "" if len(run.objectives) == 1 else f"_{objective}"
        drawn[f"pareto_loss{suffix}"] = partial(_draw_losses, shown, objective)
        for splits in _quality_panels(shown):
            name = f"pareto_quality{suffix}" + (f"_{splits[0]}" if len(splits) == 1 and len(run.baselines) > 1 else "")
            drawn[name] = partial(_draw_qualities, shown, objective, splits)
    if times_differ(run):
        drawn["pareto_time"] = partial(_draw_times, shown)
    return drawn


def _figure(drawn: Mapping[str, Draw]) -> Figure:
    columns = len(drawn) if len(drawn) <= 3 else 2
    rows = -(-len(drawn) // columns)
    figure, grid = new_figure(PANEL[0] * columns, PANEL[1] * rows, rows, columns)
    placed = [(axes, draw(axes)) for axes, draw in zip(grid.flat, drawn.values(), strict=False)]
    for spare in grid.flat[len(drawn) :]:
        spare.set_axis_off()
    lay_out(figure)
    for axes, (labels, marks, lines) in placed:
        place_labels(axes, labels, np.concatenate([np.asarray(m, dtype=float).reshape(-1, 2) for m in marks]), lines)
    return figure


def _draw_losses(shown: Shown, objective: str, axes: Axes) -> tuple[list[Label], list[Any], list[Any]]:
    """Loss against a cost: all allocations that were tried, the front on both splits, the uniform allocations."""
    run, front, scale = shown.run, shown.front, _scale(objective, shown.front)
    tried = [(scale * e.cost(objective), max(e.loss, LOSS_FLOOR)) for e in run.on("search").values()]
    axes.plot(*np.array(tried).T, ".", color=TRIED, ms=4, zorder=1)
    joined = len(run.objectives) == 1
    labels, marks = [], []
    for split, points in front.groupby("split", sort=False):
        at = np.stack([scale * points[objective], points.loss.clip(lower=LOSS_FLOOR)], 1)
        axes.plot(*at.T, ls="-" if joined else "", **SPLITS[str(split)], zorder=3)
        labels.append(Label(f"front, {split} split", _along(at), SPLITS[str(split)]["color"]))
        marks.append(at)
    axes.set(yscale="log", xlabel=_cost_label(objective, front), ylabel=f"loss: {run.loss_label}", title="Loss")
    _fit(axes, [y for at in marks for y in at[:, 1]], logarithmic=True)
    others, uniform = _others(shown, axes, objective, "loss", 1.0, [split for split in run.baselines])
    return labels + others, [*marks, tried, uniform], marks if joined else []


def _draw_qualities(shown: Shown, objective: str, splits: Sequence[str], axes: Axes) -> tuple[list[Label], list[Any], list[Any]]:
    """Quality against a cost on `splits`: intervals on the confirm split, and the float model."""
    run, quality, scale = shown.run, shown.run.quality, _scale(objective, shown.front)
    labels, marks, ends, lines, levels = [], [], [], [], []
    for split in splits:
        points = shown.front[shown.front.split == split]
        values = quality.scale * points[quality.name].to_numpy()
        bottom, top = _limits(quality, values, [quality.scale * run.baselines[s].quality for s in splits if s in run.baselines])
        inside = (values >= bottom) & (values <= top)
        at, style = np.stack([scale * points[objective], values], 1)[inside], SPLITS[split]
        if split == "confirm":
            low, high = (quality.scale * points[f"{quality.name}_{end}"].to_numpy()[inside] for end in ("low", "high"))
            if quality.kind == "share":
                low, high = low.clip(0, 100), high.clip(0, 100)
            every = -(-len(at) // MAX_INTERVALS)
            bars = np.clip([at[:, 1] - low, high - at[:, 1]], 0, None)
            look: dict[str, Any] = {**style, "ls": "", "elinewidth": 1, "ecolor": PALE, "zorder": 4}
            axes.errorbar(at[:, 0], at[:, 1], yerr=bars, errorevery=every, **look)
            lines += [[(x, a), (x, b)] for (x, _), a, b in zip(at[::every], low[::every], high[::every], strict=True)]
            ends += [*low[::every], *high[::every]]
        else:
            axes.plot(*at.T, ls="", **style, alpha=0.8, zorder=3)
        labels.append(Label(f"front, {split} split", _along(at), style["color"]))
        marks.append(at)
        ends += [bottom, top]
        if split in run.baselines:
            level = quality.scale * run.baselines[split].quality
            levels.append(level)
            axes.axhline(level, color=style["color"], lw=1.2, ls=(0, (6, 3)), zorder=2)
            span = scale * np.quantile(shown.front[objective], ALONG)
            labels.append(Label(f"float model, {split}", [(x, level) for x in span], style["color"]))
    better = "" if quality.sign > 0 else " (lower is better)"
    axes.set(xlabel=_cost_label(objective, shown.front), ylabel=quality.label + better, title=_title(quality, splits))
    _fit(axes, ends)
    others, uniform = _others(shown, axes, objective, quality.name, quality.scale, splits)
    lines += [[(x, level) for x in axes.get_xlim()] for level in levels]
    return labels + others, [*marks, uniform], lines


def _draw_times(shown: Shown, axes: Axes) -> tuple[list[Label], list[Any], list[Any]]:
    """Quality on the confirm split against the measured time of a forward pass there."""
    quality, points = shown.run.quality, shown.front[shown.front.split == "confirm"]
    at = np.stack([points.measured_ms, quality.scale * points[quality.name]], 1)
    axes.plot(*at.T, ls="", **SPLITS["confirm"], zorder=3)
    labels, marks = [Label("front, confirm split", _along(at), CONFIRM)], [at]
    baseline = shown.run.baseline("confirm")
    if baseline is not None and baseline.measured_ms is not None:
        level = baseline.measured_ms, quality.scale * baseline.quality
        axes.plot(*level, "*", color=CONFIRM, ms=14, zorder=3)
        labels.append(Label("float model", [level], CONFIRM))
        marks.append(np.array([level]))
    uniform = shown.uniform[shown.uniform.split == "confirm"]
    times = np.concatenate(marks)[:, 0]
    if times.max() > WIDE * times.min():
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="measured milliseconds of a forward pass", ylabel=quality.label, title=f"{_capital(quality)} against time")
    _fit(axes, _limits(quality, at[:, 1], [*np.concatenate(marks)[:, 1], *(quality.scale * uniform[quality.name])]))
    others, uniform_at = _others(shown, axes, "measured_ms", quality.name, quality.scale, ["confirm"])
    return labels + others, [*marks, uniform_at], []


def _others(
    shown: Shown, axes: Axes, column: str, value: str, scale: float, splits: Sequence[str]
) -> tuple[list[Label], NDArray[np.float64]]:
    """Draw uniform allocations, trained points, budgets and a ring around the picked point.

    Returns the labels of all of them, and where the uniform allocations are, `[n, 2]`.
    """
    split = "confirm" if "confirm" in splits and (shown.uniform.split == "confirm").any() else "search"
    uniform, x_scale, labels = shown.uniform[shown.uniform.split == split], _scale(column, shown.front), []
    ends = axes.get_ylim()
    at = np.stack([x_scale * uniform[column], scale * uniform[value]], 1).astype(float)
    inside = (at[:, 1] >= min(ends)) & (at[:, 1] <= max(ends))
    at, schemes = at[inside], uniform.scheme[inside]
    axes.plot(*at.T, "s", color=UNIFORM, ms=6, zorder=2)
    told = _told(at, -shown.run.quality.sign if value == shown.run.quality.name else 1)
    labels += [Label(scheme, [point], UNIFORM) for point, scheme, is_told in zip(at, schemes, told, strict=True) if is_told]
    for _, row in shown.trained[shown.trained.split.isin(splits)].iterrows() if column in shown.trained else ():
        x, after, before = x_scale * row[column], scale * row[value], scale * row[f"{value}_before"]
        if min(ends) <= after <= max(ends):
            style = {"arrowstyle": "->", "color": TRAINED, "lw": 1.5}
            if min(ends) <= before <= max(ends):
                axes.annotate("", (x, after), (x, before), arrowprops=style)
            axes.plot(x, after, "*", color=TRAINED, ms=12, zorder=6)
            labels.append(Label(f"trained, {row['split']} split", [(x, after)], TRAINED))
    chosen = shown.front[(shown.front.allocation == shown.picked) & shown.front.split.isin(splits)]
    for x, y in zip(x_scale * chosen[column], scale * chosen[value], strict=True):
        if min(ends) <= y <= max(ends):
            axes.plot(x, y, "o", mfc="none", mec=PICK, mew=2, ms=15, zorder=5)
    if len(chosen):
        labels.append(Label("picked", np.stack([x_scale * chosen[column], scale * chosen[value]], 1), PICK))
    for name, position in budget_positions(shown.run, column).items() if column != "measured_ms" else ():
        axes.axvline(x_scale * position, color="black", lw=1.2, ls=":", zorder=2)
        levels = np.geomspace(*ends, 12)[1:-1] if axes.get_yscale() == "log" else np.linspace(*ends, 12)[1:-1]
        labels.append(Label(name, [(x_scale * position, y) for y in levels], "black"))
    return labels, at


def _told(at: NDArray[np.float64], sign: int) -> NDArray[np.bool_]:
    """bool `[n]`: which uniform points `at` `[n, 2]` have a label; of many those that no other one dominates, and the ends.

    `sign` is 1 where a lower second coordinate is better, -1 where a higher one is.
    """
    if len(at) <= MAX_LABELS:
        return np.ones(len(at), dtype=bool)
    told = non_dominated(at * [1, sign])
    told[[at[:, 0].argmin(), at[:, 0].argmax()]] = True
    return told


def _quality_panels(shown: Shown) -> list[list[str]]:
    """The splits of each quality panel."""
    splits = [str(split) for split in shown.front.split.unique()]
    quality = shown.run.quality
    ranges = [_limits(quality, quality.scale * shown.front[shown.front.split == s][quality.name].to_numpy(), []) for s in splits]
    if len(splits) == 2:
        together = max(high for _, high in ranges) - min(low for low, _ in ranges)
        if together > APART * max(high - low for low, high in ranges):
            return [["confirm"], ["search"]]
    return [splits]


def _limits(quality: Quality, values: Any, also: Sequence[float]) -> tuple[float, float]:
    """The ends of a quality axis, cut so that a point at chance level does not flatten all others."""
    measured = quality.sign * np.asarray(values, dtype=float)
    measured = measured[np.isfinite(measured)]
    best = max([measured.max(initial=-np.inf), *(quality.sign * x for x in also)])
    point = 0.01 * abs(best)  # of accuracy, or a hundredth of a perplexity
    middle = float(np.median(measured)) if len(measured) else best
    worst = max(measured.min(initial=np.inf), middle - 4 * max(best - middle, point) - 4 * point)
    low, high = sorted((quality.sign * min(worst, best), quality.sign * best))
    return float(low), float(high)


def _fit(axes: Axes, values: Sequence[float], logarithmic: bool = False) -> None:
    """The vertical axis from the least to the largest of `values`, with a margin."""
    known = np.asarray([v for v in values if np.isfinite(v) and (v > 0 or not logarithmic)], dtype=float)
    if not len(known):
        return
    low, high = known.min(), known.max()
    if logarithmic:
        margin = max((high / low) ** 0.06, 1.15)
        axes.set_ylim(low / margin, high * margin)
    else:
        margin = 0.07 * (high - low) or 0.01 * abs(high) or 1.0
        axes.set_ylim(low - margin, high + margin)


def _along(at: Any) -> Any:
    """Points of a curve next to which its label may be."""
    return at[np.unique((ALONG * (len(at) - 1)).round().astype(int))] if len(at) else np.empty((0, 2))


def _scale(column: str, front: pd.DataFrame) -> float:
    return (1e-3 if front[column].max() < 4e6 else 1e-6) if column == "size_bytes" else 1.0


def _cost_label(column: str, front: pd.DataFrame) -> str:
    if column == "size_bytes":
        return f"size of all tensors ({'kB' if _scale(column, front) == 1e-3 else 'MB'})"
    return {"latency_ms": "predicted milliseconds of a forward pass"}.get(column, column.replace("_", " "))


def _title(quality: Quality, splits: Sequence[str]) -> str:
    where = f", {splits[0]} split" if len(splits) == 1 else ""
    return f"{_capital(quality)}{where}" + (" (bars: 95 % intervals)" if "confirm" in splits else "")


def _capital(quality: Quality) -> str:
    return quality.name[:1].upper() + quality.name[1:]
