"""The figures of `bench_search.py`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from search_runs import ON_KL, OURS

N_COLORED = 6  # rivals; the rest are gray, and in the table
SMALLEST = 1e-4  # of the hypervolume: what is less counts as nothing missing


def draw_curves(file: Path, name: str, curves: Mapping[str, list[tuple[dict[str, Any], np.ndarray]]], of: str) -> None:
    """How much hypervolume is missing, by evaluations and by seconds: the median over the seeds, and their range as a band."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5.2), layout="constrained", sharey=True)
    short = {run: found for run, found in curves.items() if "long" not in run}
    rivals = sorted((run for run in short if "ours" not in run), key=lambda run: -np.median([c[-1] for _, c in short[run]]))
    colors = dict(zip(rivals[:N_COLORED], plt.get_cmap("tab10").colors, strict=False))
    lowest = 1.0
    for run in [*reversed(rivals), *(run for run in sorted(short) if "ours" in run)]:
        found = short[run]
        n = min(len(curve) for _, curve in found)
        missing = np.maximum(1 - np.array([curve[:n] for _, curve in found]), SMALLEST)
        seconds = np.median([[t["seconds"] for t in r["trials"][:n]] for r, _ in found], axis=0)
        evaluations = found[0][0]["before"] + np.arange(1, n + 1)
        ours = "ours" in run
        style: dict[str, Any] = {"color": "black" if ours else colors.get(run, "0.75"), "lw": 2.4 if ours else 1.4}
        if ours and run != OURS:
            style |= {"lw": 1.6, "ls": "--" if run == ON_KL else ":"}
        label = run if ours or run in colors else ("others: see the table" if run == rivals[-1] else None)
        for ax, x in zip(axes, (evaluations, seconds), strict=True):
            ax.plot(x, np.median(missing, axis=0), label=label, zorder=3 if ours else 2 if run in colors else 1, **style)
            if len(found) > 1 and (ours or run in colors):
                ax.fill_between(x, missing.min(0), missing.max(0), color=style["color"], alpha=0.12, lw=0)
        lowest = min(lowest, float(np.median(missing, axis=0).min()))
    for run, found in curves.items():
        if "long" in run:
            value = max(1 - float(np.median([curve[-1] for _, curve in found])), SMALLEST)
            end = found[0][0]["before"] + len(found[0][1])
            for ax in axes:
                ax.axhline(value, color="tab:red", ls=":", lw=1.4, label=f"{run.removesuffix(', long')} after {end:,}")
            lowest = min(lowest, value)
    axes[0].set(xlabel="evaluations, the sensitivity's counted", ylabel=f"missing {of}", title=name)
    axes[1].set(xlabel="processor seconds: scoring, proposing, the sensitivity", xscale="log", title="the same by time")
    axes[0].set(yscale="log", ylim=(0.8 * lowest, 0.6))
    axes[0].yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axes[0].yaxis.set_minor_formatter(mpl.ticker.NullFormatter())
    axes[0].yaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axes[1].legend(fontsize=8, loc="best")
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_surrogate(file: Path, name: str, found: Mapping[str, Any]) -> None:
    """Predicted against measured loss on held-out allocations; of several searches the first."""
    figure, axes = plt.subplots(figsize=(5.5, 5), layout="constrained")
    measured = np.exp(found["measured"])
    axes.loglog(
        measured,
        np.exp(found[ON_KL]["additive"]),
        ".",
        color="tab:orange",
        ms=4,
        label="additive: the sum of the KL of each layer alone",
    )
    axes.loglog(measured, np.exp(found[OURS]["surrogates"][0]["predicted"]), ".", color="tab:blue", ms=4, label="surrogate")
    ends = [measured.min(), measured.max()]
    axes.plot(ends, ends, color="gray", lw=1)
    title = f"{name}: {len(measured)} allocations that neither was fitted to"
    axes.set(xlabel="measured KL, nats", ylabel="predicted KL, nats", title=title)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=110)
    plt.close(figure)
