"""`sensitivity`: the sensitivity of each layer to each scheme; of a large network, to its smallest scheme, on a map."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm

from mpsearch.evaluation import SensitivityTable
from mpsearch.reporting.charts.layers import MAX_COLUMNS
from mpsearch.reporting.charts.network import map_figure
from mpsearch.reporting.charts.style import FORMATS, heat_map, new_figure, save, styled
from mpsearch.reporting.layer_map import layer_sections


def draw_sensitivity(table: SensitivityTable, folder: Path, every: bool = False) -> list[str]:
    """Write the figure, with `every` in all formats; logarithmic colours, blank where not positive or infinite.

    Returns its name, or nothing where no sensitivity is positive: such a figure shows nothing, and none is written.
    """
    space, formats = table.space, FORMATS if every else ("png",)
    data = np.where(np.isfinite(table.values) & (table.values > 0) & space.allowed, table.values, np.nan)
    positive = data[~np.isnan(data)]
    if not positive.size:
        return []
    low, high = float(positive.min()), float(positive.max())
    norm, label = LogNorm(low, high if high > low else low * 10), f"{table.metric} ({table.unit})"
    with styled():
        if len(space.names) <= MAX_COLUMNS:
            figure, ((axes,),) = new_figure(3.0 + 0.36 * len(space.names), 2.8 + 0.35 * len(space.schemes))
            values = pd.DataFrame(data.T, list(space.scheme_names), list(space.names))
            heat_map(axes, values, label, aspect="auto", cmap="viridis_r", norm=norm)
            axes.set(title="Sensitivity: each layer alone quantized")
        else:
            least = int(np.argmin(space.storage_bits.sum(0)))
            index = {name: i for i, name in enumerate(space.names)}
            rows = np.array([index[layer.group] for layer in space.layers])
            figure = map_figure(
                layer_sections([layer.name for layer in space.layers]),
                data[rows, least],
                [""] * len(rows),
                title=f"Sensitivity: each layer alone quantized to {space.scheme_names[least]}",
                label=label,
                cmap=matplotlib.colormaps["viridis_r"],
                norm=norm,
            )
        save(figure, folder, "sensitivity", formats)
    return ["sensitivity"]
