"""`interactions.png`: which layers' quantization errors add up, and which cancel, at the picked point."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mpsearch.evaluation import Evaluation, SensitivityTable
from mpsearch.reporting.charts.style import heat_map, new_figure, save
from mpsearch.reporting.curves import interactions


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
