"""`latency.png`: the time of each layer in each scheme."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from mpsearch.allocation import SearchSpace
from mpsearch.costs.latency import FLOAT, Latency
from mpsearch.reporting.charts.style import UNIFORM, name_columns, new_figure, save


def draw_latency(rows: Sequence[Latency], space: SearchSpace, folder: Path) -> None:
    """Write the figure of the rows of `latency.csv`: one line per scheme, the float layers dashed."""
    microseconds = {(row.layer, row.scheme): 1e3 * row.milliseconds for row in rows}
    names = [layer.name for layer in space.layers]
    figure, ((axes,),) = new_figure(4 + 0.34 * len(names), 5)
    for scheme in (FLOAT, *space.scheme_names):
        style: dict[str, Any] = {"color": UNIFORM, "ls": "--"} if scheme == FLOAT else {"marker": "o", "ms": 3.5}
        column = pd.Series([microseconds.get((name, scheme)) for name in names], dtype=float)
        axes.plot(column, label=scheme, lw=1.2, **style)
    name_columns(axes, names)
    first = rows[0]
    about = f"batch of {first.batch_size}, {first.threads} threads, {first.backend}"
    axes.set(yscale="log", ylabel="microseconds", title=f"Time of each layer in each scheme ({about})")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=9, ncols=2)
    save(figure, folder, "latency")
