"""`layers`: the scheme of each layer at the picked point; `layers_front`: the bits of each layer along the front."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.patches import Rectangle

from mpsearch.evaluation import Evaluation
from mpsearch.reporting.charts.network import ink_on, map_figure
from mpsearch.reporting.charts.style import BITS, FORMATS, PICK, heat_map, new_figure, save, styled
from mpsearch.reporting.layer_map import layer_sections
from mpsearch.reporting.tables import evenly
from mpsearch.runs.run import Run

MAX_ROWS = 24  # a longer front is thinned evenly, the pick always kept
MAX_COLUMNS = 64  # groups of a heat map; a larger network has the map alone


def layer_bits(run: Run, picked: Evaluation, max_rows: int = MAX_ROWS) -> tuple[pd.DataFrame, pd.DataFrame, int | None]:
    """(bits per weight with scales, scheme names, row of the pick): one row per point of the front, one column per group."""
    kept = evenly(len(run.front), max_rows)
    shown = [e for i, e in enumerate(run.front) if i in kept or e.allocation == picked.allocation]
    space, labels = run.space, [f"{e.average_bits:.2f}" for e in shown]
    choices = np.array([space.choice(e.allocation) for e in shown])
    numel = np.array([max(group.numel, 1) for group in space.groups])
    bits = space.storage_bits[np.arange(len(numel)), choices] / numel
    schemes = np.array(space.scheme_names, dtype=object)[choices]
    position = next((i for i, e in enumerate(shown) if e.allocation == picked.allocation), None)
    names = list(space.names)
    return pd.DataFrame(bits, labels, names), pd.DataFrame(schemes, labels, names), position


def draw_layers(run: Run, picked: Evaluation, folder: Path, every: bool = False) -> list[str]:
    """Write the figures, with `every` in all formats; returns their names."""
    formats = FORMATS if every else ("png",)
    with styled():
        _draw_map(run, picked, folder, formats)
        if not run.front or len(run.space.names) > MAX_COLUMNS:
            return ["layers"]
        _draw_front(run, picked, folder, formats)
        return ["layers", "layers_front"]


def _draw_map(run: Run, picked: Evaluation, folder: Path, formats: tuple[str, ...]) -> None:
    space = run.space
    schemes = [space.schemes[picked.allocation[layer.group]] for layer in space.layers]
    bits = np.array([scheme.weight_bits for scheme in schemes], dtype=float)
    names = [picked.allocation[layer.group] for layer in space.layers]
    short = len({s.weight_bits for s in space.schemes.values()}) == len(space.schemes)
    texts = [f"{int(b)}" for b in bits] if short else names
    figure = map_figure(
        layer_sections([layer.name for layer in space.layers]),
        bits,
        texts,
        title=f"Scheme of each layer at {picked.average_bits:.2f} bits per weight",
        label="bits of a weight",
        cmap=matplotlib.colormaps["viridis_r"],
        norm=(norm := LogNorm(min(2.0, bits.min()), max(8.0, bits.max()))),
        ticks=_ticks(norm),
    )
    save(figure, folder, "layers", formats)


def _ticks(norm: LogNorm) -> list[float]:
    return [tick for tick in BITS if (norm.vmin or 0) <= tick <= (norm.vmax or 0)]


def _draw_front(run: Run, picked: Evaluation, folder: Path, formats: tuple[str, ...]) -> None:
    """Colour is bits per weight, text the scheme, a frame the pick."""
    bits, schemes, position = layer_bits(run, picked)
    rows, columns = bits.shape
    wide = max(0.36, 0.1 * max(len(name) for name in schemes.to_numpy().flat) + 0.1)
    figure, ((axes,),) = new_figure(3.2 + wide * columns, 2.4 + 0.32 * rows)
    norm = LogNorm(min(2.0, float(bits.to_numpy().min())), max(8.0, float(bits.to_numpy().max())))
    cmap = matplotlib.colormaps["viridis_r"]
    heat_map(axes, bits, "bits per weight, with scales", _ticks(norm), aspect="auto", cmap=cmap, norm=norm)
    for i, j in np.ndindex(rows, columns):
        color = ink_on(cmap(norm(bits.iat[i, j])))
        axes.text(j, i, schemes.iat[i, j], ha="center", va="center", fontsize=10, color=color, in_layout=False)
    if position is not None:
        axes.get_yticklabels()[position].set(color=PICK, fontweight="bold")
        axes.add_patch(Rectangle((-0.5, position - 0.5), columns, 1, fill=False, ec=PICK, lw=2))
    axes.set(title="Schemes along the front (framed: picked)", ylabel="average bits")
    save(figure, folder, "layers_front", formats)
