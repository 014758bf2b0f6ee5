"""The harness of all benchmarks: registers them, resumes them, times rivals in turn, and writes tables, figures and rows.

A benchmark is a generator of rows, registered with the grid of its parameters:

    @benchmark("matmul", tokens=(1, 16), threads=(1, 2), quick={"tokens": (1,)})
    def matmul(tokens: int) -> Iterator[Row]: ...

It is called once for each point of the grid; its docstring is the text of the page. A row has `what`, `value`, `unit` and, where
there is one, `rival`, `rival_value` and `ratio` (above 1: ours is better); other keys become columns, as do the parameters.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import inspect
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
REPORTS = ROOT / "reports"
PARTIAL = ROOT / "build" / "bench"
UNITS = {"s": 1.0, "ms": 1e3, "us": 1e6}
LEAST_CALLS = 5
N_RESAMPLES = 2000
NOT_IN_A_SEARCH = ("cli", "conf", "executors", "exporters", "packed", "refiners", "reporting", "runtimes", "training")
REGISTRY: dict[str, Benchmark] = {}


class UnavailableError(Exception):
    """A file or package that a point of a benchmark needs is missing; the point is skipped."""


@dataclass(frozen=True)
class Benchmark:
    """A registered benchmark; `quick` overrides parameters of `grid` for a run of seconds, `chart` are arguments of `draw`."""

    name: str
    measure: Callable[..., Iterable[Row]]
    grid: Mapping[str, Sequence[Any]]
    quick: Mapping[str, Sequence[Any]]
    chart: Mapping[str, Any] | None = None

    @property
    def text(self) -> str:
        """What is measured, and how: the docstring."""
        return inspect.cleandoc(self.measure.__doc__ or "")

    def points(self, quick: bool = False, chosen: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
        """All points of the grid; `chosen` maps parameters to their values, separated by commas."""
        grid = {**self.grid, **(self.quick if quick else {})}
        for name, text in (chosen or {}).items():
            if name not in grid:
                raise SystemExit(f"bench_{self.name} has no parameter '{name}', only {', '.join(grid)}.")
            grid[name] = tuple(type(grid[name][0])(value) for value in text.split(","))
        return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]

    def run(self, point: Mapping[str, Any]) -> list[Row]:
        """The rows of a point, completed with its parameters; `threads` is set, not passed."""
        torch.set_num_threads(point.get("threads", 1))
        arguments = {name: value for name, value in point.items() if name != "threads"}
        varied = [
            f"{point[name]} threads" if name == "threads" else str(point[name]) for name in point if len(self.grid[name]) > 1
        ]
        rows = []
        for row in self.measure(**arguments):
            case = [*varied]
            case += [str(row["case"])] if "case" in row else []
            first = {"what": row.get("what", self.name), "case": ", ".join(case) or self.name}
            rows.append({**first, **point, **row, **first, "commit": git_commit()})
        return rows

    @property
    def settings(self) -> str:
        """The parameters that have one value."""
        return ", ".join(f"{name}={values[0]}" for name, values in self.grid.items() if len(values) == 1)


def benchmark(
    name: str, *, quick: Mapping[str, Sequence[Any]], chart: Mapping[str, Any] | None = None, **grid: Sequence[Any]
) -> Callable[[Callable[..., Iterable[Row]]], Callable[..., Iterable[Row]]]:
    """Register the decorated generator of rows under `name`."""

    def register(measure: Callable[..., Iterable[Row]]) -> Callable[..., Iterable[Row]]:
        REGISTRY[name] = Benchmark(name, measure, grid, quick, chart)
        return measure

    return register


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    seconds: float,
    most: int = 200,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each call; all calls are made in one shuffled order, those of one name for about `seconds` in all."""

    def timed(call: Callable[[], object]) -> float:
        start = clock()
        call()
        return clock() - start

    order: list[str] = []
    for name, call in calls.items():
        once = max(min(timed(call) for _ in range(2)), 1e-9)
        order += [name] * min(max(int(seconds / once), LEAST_CALLS), most)
    random.Random(0).shuffle(order)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for name in order:
        times[name].append(timed(calls[name]))
    return {name: statistics.median(taken) for name, taken in times.items()}


def compared(times: Mapping[str, float], rivals: Sequence[str], unit: str = "ms", **about: Any) -> Iterator[Row]:
    """A row for each call of `times` that is no rival, against each rival."""
    for name in (name for name in times if name not in rivals):
        for rival in rivals:
            yield {**about, "case": name} | ratio_row(times[name], rival, times[rival], unit)


def ratio_row(seconds: float, rival: str, rival_seconds: float, unit: str = "ms") -> Row:
    """Two times in `unit`, and how many times as fast ours is."""
    value, other = (UNITS[unit] * taken for taken in (seconds, rival_seconds))
    return {"value": value, "unit": unit, "rival": rival, "rival_value": other, "ratio": rival_seconds / seconds}


