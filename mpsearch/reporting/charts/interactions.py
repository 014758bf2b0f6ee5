"""`interactions`: which layers' quantization errors add up, and which cancel, at the picked point."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mpsearch.evaluation import Evaluation, SensitivityTable
from mpsearch.reporting.charts.style import FORMATS, heat_map, new_figure, save, styled
from mpsearch.reporting.curves import interactions, strongest


def draw_interactions(table: SensitivityTable, picked: Evaluation, folder: Path, every: bool = False) -> list[str]:
    """Write the figure, with `every` in all formats; returns its name, or nothing where `interactions` has nothing to show."""
    known = interactions(table, picked)
    if known is None:
        return []
    values = strongest(known)
    side = 2.5 + 0.26 * len(values)
    part = f" (the {len(values)} of {len(known)} groups with the strongest)" if len(values) < len(known) else ""
    with styled():
        figure, ((axes,),) = new_figure(side + 2, side + 1)
        largest = float(np.nanmax(np.abs(values.to_numpy())))
        heat_map(axes, values, "correlation that carries over to other data", cmap="RdBu_r", vmin=-largest, vmax=largest)
        axes.set_title(f"Errors that add up (red) or cancel (blue)\nat the picked point{part}")
        save(figure, folder, "interactions", FORMATS if every else ("png",))
    return ["interactions"]
