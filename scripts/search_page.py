"""The page of `bench_search.py`: tables and figures from what was run, and what they say of each bar."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from pages import machine
from search_figures import draw_curves, draw_surrogate
from search_problems import Problem
from search_runs import METRIC_OF, OURS, enough, runs_of
from search_sections import Bars, Curves, Row, checked, compared, comparison, confirmed, cost, fronts, median_at, value_at

from mpsearch.optimize.pareto import hypervolume

HERE = Path(__file__).parent
COUNTS = (50, 100, 150, 220, 300, 400)


def write_page(
    cache: Path,
    folder: Path,
    problems: Mapping[str, Callable[[Path], Problem]],
    reference: Callable[[Problem], tuple[float, float]],
) -> None:
    """`table.md`, `rows.json` and the figures."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    bars: Bars = []
    lines: list[str] = []
    nets: list[str] = []
    for name, make in problems.items():
        if "resnet20_" in name:  # the same network searched on more data: beside it
            continue
        runs = [run for run in runs_of(name, cache) if "budget" not in run["run"]]  # whole fronts
        if not runs:
            continue
        problem = make(cache)
        corner = reference(problem)
        if name == "digits":
            whole, of = hypervolume(*_whole(problem).T, *corner), "of the true hypervolume"
            known = sorted(code for code in problem.known if "-" not in code)
            table = "".join(f"{code},{problem.known[code][0]:.6g}\n" for code in known)
            (folder / "digits.csv.gz").write_bytes(gzip.compress(("allocation,kl\n" + table).encode(), mtime=0))
        else:
            points = np.array([(t["bits"], t["loss"]) for run in runs for t in run["trials"]])
            whole = hypervolume(points[:, 0], points[:, 1], *corner)
            of = f"of the hypervolume of all that was measured, {whole:.3f} bits x decades"
        curves: Curves = {}
        for run in runs:
            points = np.array([(t["bits"], t["loss"]) for t in run["trials"]])
            values = [hypervolume(points[:n, 0], points[:n, 1], *corner) / whole for n in range(1, len(points) + 1)]
            curves.setdefault(run["run"], []).append((run, np.array(values)))
        lines += ["", f"## {name}: {of}", "", *_table(name, curves, rows)]
        draw_curves(folder / f"{name}.png", name, curves, of.partition(",")[0])
        lines += ["", f"![{name}]({name}.png)"]
        n = enough(problem)
        bars += _bars(name, curves, n)
        found = {
            what: json.loads(file.read_text())
            for what in ("check", "confirm", "fronts")
            if (file := cache / f"{name}-{what}.json").exists()
        }
        nets += compared(name, n, curves, found)
        if "check" in found:
            every = _whole(problem)
            found["check"]["loss_known"] = [every[every[:, 0] <= limit, 1].min() for limit in found["check"]["limits"]]
            lines += ["", *checked(name, found["check"], rows, bars)]
            draw_surrogate(folder / f"{name}_surrogate.png", name, found["check"])
            lines += ["", f"![the surrogate on {name}]({name}_surrogate.png)"]
        if "fronts" in found:
            lines += ["", *fronts(found["fronts"])]
        for file in sorted(cache.glob(f"{name}*-confirm.json")):
            lines += ["", *confirmed(file.name.removesuffix("-confirm.json"), json.loads(file.read_text()), bars)]
    if (cache / "cost.json").exists():
        lines += ["", "## What a proposal costs", "", *cost(json.loads((cache / "cost.json").read_text()), rows)]
    footer = machine()
    rows.append(footer)
    table = [f"| {asked} | {measured} | {'yes' if met else '**no**'} |" for asked, measured, met in bars]
    head = [
        *(HERE / "search_intro.md").read_text().strip().split("\n"),
        "",
        "## The bars",
        "",
        "| asked for | measured | met |",
        "| --- | --- | --- |",
        *table,
    ]
    head += ["", *(HERE / "search_doubts.md").read_text().strip().split("\n")]
    head += ["", "## Which sensitivities, for our sampler", "", *comparison(nets)]
    (folder / "table.md").write_text("\n".join([*head, *lines, "", str(footer["case"])]) + "\n")
    (folder / "rows.json").write_text(json.dumps(rows, indent=1) + "\n")
    print("\n".join([*head, *lines]))


