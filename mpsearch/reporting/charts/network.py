"""A map of the network: a cell for each layer, by blocks and projections or by stages, in strips of one width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PatchCollection
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from mpsearch.reporting.charts.style import color_bar, new_figure
from mpsearch.reporting.layer_map import Section

WIDTH = 13.2  # inches, of two panels
CELL = 0.36  # inches
CHARACTER = 0.105  # inches, about the width of one at 11 points
LOW = 2.2  # inches; the colour bar of a lower map is below it
MAX_NAME = 26  # characters of a name
MAX_TEXTS = 2500  # cells with a text of their own; of more, the colour alone is shown


@dataclass(frozen=True, eq=False)
class _Look:
    """How cells are drawn: their width in inches, the value `[n_layers]` and text of each layer, and the colours of values."""

    cell: float
    values: NDArray[np.float64]
    texts: Sequence[str]
    cmap: Colormap
    norm: Normalize


def map_figure(
    sections: Sequence[Section],
    values: NDArray[np.float64],
    texts: Sequence[str],
    *,
    title: str,
    label: str,
    cmap: Colormap,
    norm: Normalize,
    ticks: Sequence[float] | None = None,
) -> Figure:
    """Draw `values` `[n_layers]` as colours (NaN: none) with `texts` in the cells.

    Sections stand side by side as far as the width allows. `label` names the colours, `ticks` are those of their bar.
    """
    cell = max(CELL, CHARACTER * max((len(text) for text in texts), default=1) + 0.1)
    look = _Look(cell, values, texts, cmap, norm)
    placed, height = _placed(sections, cell)
    width = max(left + _size(section, cell)[0] for section, left, _ in placed)
    width = max(width, CHARACTER * 1.4 * len(title))
    top = 0.0 if len(sections) > 1 or sections[0].title else CELL  # a section without a name has a title only among others
    is_low = height - top < LOW
    figure, ((axes,),) = new_figure(width + (0.3 if is_low else 1.2), height - top + (1.6 if is_low else 0.9))
    axes.set(xlim=(0, width), ylim=(height, top), aspect="equal", title=title)
    axes.set_axis_off()
    for section, left, at in placed:
        if section.rows == ("",):
            _draw_row(axes, section, left, at, look, has_title=top == 0)
        else:
            _draw_grid(axes, section, left, at, look)
    length = min(1.0, 4 / max(width if is_low else height, 4))
    color_bar(axes, ScalarMappable(norm, cmap), label, ticks, shrink=length, location="bottom" if is_low else "right")
    return figure


def _placed(sections: Sequence[Section], cell: float) -> tuple[list[tuple[Section, float, float]], float]:
    """(section, left, top) of each in inches, filled line by line, and the height of all."""
    placed, left, top, line = [], 0.0, 0.0, 0.0
    for section in sections:
        width, height = _size(section, cell)
        if left > 0 and left + width > WIDTH:
            left, top, line = 0.0, top + line + 0.3, 0.0
        placed.append((section, left, top))
        left, line = left + width + 0.4, max(line, height)
    return placed, top + line


def _size(section: Section, cell: float) -> tuple[float, float]:
    if section.rows == ("",):
        box, each = _boxes(section, cell)
        return min(each, len(section.cells)) * box, CELL * (1 + -(-len(section.cells) // each))
    per_strip = _per_strip(section, cell)
    strips = -(-len(section.columns) // per_strip)
    return _names(section) + cell * min(per_strip, len(section.columns)), CELL * (1 + strips * (len(section.rows) + 1.4))


def _boxes(section: Section, cell: float) -> tuple[float, int]:
    """(width of a cell with its name, how many stand side by side) of a section in one row."""
    box = cell + CHARACTER * min(max(map(len, section.columns)), MAX_NAME) + 0.3
    return box, max(1, int(WIDTH / box))


def _names(section: Section) -> float:
    return CHARACTER * min(max(map(len, section.rows)), MAX_NAME) + 0.25


def _per_strip(section: Section, cell: float) -> int:
    return max(1, int((WIDTH - _names(section)) / cell))


def _draw_grid(axes: Axes, section: Section, left: float, top: float, look: _Look) -> None:
    """Blocks from left to right, in strips below one another."""
    cell = look.cell
    names, per_strip = _names(section), _per_strip(section, cell)
    axes.text(left, top + 0.5 * CELL, section.title, fontsize=12, fontweight="bold", va="center")
    every = -(-max(CHARACTER * max(map(len, section.columns)) + 0.08, cell) // cell)

    def corner(row: int, column: int) -> tuple[float, float]:
        strip, at = divmod(column, per_strip)
        return left + names + at * cell, top + CELL * (1 + strip * (len(section.rows) + 1.4) + row + 1)

    for column, name in enumerate(section.columns):
        x, y = corner(-1, column)
        if column % per_strip % every == 0:
            axes.text(x + cell / 2, y + CELL / 2, name, fontsize=11, ha="center", va="center", color="#57606a")
        if column % per_strip == 0:
            for row, row_name in enumerate(section.rows):
                text = shortened(row_name or "weight")
                axes.text(x - 0.1, corner(row, column)[1] + CELL / 2, text, fontsize=11, ha="right", va="center")
    shared: dict[tuple[int, int], list[int]] = {}
    for layer, place in section.cells.items():
        shared.setdefault(place, []).append(layer)
    cells = [(corner(*place), layers) for place, layers in shared.items()]
    _draw_cells(axes, cells, look)


def _draw_row(axes: Axes, section: Section, left: float, top: float, look: _Look, has_title: bool) -> None:
    """Each cell with its name to the right, column by column."""
    box, each = _boxes(section, look.cell)
    lines = -(-len(section.cells) // each)
    if has_title:
        axes.text(left, top + 0.5 * CELL, section.title or "other layers", fontsize=12, fontweight="bold", va="center")
    cells = []
    for layer, (_, position) in section.cells.items():
        x, y = left + position // lines * box, top + CELL * (1 + position % lines)
        axes.text(x + look.cell + 0.08, y + CELL / 2, shortened(section.columns[position]), fontsize=11, va="center")
        cells.append(((x, y), [layer]))
    _draw_cells(axes, cells, look)


def _draw_cells(axes: Axes, cells: Sequence[tuple[tuple[float, float], list[int]]], look: _Look) -> None:
    """Rectangles, several layers in one as their mean, with their text where they agree."""
    boxes = [Rectangle((x + 0.02, y + 0.02), look.cell - 0.04, CELL - 0.04) for (x, y), _ in cells]
    shown = np.ma.masked_invalid([np.mean(look.values[layers]) for _, layers in cells])
    axes.add_collection(PatchCollection(boxes, cmap=look.cmap, norm=look.norm, array=shown, linewidth=0))
    for ((x, y), layers), value in zip(cells, shown, strict=True) if len(look.values) <= MAX_TEXTS else ():
        text = look.texts[layers[0]] if len({look.texts[layer] for layer in layers}) == 1 else "…"
        color = "#57606a" if np.ma.is_masked(value) else ink_on(look.cmap(look.norm(value)))
        axes.text(x + look.cell / 2, y + CELL / 2, text, fontsize=11, ha="center", va="center", color=color, in_layout=False)


def shortened(name: str) -> str:
    """A long name without its middle."""
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME // 2 - 1]}…{name[-(MAX_NAME // 2) :]}"


def ink_on(color: tuple[float, ...]) -> str:
    """Black or white, whichever has the higher contrast on a colour (WCAG 2.2, relative luminance)."""
    linear = [x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in color[:3]]
    return "black" if 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] > 0.18 else "white"