def ratio_interval(losses: np.ndarray, rival: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of mean(losses) / mean(rival) by a bootstrap of the samples, which both have in one order."""
    random = np.random.default_rng(0)
    drawn = random.integers(len(losses), size=(N_RESAMPLES, len(losses)))
    low, high = np.quantile(losses[drawn].mean(1) / rival[drawn].mean(1), [0.025, 0.975])
    return float(low), float(high)


@functools.cache
def git_commit() -> str:
    """The short hash of the commit that is checked out."""
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()


@functools.cache
def search_code() -> str:
    """A short hash of the code and settings that decide what a search measures; what reports and exports is left out."""
    sources = [file for file in (ROOT / "mpsearch").rglob("*") if file.suffix in (".py", ".cpp", ".h")]
    sources = [file for file in sources if file.relative_to(ROOT / "mpsearch").parts[0] not in NOT_IN_A_SEARCH]
    digest = hashlib.sha256()
    for file in sorted([*sources, *(ROOT / "conf").rglob("*.yaml")]):
        digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def machine() -> Row:
    """Processor (and GPU), cores, load, PyTorch, commit and date, as a row."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    gpu = [f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"] if torch.cuda.is_available() else []
    facts = [names[0] if names else platform.machine(), *gpu, f"{os.cpu_count()} cores", f"load {os.getloadavg()[0]:.1f}"]
    facts += [f"torch {torch.__version__}", f"commit {git_commit()}", datetime.date.today().isoformat()]
    return {"what": "machine", "case": ", ".join(facts), "value": os.cpu_count(), "unit": "cores"}


def run(bench: Benchmark, points: Sequence[Mapping[str, Any]], partial: Path | None = None) -> list[Row]:
    """Measure the points; those that `partial`, the record of an interrupted run, has are not measured again."""
    known: dict[str, list[Row]] = {}
    if partial is not None and partial.exists():
        known = {line["point"]: line["rows"] for line in map(json.loads, partial.read_text().splitlines())}
    rows: list[Row] = []
    for point in points:
        key = json.dumps(point)
        if key not in known:
            try:
                known[key] = bench.run(point)
            except UnavailableError as error:
                print(f"{bench.name}, {key}: skipped, {error}", flush=True)
                continue
            for row in known[key]:
                print(*(_text(row.get(key, "")) for key in ("what", "case", "value", "unit", "ratio")), flush=True)
            if partial is not None:
                partial.parent.mkdir(parents=True, exist_ok=True)
                with partial.open("a") as stream:
                    stream.write(json.dumps({"point": key, "rows": known[key]}, default=float) + "\n")
        rows += known[key]
    return rows


def write(bench: Benchmark, rows: Sequence[Row], folder: Path) -> None:
    """`rows.csv`, `table.md` and, where the benchmark has a chart, `figure.png`."""
    import pandas as pd

    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(folder / "rows.csv", index=False)
    (folder / "rows.json").unlink(missing_ok=True)  # of the format before
    lines = [f"# bench_{bench.name}", "", bench.text, ""]
    if bench.chart is not None:
        draw(rows, folder / "figure.png", **bench.chart)
        lines += ["![figure](figure.png)", ""]
    lines += [*table(rows, bench.grid), "", *([f"Settings: {bench.settings}.", ""] if bench.settings else [])]
    lines += [f"{machine()['case']}."]
    (folder / "table.md").write_text("\n".join(lines) + "\n")


def table(rows: Sequence[Row], grid: Iterable[str] = ()) -> list[str]:
    """Markdown: a column for each key but the parameters in `grid`, which `case` has; the commit where it is not today's."""
    hidden = {*grid, *(["commit"] if {row["commit"] for row in rows} <= {git_commit()} else [])}
    rows = [{key: value for key, value in row.items() if key not in hidden} for row in rows]
    for row in rows:
        if "low" in row:
            row["95 % interval"] = f"{_text(row.pop('low'))} to {_text(row.pop('high'))}"
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return lines + ["| " + " | ".join(_text(row.get(key, "")) for key in columns) + " |" for row in rows]


def _text(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) and abs(value) < 1e6 else str(value)


def draw(
    rows: Sequence[Row], file: Path, *, x: str, y: str, line: str, panel: str = "what", log: str = "y", marker: str = "o"
) -> None:
    """A panel for each value of one column, with a line for each value of another; `log` names the logarithmic axes."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row.get(y) is not None and {x, line} <= row.keys()]
    panels = list(dict.fromkeys(row[panel] for row in rows)) or [""]
    figure, grid = plt.subplots(1, len(panels), figsize=(4.5 * len(panels) + 2, 4), layout="constrained", squeeze=False)
    names = list(dict.fromkeys(row[line] for row in rows))
    for axes, title in zip(grid[0], panels, strict=True):
        for i, name in enumerate(names):
            places = [(row[x], row[y]) for row in rows if (row[panel], row[line]) == (title, name)]
            if places:
                axes.plot(*zip(*places, strict=True), marker=marker, ms=3, lw=1.2, color=f"C{i % 10}", label=name)
        axes.set(title=title, xlabel=x, ylabel=y, **{f"{axis}scale": "log" for axis in log})
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=7)
    figure.savefig(file, dpi=110)
    plt.close(figure)