def _whole(problem: Problem) -> np.ndarray:
    """float64 [n, 2] average bits and loss of all allocations that were measured, whoever asked for them."""
    whole = [code for code in problem.known if "-" not in code]
    bits = problem.space.storage_bits / problem.space.numel
    choices = np.array([[int(c, 36) for c in code] for code in whole])
    sizes = bits[np.arange(len(bits)), choices].sum(1)
    return np.column_stack([sizes, [problem.known[code][0] for code in whole]])


def _end(found: list[tuple[Row, np.ndarray]]) -> int:
    return int(found[0][0]["before"] + len(found[0][1]))


def _bars(name: str, curves: Curves, end: int) -> Bars:
    """What the curves say of the bars: our hypervolume beside the truth, the rivals' at 400, and the long run's."""
    found: Bars = []
    for own, metric in METRIC_OF.items():
        if own not in curves:
            continue
        ours = curves[own]
        values = [value for run, curve in ours if (value := value_at(run, curve, end)) is not None]
        case = name + ("" if own == OURS else f", with metric={metric}")
        if not values:
            continue
        mine = float(np.median(values))
        if name == "digits":
            text = f"{100 * mine:.2f} %" + (f", the worst of {len(values)} seeds {100 * min(values):.2f} %" if values[1:] else "")
            found.append((f"{case}: 99.5 % of the true hypervolume within 150 evaluations", text, min(values) >= 0.995))
        last = 400 if end < 400 else end
        rivals = {
            run: value
            for run, seeds in curves.items()
            if "ours" not in run and "long" not in run and (value := median_at(seeds, min(last, _end(seeds)))) is not None
        }
        if rivals:
            best = max(rivals, key=lambda run: rivals[run])
            text = f"{100 * mine:.2f} % beside {100 * rivals[best]:.2f} % of the best of {len(rivals)}, {best}"
            asked = f"{case}: hypervolume after {end:,} evaluations at least that of every rival after {last:,}"
            found.append((asked, text, mine >= rivals[best]))
        for run in curves:
            if "long" in run:
                other = float(np.median([curve[-1] for _, curve in curves[run]]))
                each = ", ".join(f"{100 * (value / other - 1):+.2f}" for value in values)
                text = f"{100 * mine:.2f} % beside {100 * other:.2f} %: {100 * (mine / other - 1):+.2f} % (each search: {each})"
                asked = f"{case}: after {end} within 1 % of {_end(curves[run]):,} evaluations of {run.removesuffix(', long')}"
                found.append((asked, text, mine >= 0.99 * other))
    return found


def _table(name: str, curves: Curves, rows: list[Row]) -> list[str]:
    """Median over the seeds, with the range in brackets where there are several."""
    counts = [n for n in COUNTS if any(median_at(found, n) is not None for found in curves.values())]
    head = ["sampler", "seeds", *(f"after {n}" for n in counts), "at the end", "seconds, proposing", "seconds, all"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    order = sorted(curves, key=lambda run: -float(np.median([curve[-1] for _, curve in curves[run]])))
    for run in order:
        cells = []
        for n in (*counts, None):
            values = [curve[-1] if n is None else value_at(r, curve, n) for r, curve in curves[run]]
            values = [value for value in values if value is not None]
            text = ""
            if values:
                median = float(np.median(values))
                text = f"{100 * median:.2f} %"
                if len(values) > 1:
                    text += f" ({100 * min(values):.2f} to {100 * max(values):.2f})"
                case = f"{name}, {run}, {f'{n} evaluations' if n else 'at the end'}"
                rows.append({"what": "hypervolume", "case": case, "value": median, "unit": "share", "n": len(values)})
            if n is None:
                text += f" after {_end(curves[run]):,}"
            cells.append(text)
        own = np.median([r["trials"][-1]["own"] for r, _ in curves[run]])
        total = np.median([r["trials"][-1]["seconds"] for r, _ in curves[run]])
        lines.append("| " + " | ".join([run, str(len(curves[run])), *cells, f"{own:.0f}", f"{total:.0f}"]) + " |")
    return lines
