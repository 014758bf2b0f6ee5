"""`latency.png`: the time of each layer in each scheme."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpsearch.allocation import SearchSpace
from mpsearch.costs.latency import FLOAT, Latency
from mpsearch.reporting.charts.style import UNIFORM, new_figure, save, styled

MAX_NAMED = 64  # layers whose names stand along the axis; more are numbered
COLORS = ("#0068a8", "#b84e00", "#007a5a", "#a3216f", "#8a6d00", "#6b4fa0", "#3f7f93", "#7a3b2e")  # differ in lightness and hue
MARKERS = "osD^vP*X"


def draw_latency(rows: Sequence[Latency], space: SearchSpace, folder: Path) -> None:
    """Write the figure of the rows of `latency.csv`: one line per scheme, the float layers dashed."""
    microseconds = {(row.layer, row.scheme): 1e3 * row.milliseconds for row in rows}
    names = [layer.name for layer in space.layers]
    with styled():
        figure, ((axes,),) = new_figure(5 + 0.3 * min(len(names), MAX_NAMED), 5.5)
        for i, scheme in enumerate((FLOAT, *space.scheme_names)):
            style: dict[str, Any] = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "ms": 4}
            if scheme == FLOAT:
                style = {"color": UNIFORM, "ls": "--"}
            axes.plot([microseconds.get((name, scheme), np.nan) for name in names], label=scheme, lw=1.2, **style)
        if len(names) <= MAX_NAMED:
            axes.set_xticks(range(len(names)), names, rotation=90, fontsize=11)
        else:
            axes.set_xlabel("layer, in forward order")
        first = rows[0]
        about = f"batch of {first.batch_size}, {first.threads} threads, {first.backend}"
        axes.set(yscale="log", ylabel="microseconds")
        axes.set_title(f"Time of each layer\n({about})", fontsize=13)
        figure.legend(loc="outside right upper", fontsize=11)
        save(figure, folder, "latency")
