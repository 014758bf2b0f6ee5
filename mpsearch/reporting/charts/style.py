"""What the figures share: the style sheet, colours, heat maps, direct labels that do not overlap, and files.

Figures are made without pyplot, from the defaults of matplotlib with `mpsearch.mplstyle` on top: neither the backend of a
notebook nor a `matplotlibrc` in the working directory matters.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import ArrayLike, NDArray

from mpsearch.files import write_atomically

# Okabe and Ito's palette, told apart with any colour vision, darkened where it is the colour of text; shapes differ as well.
SEARCH, CONFIRM, UNIFORM, FLOAT, PICK, TRIED = "#0068a8", "#b84e00", "#57606a", "#007a5a", "#a3216f", "#a9cbe6"
TRAINED, PALE = "#6b4fa0", "#e3b48c"  # pale: the intervals of confirmed points
PANEL = 6.6, 4.6  # inches
BITS = (2, 3, 4, 5, 6, 8, 16, 32)  # ticks of a colour bar
FORMATS = ("png", "svg", "pdf")
STEP = 12.0  # pixels
UNDATED: dict[str, dict[str, Any]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}
# Where a label may stand, in points from what it names, best first.
OFFSETS = [
    (x * d, y * d) for d in (7, 16, 28, 42) for x, y in ((1, 1), (-1, 1), (1, -1), (-1, -1), (0, 1), (0, -1), (1, 0), (-1, 0))
]

Box = tuple[float, float, float, float]  # left, bottom, right, top, in pixels


@contextmanager
def styled() -> Iterator[None]:
    """Figures are made and saved in the style of `mpsearch.mplstyle` inside the block."""
    sheet = resources.files("mpsearch.reporting.charts").joinpath("mpsearch.mplstyle")
    with resources.as_file(sheet) as path, matplotlib.style.context(path, after_reset=True):
        yield


@dataclass(frozen=True)
class Label:
    """A text to be written next to one of `anchors` `[n, 2]` (data coordinates), where it is most legible."""

    text: str
    anchors: ArrayLike
    color: str


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    """A figure of that many inches (at most 40), and its axes `[rows, columns]`."""
    figure = Figure(figsize=(min(width, 40), min(height, 40)), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def lay_out(figure: Figure) -> None:
    """Place the axes, once and for all: what is drawn later neither moves them nor pays for a layout of its own."""
    if isinstance(figure.get_layout_engine(), ConstrainedLayoutEngine):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")


def heat_map(axes: Axes, values: pd.DataFrame, label: str, ticks: Sequence[float] | None = None, **image: Any) -> None:
    """An image with the name of each row and column, and a colour bar with a `label`; NaN stays blank."""
    shown = axes.imshow(values.to_numpy(dtype=float), **image)
    color_bar(axes, shown, label, ticks)
    axes.grid(False)
    axes.set_xticks(range(values.shape[1]), list(values.columns), rotation=90, fontsize=11)
    axes.set_yticks(range(len(values)), list(values.index), fontsize=11)


def color_bar(
    axes: Axes,
    shown: ScalarMappable,
    label: str,
    ticks: Sequence[float] | None = None,
    shrink: float = 1.0,
    location: str = "right",
) -> None:
    """A colour bar next to the axes, "right" or "bottom"; `ticks` are written as plain numbers."""
    bar = axes.figure.colorbar(shown, ax=axes, label=label, pad=0.01, shrink=shrink, location=location)
    bar.outline.set_visible(False)
    if ticks is not None:
        bar.set_ticks(list(ticks), labels=[f"{tick:g}" for tick in ticks])
        bar.minorticks_off()


def place_labels(axes: Axes, labels: Sequence[Label], marks: ArrayLike = (), lines: Sequence[ArrayLike] = ()) -> None:
    """Write the labels so that none meets another one or leaves the axes, and that they cover little of the data.

    That is of `marks` `[m, 2]`, points, and of `lines` `[k, 2]`, their corners; all in data coordinates.

    A label for which there is no such place is left out. The figure must have its final layout.
    """
    renderer = axes.figure.canvas.get_renderer()  # type: ignore[attr-defined]
    frame = _box(axes.get_window_extent(renderer))
    taken = [_box(text.get_window_extent(renderer)) for text in axes.texts]
    covered = np.asarray(marks, dtype=float).reshape(-1, 2)
    corners = [axes.transData.transform(np.asarray(line, dtype=float).reshape(-1, 2)) for line in lines]
    at = np.concatenate([axes.transData.transform(covered[np.isfinite(covered).all(1)]), *map(_dense, corners)])
    # Readable on lines and markers, and still text in vector files.
    back = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6}
    for label in labels:
        text = axes.text(0, 0, label.text, color=label.color, bbox=back, zorder=7, fontsize=12, va="bottom", transform=None)
        extent = text.get_window_extent(renderer)
        anchors = axes.transData.transform(np.asarray(label.anchors, dtype=float).reshape(-1, 2))
        place = _best_place(anchors, extent.width, extent.height, frame, taken, at, axes.figure.dpi / 72)
        if place is None:
            text.remove()
            continue
        x, y = axes.transAxes.inverted().transform(place)
        text.set_position((float(x), float(y)))
        text.set_transform(axes.transAxes)
        taken.append((place[0], place[1], place[0] + extent.width, place[1] + extent.height))


def _best_place(
    anchors: NDArray[np.float64],
    width: float,
    height: float,
    frame: Box,
    taken: Sequence[Box],
    marks: NDArray[np.float64],
    scale: float,
) -> tuple[float, float] | None:
    """The lower left corner that is inside `frame`, meets no box and covers the fewest marks; the nearest of equals."""
    best, least = None, np.inf
    for x, y in anchors[np.isfinite(anchors).all(1)]:
        for dx, dy in OFFSETS:
            left = x + scale * dx - (0 if dx > 0 else width if dx < 0 else width / 2)
            bottom = y + scale * dy - (0 if dy > 0 else height if dy < 0 else height / 2)
            box = left, bottom, left + width, bottom + height
            inside = box[0] >= frame[0] + 2 and box[1] >= frame[1] + 2 and box[2] <= frame[2] - 2 and box[3] <= frame[3] - 2
            if not inside or any(_meet(box, other) for other in taken):
                continue
            near = (np.abs(marks - [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]) < [width / 2 + 6, height / 2 + 6]).all(1).sum()
            cost = float(near) + np.hypot(dx, dy) / 60
            if cost < least:
                best, least = (left, bottom), cost
    return best


def _dense(corners: NDArray[np.float64]) -> NDArray[np.float64]:
    """Points along a line, about `STEP` pixels apart."""
    parts = [np.linspace(a, b, max(int(np.hypot(*(b - a)) / STEP), 2)) for a, b in itertools.pairwise(corners)]
    return np.concatenate(parts) if parts else corners


def save(figure: Figure, folder: Path, name: str, formats: Sequence[str] = ("png",)) -> None:
    """Write `<name>.<format>` into the folder for each format."""
    for suffix in formats:
        write_atomically(folder / f"{name}.{suffix}", _image(figure, suffix))


def png(figure: Figure) -> bytes:
    """The figure as a PNG image."""
    return _image(figure, "png")


def _image(figure: Figure, suffix: str) -> bytes:
    lay_out(figure)
    image, box = io.BytesIO(), figure.get_tightbbox().padded(0.1)
    figure.savefig(image, format=suffix, dpi=130, bbox_inches=box, metadata=UNDATED[suffix])
    return image.getvalue()


def _box(extent: Any) -> Box:
    left, bottom, right, top = extent.extents
    return left, bottom, right, top


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] + 3 and b[0] < a[2] + 3 and a[1] < b[3] + 1 and b[1] < a[3] + 1
