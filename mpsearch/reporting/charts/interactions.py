"""`interactions.png`: which layers' quantization errors add up, and which cancel, at the picked point."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from mpsearch.evaluation import Evaluation, SensitivityTable
from mpsearch.reporting.charts.style import heat_map, new_figure, save

LEAST_SHOWN = 0.02  # of the largest correlation; below, what the errors have in common changes no loss that is read


def interactions(table: SensitivityTable, picked: Evaluation) -> pd.DataFrame | None:
    """The correlation of the groups' errors as far as it carries over to other data, groups by groups; the diagonal is NaN.

    It is 1 where the errors of two groups change the outputs alike, so that they add up, and -1 where they cancel (the inner
    products of their Gauss-Newton features). `None` where the metric has no features, and where no pair reaches `LEAST_SHOWN`.
    """
    if table.effects is None:
        return None
    names, choice = list(table.space.names), table.space.choice(picked.allocation)
    each = np.arange(len(names))
    features = table.effects[:, each, choice].astype(float)
    squared = 2 * table.losses()[each, choice]
    correlations = features.T @ features / np.sqrt(np.maximum(np.outer(squared, squared), 1e-300))
    np.fill_diagonal(correlations, np.nan)
    largest = np.nanmax(np.abs(correlations), initial=0.0)
    return pd.DataFrame(correlations, index=names, columns=names) if largest >= LEAST_SHOWN else None


def draw_interactions(table: SensitivityTable, picked: Evaluation, folder: Path) -> bool:
    """Write the figure and return whether there is one; an earlier one is removed where `interactions` has nothing to show."""
    values = interactions(table, picked)
    if values is None:
        (folder / "interactions.png").unlink(missing_ok=True)
        return False
    side = min(4 + 0.22 * len(values), 30)
    figure, ((axes,),) = new_figure(side + 1, side)
    largest = float(np.nanmax(np.abs(values.to_numpy())))
    heat_map(axes, values, "correlation that carries over to other data", cmap="RdBu_r", vmin=-largest, vmax=largest)
    axes.set_title("Layers whose errors add up (red) or cancel (blue) at the picked point")
    save(figure, folder, "interactions")
    return True
