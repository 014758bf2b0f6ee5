"""`interactions.png`: which layers' quantization errors add up, and which cancel, at the picked point."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from mpsearch.evaluation import Evaluation, SensitivityTable
from mpsearch.reporting.charts.style import heat_map, new_figure, save


def interactions(table: SensitivityTable, picked: Evaluation) -> pd.DataFrame | None:
    """The correlation of the groups' Gauss-Newton features, groups by groups; `None` where the metric has none.

    It is 1 where the errors of two groups change the outputs alike, so that they add up, and -1 where they cancel.
    """
    if table.effects is None:
        return None
    names, choice = list(table.space.names), table.space.choice(picked.allocation)
    each = np.arange(len(names))
    features = table.effects[:, each, choice].astype(float)
    squared = 2 * table.losses()[each, choice]
    correlations = features.T @ features / np.sqrt(np.maximum(np.outer(squared, squared), 1e-300))
    return pd.DataFrame(correlations, index=names, columns=names)


def draw_interactions(table: SensitivityTable, picked: Evaluation, folder: Path) -> None:
    """Write the figure; nothing where the metric knows no interactions."""
    values = interactions(table, picked)
    if values is None:
        return
    n = len(values)
    side = min(4 + 0.22 * n, 30)
    figure, ((axes,),) = new_figure(side + 1, side)
    shown = values.mask(np.eye(n, dtype=bool))
    largest = float(np.nanmax(np.abs(shown.to_numpy()), initial=0.01))
    heat_map(axes, shown, "correlation of their features", cmap="RdBu_r", vmin=-largest, vmax=largest)
    axes.set_title("Layers whose errors add up (red) or cancel (blue) at the picked point")
    save(figure, folder, "interactions")
