"""The figures. Each is drawn from a table that lies beside it, so that a reader can redraw it."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from mpsearch.divergence import LOSS_FLOOR
from mpsearch.files import write_atomically
from mpsearch.quality import Quality

SEARCH, CONFIRM, UNIFORM, FLOAT, PICK = "#1f6feb", "#d1561a", "#6e7781", "#1a7f37", "#bf3989"


def pareto(
    front: pd.DataFrame,
    uniform: pd.DataFrame,
    evaluations: pd.DataFrame,
    folder: Path,
    *,
    quality: Quality,
    float_quality: Mapping[str, float],
    limits: Sequence[Mapping[str, float]],
    trained: pd.DataFrame,
    objectives: Sequence[str] = ("size_bytes",),
    picked: str | None = None,
    loss_label: str = "softmax KL (nats)",
    timed: bool = False,
) -> None:
    """`pareto.png` and `.svg`: loss and quality against cost, both splits, uniform allocations, budgets, float, the pick.

    `front` and `uniform` have the columns of `front.csv`, `uniform` also `scheme`; `evaluations` those of `evaluations.csv`;
    `trained` is `report.trained_table`'s; `objectives` are the columns of one or two costs, a row of panels for each, and
    `limits` the positions of the budgets on their axes; `picked` is the allocation (JSON) to mark;
    `loss_label` names the loss and its unit. `timed`: a third panel shows quality against the time of a forward pass.
    """
    rows = len(objectives)
    figure, panels = plt.subplots(rows, 2 + timed, figsize=(19 if timed else 13, 5.4 * rows), layout="constrained", squeeze=False)
    for row, objective, at in zip(panels, objectives, limits, strict=True):
        other = next((column for column in objectives if column != objective), None)
        _against_cost(row[0], row[1], front, uniform, evaluations, trained, quality, objective, other, at, picked)
        for split, value in float_quality.items():
            color = CONFIRM if split == "confirm" else SEARCH
            label = f"float model, {split} split: {quality.text(value)}"
            row[1].axhline(quality.scale * value, color=color, lw=1, ls="-.", alpha=0.8, label=label)
        _zoom(row[1], front, quality, float_quality)
        row[0].set_ylabel(f"loss: {loss_label}")
        row[0].legend(fontsize=9)
        row[1].legend(fontsize=9, loc="lower right" if quality.sign > 0 else "upper right")
    if timed:
        _against_time(panels[0, 2], front, uniform, evaluations, quality, picked)
        panels[0, 2].set_ylim(panels[0, 1].get_ylim())
        for spare in panels[1:, 2]:
            spare.set_axis_off()
    _save(figure, folder, "pareto", svg=True)


def _against_cost(
    left: Axes,
    right: Axes,
    front: pd.DataFrame,
    uniform: pd.DataFrame,
    evaluations: pd.DataFrame,
    trained: pd.DataFrame,
    quality: Quality,
    objective: str,
    other: str | None,
    limits: Mapping[str, float],
    picked: str | None,
) -> None:
    """Loss (left) and quality (right) against one cost. Where there is an `other`, the front is no line: its colour tells it."""
    scale, label = _axis(objective, front[objective].max())
    tried = evaluations[(evaluations.split == "search") & ~evaluations.origin.isin(["float", "finetuned"])]
    label_of_tried = f"{len(tried)} allocations tried, search split"
    left.scatter(tried[objective] / scale, _floor(tried.loss), s=9, c=SEARCH, alpha=0.2, lw=0, label=label_of_tried)
    for split, color, marker, fill in (("search", SEARCH, "o", True), ("confirm", CONFIRM, "D", False)):
        points = front[front.split == split]
        if points.empty:
            continue
        face = color if fill else "white"
        style: dict[str, Any] = {"color": color, "marker": marker, "ms": 4.5, "mfc": face, "lw": 0.0 if other else 1.3}
        if other is None or split != "search":
            left.plot(points[objective] / scale, _floor(points.loss), label=f"front, {split} split", **style)
        value = points[quality.name]
        low, high = value - points[f"{quality.name}_low"], points[f"{quality.name}_high"] - value
        right.errorbar(
            points[objective] / scale,
            quality.scale * value,
            yerr=quality.scale * np.clip([low, high], 0, None),
            elinewidth=0.8,
            capsize=2,
            alpha=1.0 if split == "confirm" else 0.45,
            label=f"front, {split} split",
            **style,
        )
    if other is not None:
        points = front[front.split == "search"]
        by, unit = _axis(other, front[other].max())
        shades = left.scatter(
            points[objective] / scale,
            _floor(points.loss),
            c=points[other] / by,
            s=34,
            cmap="viridis",
            zorder=4,
            label="front, search split",
        )
        left.figure.colorbar(shades, ax=left, label=unit, pad=0.01)
    shown = "confirm" if (uniform.split == "confirm").any() else "search"
    points = uniform[uniform.split == shown]
    for axes, y in ((left, _floor(points.loss)), (right, quality.scale * points[quality.name])):
        axes.plot(
            points[objective] / scale, y, "s" if other else "s--", color=UNIFORM, ms=6, lw=0.8, label=f"uniform, {shown} split"
        )
        for x, value, name in zip(points[objective] / scale, y, points.scheme, strict=True):
            axes.annotate(name, (x, value), xytext=(5, 5), textcoords="offset points", color=UNIFORM, fontsize=9)
        for name, limit in limits.items():
            axes.axvline(limit / scale, color="black", lw=1, ls=":")
            axes.annotate(name, (limit / scale, 0.02), xycoords=("data", "axes fraction"), rotation=90, ha="right", fontsize=9)
        axes.set_xlabel(label)
        axes.grid(alpha=0.25)
    _mark_trained(left, right, trained, quality, objective, scale)
    _mark_pick(left, right, front, picked, quality, objective, scale)
    left.set(yscale="log", title="Loss against cost (lower left is better)")
    better = "" if quality.sign > 0 else " (lower is better)"
    right.set(ylabel=f"{quality.label}, 95 % interval paired with float", title=f"{_title(quality)} against cost{better}")


def layers(bits: pd.DataFrame, schemes: pd.DataFrame, folder: Path, picked: int | None = None) -> None:
    """`layers.png`: a row a point (index: its label), a column a group; colour: bits a weight, all overhead; text: scheme."""
    rows, columns = bits.shape
    figure, axes = plt.subplots(figsize=(min(3.5 + 0.42 * columns, 40), 1.8 + 0.3 * rows), layout="constrained")
    image = axes.imshow(bits.to_numpy(), aspect="auto", cmap="viridis", vmin=1, vmax=max(8.0, float(bits.to_numpy().max())))
    axes.set_xticks(range(columns), bits.columns, rotation=90, fontsize=8)
    axes.set_yticks(range(rows), bits.index, fontsize=8)
    if columns * rows <= 1500:
        for i, j in np.ndindex(rows, columns):
            color = "white" if bits.iat[i, j] < 6 else "black"
            axes.text(j, i, schemes.iat[i, j], ha="center", va="center", fontsize=7, color=color)
    if picked is not None:
        axes.get_yticklabels()[picked].set(color=PICK, fontweight="bold")
        axes.add_patch(plt.Rectangle((-0.5, picked - 0.5), columns, 1, fill=False, ec=PICK, lw=2))
    figure.colorbar(image, ax=axes, label="bits a weight, scales included", pad=0.01)
    axes.set(title="Bits of each layer along the front", xlabel="layer or group, in forward order", ylabel="average bits")
    _save(figure, folder, "layers")


def sensitivity(values: pd.DataFrame, unit: str, metric: str, folder: Path) -> None:
    """`sensitivity.png`: a row a scheme, a column a group, the sensitivity as colour (log); blank where it is not positive."""
    rows, columns = values.shape
    data = values.to_numpy(dtype=float)
    data = np.where(np.isfinite(data) & (data > 0), data, np.nan)
    figure, axes = plt.subplots(figsize=(min(3.5 + 0.42 * columns, 40), 2.6 + 0.35 * rows), layout="constrained")
    if np.isnan(data).all():
        axes.text(0.5, 0.5, "no positive sensitivity", transform=axes.transAxes, ha="center")
    else:
        low, high = np.nanmin(data), np.nanmax(data)
        image = axes.imshow(data, aspect="auto", cmap="magma_r", norm=LogNorm(low, high if high > low else low * 10))
        figure.colorbar(image, ax=axes, label=f"{metric} ({unit})", pad=0.01)
    axes.set_xticks(range(columns), values.columns, rotation=90, fontsize=8)
    axes.set_yticks(range(rows), values.index, fontsize=9)
    axes.set(title="Layer sensitivity: one layer alone in a scheme", xlabel="layer or group, in forward order")
    _save(figure, folder, "sensitivity")


def interactions(values: pd.DataFrame, folder: Path) -> None:
    """`interactions.png`: a row and a column a group, from -1 (what the two do to the predictions cancels) to 1 (it adds up)."""
    n = len(values)
    side = min(4 + 0.22 * n, 30)
    figure, axes = plt.subplots(figsize=(side + 1, side), layout="constrained")
    shown = np.where(np.eye(n, dtype=bool), np.nan, values.to_numpy(dtype=float))
    largest = float(np.nanmax(np.abs(shown), initial=0.01))
    image = axes.imshow(shown, cmap="RdBu_r", vmin=-largest, vmax=largest)
    figure.colorbar(image, ax=axes, label="correlation of their effects", pad=0.01)
    axes.set_xticks(range(n), values.columns, rotation=90, fontsize=7)
    axes.set_yticks(range(n), values.index, fontsize=7)
    axes.set(title="Layers that reinforce (red) or cancel (blue) one another at the picked point")
    _save(figure, folder, "interactions")


def latency(values: pd.DataFrame, about: str, folder: Path) -> None:
    """`latency.png`: a row a layer, a column a scheme, milliseconds; a line for each scheme, "float" dashed."""
    figure, axes = plt.subplots(figsize=(min(4 + 0.34 * len(values), 40), 5), layout="constrained")
    for name, column in values.items():
        style = {"color": UNIFORM, "ls": "--"} if name == "float" else {"marker": "o", "ms": 3.5}
        axes.plot(range(len(values)), 1e3 * column, label=str(name), lw=1.2, **style)
    axes.set_xticks(range(len(values)), values.index, rotation=90, fontsize=8)
    axes.set(yscale="log", ylabel="microseconds", title=f"What each layer takes in each scheme ({about})")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=9, ncols=2)
    _save(figure, folder, "latency")


def _mark_pick(
    left: Axes, right: Axes, front: pd.DataFrame, picked: str | None, quality: Quality, objective: str, scale: float
) -> None:
    chosen = front[front.allocation == picked]
    for axes, column, factor in ((left, "loss", 1.0), (right, quality.name, quality.scale)):
        y = chosen[column] * factor
        if not chosen.empty:
            y = _floor(y) if column == "loss" else y
            x = chosen[objective] / scale
            _ring(axes, x, y)


def _mark_trained(left: Axes, right: Axes, trained: pd.DataFrame, quality: Quality, objective: str, scale: float) -> None:
    """A star for each point that was trained, with an arrow from what it was before."""
    for split, color in (("search", SEARCH), ("confirm", CONFIRM)):
        points = trained[trained.split == split]
        if points.empty:
            continue
        style: dict[str, Any] = {"color": color, "ms": 13, "mec": "black", "mew": 0.6, "zorder": 6}
        x, losses = points[objective] / scale, (_floor(points.loss_before), _floor(points.loss))
        for axes, (start, end) in (
            (left, losses),
            (right, (quality.scale * points[f"{quality.name}_before"], quality.scale * points[quality.name])),
        ):
            axes.plot(x, end, "*", label=f"trained, {split} split", **style)
            for at, low, high in zip(x, start, end, strict=True):
                axes.annotate("", (at, high), (at, low), arrowprops={"arrowstyle": "->", "color": color, "lw": 1.5})


def _zoom(axes: Axes, front: pd.DataFrame, quality: Quality, float_quality: Mapping[str, float]) -> None:
    """Cut the quality axis at what is of use: a point at chance level must not flatten all the others."""
    factor = quality.sign * quality.scale  # below, more is better
    measured = factor * front[quality.name]
    best = max([measured.max(), *(factor * value for value in float_quality.values())])
    point = 0.01 * abs(best)  # of accuracy, or a hundredth of a perplexity
    worst, middle = measured.min(), measured.median()
    bottom = max(worst, middle - 4 * max(best - middle, point) - 8 * point)
    ends = bottom - 0.04 * (best - bottom) - 0.1 * point, best + 0.06 * (best - bottom) + 0.1 * point
    axes.set_ylim(*sorted(quality.sign * end for end in ends))


def _ring(axes: Axes, x: pd.Series, y: pd.Series) -> None:
    axes.scatter(x, y, label="picked", s=260, facecolors="none", edgecolors=PICK, linewidths=2, zorder=5)


def _axis(objective: str, largest: float) -> tuple[float, str]:
    """Divide by; label."""
    if objective != "size_bytes":
        return 1.0, {"latency_ms": "predicted milliseconds of a forward pass"}.get(objective, objective.replace("_", " "))
    scale, unit = (1e3, "kB") if largest < 1e6 else (1e6, "MB")
    return scale, f"size of all parameters and buffers as stored ({unit})"


def _against_time(
    axes: Axes, front: pd.DataFrame, uniform: pd.DataFrame, evaluations: pd.DataFrame, quality: Quality, picked: str | None
) -> None:
    """Quality on the confirm split against the measured time of a forward pass there."""
    points, uniform = front[front.split == "confirm"], uniform[uniform.split == "confirm"]
    baseline = evaluations[(evaluations.split == "confirm") & (evaluations.origin == "float")]
    axes.plot(
        points.measured_ms, quality.scale * points[quality.name], "D", color=CONFIRM, mfc="white", ms=5, label="front, packed"
    )
    axes.plot(uniform.measured_ms, quality.scale * uniform[quality.name], "s", color=UNIFORM, ms=6, label="uniform, packed")
    for x, value, name in zip(uniform.measured_ms, quality.scale * uniform[quality.name], uniform.scheme, strict=True):
        axes.annotate(name, (x, value), xytext=(5, 5), textcoords="offset points", color=UNIFORM, fontsize=9)
    axes.plot(baseline.measured_ms, quality.scale * baseline[quality.name], "*", color=FLOAT, ms=13, label="float model")
    chosen = points[points.allocation == picked]
    if not chosen.empty:
        _ring(axes, chosen.measured_ms, quality.scale * chosen[quality.name])
    axes.set(xlabel="measured milliseconds of a forward pass", ylabel=quality.label)
    axes.set_title(f"{_title(quality)} against time, confirm split")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=9)


def _title(quality: Quality) -> str:
    """Its name with a capital letter, the others as they are."""
    return quality.name[:1].upper() + quality.name[1:]


def _floor(loss: pd.Series) -> pd.Series:
    return loss.clip(lower=LOSS_FLOOR)


def _save(figure: Figure, folder: Path, name: str, svg: bool = False) -> None:
    for suffix in ("png", "svg") if svg else ("png",):
        image = io.BytesIO()
        figure.savefig(image, format=suffix, dpi=130, bbox_inches="tight", pad_inches=0.1)
        write_atomically(folder / f"{name}.{suffix}", image.getvalue())
    plt.close(figure)
