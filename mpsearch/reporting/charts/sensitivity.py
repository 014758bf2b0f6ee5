"""`sensitivity.png`: the sensitivity of each layer to each scheme."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm

from mpsearch.evaluation import SensitivityTable
from mpsearch.reporting.charts.style import heat_map, new_figure, save


def draw_sensitivity(table: SensitivityTable, folder: Path) -> None:
    """Write the figure: one row per scheme, one column per group, logarithmic colours; blank where not positive or infinite."""
    space = table.space
    data = np.where(np.isfinite(table.values) & (table.values > 0), table.values, np.nan).T
    figure, ((axes,),) = new_figure(3.5 + 0.42 * len(space.names), 2.6 + 0.35 * len(space.schemes))
    positive = data[~np.isnan(data)]
    if not positive.size:
        axes.text(0.5, 0.5, "no positive sensitivity", transform=axes.transAxes, ha="center")
    low, high = (positive.min(), positive.max()) if positive.size else (1.0, 1.0)
    norm = LogNorm(low, high if high > low else low * 10)
    values = pd.DataFrame(data, list(space.scheme_names), list(space.names))
    heat_map(axes, values, f"{table.metric} ({table.unit})", aspect="auto", cmap="magma_r", norm=norm)
    axes.set(title="Sensitivity: each layer alone quantized", xlabel="layer or group, in forward order")
    save(figure, folder, "sensitivity")
