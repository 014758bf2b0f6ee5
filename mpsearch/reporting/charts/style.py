"""What the figures share: colours, axes, heat maps, labels that do not overlap, and files.

Figures are made without pyplot, so that neither the backend of a notebook nor a `matplotlibrc` in the working directory matters.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from mpsearch.files import write_atomically

SEARCH, CONFIRM, UNIFORM, FLOAT, PICK = "#1f6feb", "#d1561a", "#57606a", "#1a7f37", "#bf3989"
LABEL_POINTS = 9.0  # font size
# Where a label may stand, in points from what it names, best first: right, left, above and below.
OFFSETS = [(x, y) for y in (5, -13, 15, -23, 25, -33) for x in (5, -5)]

Box = tuple[float, float, float, float]  # left, bottom, right, top, in points


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, NDArray[np.object_]]:
    """A figure of that many inches (at most 40), and its axes `[rows, columns]`."""
    figure = Figure(figsize=(min(width, 40), min(height, 40)), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def lay_out(figure: Figure) -> None:
    """Place the axes, once and for all: what is drawn later neither moves them nor pays for a layout of its own."""
    if isinstance(figure.get_layout_engine(), ConstrainedLayoutEngine):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")


def heat_map(axes: Axes, values: pd.DataFrame, label: str, **image: Any) -> None:
    """An image with the name of each row and column, and a colour bar with a `label`; NaN stays blank."""
    shown = axes.imshow(values.to_numpy(dtype=float), **image)
    axes.figure.colorbar(shown, ax=axes, label=label, pad=0.01)
    name_columns(axes, values.columns)
    axes.set_yticks(range(len(values)), values.index, fontsize=8)


def name_columns(axes: Axes, names: Iterable[str]) -> None:
    """The names along the horizontal axis, upright."""
    axes.set_xticks(range(len(names := list(names))), names, rotation=90, fontsize=8)


def place_labels(axes: Axes, points: NDArray[np.float64], names: Iterable[str], marks: NDArray[np.float64]) -> None:
    """Write a name next to each of `points` `[n, 2]`, where it covers least of other labels and of `marks` `[m, 2]`.

    Both are in data coordinates. The figure must have its final layout.
    """
    to_points = 72 / axes.figure.dpi
    left, bottom, right, top = axes.get_window_extent().extents
    frame = [(to_points * left, to_points * bottom, to_points * right, to_points * top)]
    markers = [(x - 4, y - 4, x + 4, y + 4) for x, y in to_points * axes.transData.transform(marks[np.isfinite(marks).all(1)])]
    taken: list[Box] = []
    for point, (x, y), name in zip(points, to_points * axes.transData.transform(points), names, strict=True):
        boxes = [_text_box(x, y, offset, name) for offset in OFFSETS]
        costs = [10 * (_overlap(box, taken) + _area(box) - _overlap(box, frame)) + _overlap(box, markers) for box in boxes]
        best = int(np.argmin(costs))
        taken.append(boxes[best])
        side = "left" if OFFSETS[best][0] > 0 else "right"
        style: dict[str, Any] = {
            "textcoords": "offset points",
            "ha": side,
            "color": UNIFORM,
            "fontsize": LABEL_POINTS,
            "zorder": 7,
            "path_effects": [withStroke(linewidth=2.5, foreground="white")],  # readable on lines and markers
        }
        axes.annotate(name, tuple(point), OFFSETS[best], **style)


def png(figure: Figure) -> bytes:
    """The figure as a PNG image."""
    return _image(figure, "png")


def save(figure: Figure, folder: Path, name: str, formats: Sequence[str] = ("png",)) -> None:
    """Write `<name>.<format>` into the folder for each format."""
    for suffix in formats:
        write_atomically(folder / f"{name}.{suffix}", _image(figure, suffix))


def _image(figure: Figure, suffix: str) -> bytes:
    lay_out(figure)
    image, box = io.BytesIO(), figure.get_tightbbox().padded(0.1)
    figure.savefig(image, format=suffix, dpi=130, bbox_inches=box)
    return image.getvalue()


def _text_box(x: float, y: float, offset: tuple[int, int], text: str) -> Box:
    """About the space that a label takes; a character is 0.62 times as wide as its font is high."""
    width = 0.62 * LABEL_POINTS * len(text)
    left = x + offset[0] - (width if offset[0] < 0 else 0)
    return left, y + offset[1], left + width, y + offset[1] + LABEL_POINTS


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _overlap(box: Box, others: Sequence[Box]) -> float:
    """The area that the box shares with others."""
    left, bottom, right, top = np.array(others).reshape(-1, 4).T
    widths = np.minimum(box[2], right) - np.maximum(box[0], left)
    heights = np.minimum(box[3], top) - np.maximum(box[1], bottom)
    return float((widths.clip(0) * heights.clip(0)).sum())
