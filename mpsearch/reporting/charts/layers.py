"""`layers.png`: the bits of each layer, along the front."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.patches import Rectangle

from mpsearch.evaluation import Evaluation
from mpsearch.reporting.charts.style import PICK, heat_map, new_figure, save
from mpsearch.runs.run import Run

MAX_ROWS = 24  # a longer front is thinned evenly, the pick always kept
MAX_CELLS = 1500  # with more, the schemes' names do not fit


def layer_bits(run: Run, picked: Evaluation, max_rows: int = MAX_ROWS) -> tuple[pd.DataFrame, pd.DataFrame, int | None]:
    """(bits per weight with scales, scheme names, row of the pick): one row per point of the front, one column per group."""
    kept = set(np.linspace(0, len(run.front) - 1, max_rows).round().astype(int))
    shown = [e for i, e in enumerate(run.front) if len(run.front) <= max_rows or i in kept or e.allocation == picked.allocation]
    space, labels = run.space, [f"{e.average_bits:.2f}" for e in shown]
    choices = np.array([space.choice(e.allocation) for e in shown])
    numel = np.array([max(group.numel, 1) for group in space.groups])
    bits = space.storage_bits[np.arange(len(numel)), choices] / numel
    schemes = np.array(space.scheme_names, dtype=object)[choices]
    position = next((i for i, e in enumerate(shown) if e.allocation == picked.allocation), None)
    names = list(space.names)
    return pd.DataFrame(bits, labels, names), pd.DataFrame(schemes, labels, names), position


def draw_layers(run: Run, picked: Evaluation, folder: Path) -> None:
    """Write the figure: colour is bits per weight, text the scheme, a frame the pick."""
    bits, schemes, position = layer_bits(run, picked)
    rows, columns = bits.shape
    figure, ((axes,),) = new_figure(3.5 + 0.42 * columns, 1.8 + 0.3 * rows)
    most = max(8.0, float(bits.to_numpy().max()))
    heat_map(axes, bits, "bits per weight, with scales", aspect="auto", cmap="viridis", vmin=1, vmax=most)
    if columns * rows <= MAX_CELLS:
        for i, j in np.ndindex(rows, columns):
            color = "white" if bits.iat[i, j] < 6 else "black"
            axes.text(j, i, schemes.iat[i, j], ha="center", va="center", fontsize=7, color=color)
    if position is not None:
        axes.get_yticklabels()[position].set(color=PICK, fontweight="bold")
        axes.add_patch(Rectangle((-0.5, position - 0.5), columns, 1, fill=False, ec=PICK, lw=2))
    axes.set(title="Bits of each layer along the front", xlabel="layer or group, in forward order", ylabel="average bits")
    save(figure, folder, "layers")
