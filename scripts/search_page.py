"""The page of `bench_search.py`: tables and figures from what was run, and what they say of each bar."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pages import machine
from scipy.stats import kendalltau
from search_figures import draw_curves, draw_surrogate
from search_problems import Problem

from mpsearch.pareto import hypervolume
from mpsearch.quality import Quality

INTRO = """
# bench_search: our sampler against its rivals

Written by `scripts/bench_search.py`, sentences with numbers in them too. Every sampler is asked by the same loop
(`mpsearch.search`), gets the same quantized weights (`coordinate_descent`, the package's default, one symmetric scale a channel,
biases corrected) and the same evaluations: what one sampler had measured is looked up when another asks for it, and counts in
full. Weights only, arithmetic simulated. All was measured at commit b76ae17 or a few before it.

| problem | what it is |
| --- | --- |
| digits | the package's network, 10 layers at 2 to 4 bits, 400 search images; all 59,049 allocations [known](digits.csv.gz) |
| resnet20 | ResNet-20, 20 layers at 2 to 6 or 8 bits, 250 search images (CIFAR-10, train), 5,000 test images to confirm |
| stories260k | a Llama of 5 blocks, 21 groups (q/k/v, gate/up) at 2 to 6 or 8 bits, 1,024 search tokens, confirmed on 16,384 |
| synthetic1000, synthetic10000 | groups whose errors add up as vectors, by a formula (`scripts/search_problems.py`): for scale |

**Hypervolume**: axes average bits (scales counted) and log10 max(KL, 1e-5); reference the worst corner of all allocations
(digits), else (uniform 8 bits, KL of uniform 2 bits). It is given as a share: of the true one (digits), else of that of all
evaluations of all samplers together. **Evaluations** count everything that runs the search data: samplers that use the measured
sensitivities (ours, those "seeded", ILP and greedy on KL) pay one evaluation for every (group, scheme) before their first trial.
ILP on Fisher, HAWQ's trace or weight MSE pays none, but the seconds of its metric. Every sampler also gets the uniform
allocations. Where there are several seeds: the median, and the range in brackets. **Seconds** are processor seconds of one
thread; an evaluation costs what it took when it was first measured.

The rivals are written here after their sources, named in each file of `mpsearch/samplers/` (TPE, NSGA-II, NSGA-III, GP,
random are Optuna's): *ILP* takes the exact optimum of an additive table at many sizes (HAWQ-V3, NVIDIA ModelOpt, Sony MCT);
*greedy* walks AIMET's or exllamav3's order; *EvoPress* switches levels at 40 sizes in turn; *AMQ* runs NSGA-II on a
predictor, without its pruning of sensitive groups, which made it worse. "Seeded" are Optuna's samplers that start from 50
points of the knapsack's front, as ours does from 20: Optuna's samplers as they come know nothing of it.
"""
OURS, ON_FISHER = "front (ours)", "front (ours) on Fisher"
COUNTS = (50, 100, 150, 220, 300, 400)
Row = dict[str, Any]
Curves = dict[str, list[tuple[Row, np.ndarray]]]


def write_page(
    cache: Path,
    folder: Path,
    problems: Mapping[str, Callable[[Path], Problem]],
    reference: Callable[[Problem], tuple[float, float]],
    doubts: str,
) -> None:
    """`table.md`, `rows.json` and the figures."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    bars: list[tuple[str, str, bool]] = []  # asked for, measured, met
    lines: list[str] = []
    for name, make in problems.items():
        if "_" in name:  # the same network searched on more data: beside it
            continue
        runs = [
            json.loads(file.read_text())
            for file in sorted(cache.glob(f"{name}-*.json"))
            if file.stem.rpartition("-")[2].isdigit()
        ]
        runs = [run for run in runs if "budget" not in run["run"]]  # not a whole front
        if not runs:
            continue
        problem = make(cache)
        corner = reference(problem)
        if name == "digits":
            whole, of = _truth(problem, corner), "of the true hypervolume"
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
        bars += _bars(name, curves)
        check = cache / f"{name}-check.json"
        if check.exists():
            found = json.loads(check.read_text())
            lines += ["", *_checked(name, found, rows, bars)]
            draw_surrogate(folder / f"{name}_surrogate.png", name, found)
            lines += ["", f"![the surrogate on {name}]({name}_surrogate.png)"]
        if (cache / f"{name}-fronts.json").exists():
            lines += ["", *_fronts(json.loads((cache / f"{name}-fronts.json").read_text()))]
        for confirm in sorted(cache.glob(f"{name}*-confirm.json")):
            lines += ["", *_confirmed(confirm.name.removesuffix("-confirm.json"), json.loads(confirm.read_text()), bars)]
    if (cache / "cost.json").exists():
        lines += ["", "## What a proposal costs", "", *_cost(json.loads((cache / "cost.json").read_text()), rows)]
    footer = machine()
    rows.append(footer)
    table = [f"| {asked} | {measured} | {'yes' if met else '**no**'} |" for asked, measured, met in bars]
    head = [*INTRO.strip().split("\n"), "", "## The bars", "", "| asked for | measured | met |", "| --- | --- | --- |", *table]
    head += ["", "## Where we lose, and what to doubt", "", *doubts.strip().split("\n")]
    (folder / "table.md").write_text("\n".join([*head, *lines, "", str(footer["case"])]) + "\n")
    (folder / "rows.json").write_text(json.dumps(rows, indent=1) + "\n")
    print("\n".join([*head, *lines]))


def _truth(problem: Problem, corner: tuple[float, float]) -> float:
    whole = [code for code in problem.known if "-" not in code]
    bits = problem.space.storage_bits / problem.space.numel
    choices = np.array([[int(c, 36) for c in code] for code in whole])
    sizes = bits[np.arange(len(bits)), choices].sum(1)
    return hypervolume(sizes, np.array([problem.known[code][0] for code in whole]), *corner)


def _at(run: Row, curve: np.ndarray, n: int) -> float | None:
    """The hypervolume after `n` evaluations, those of the sensitivity counted; None before the first and after the last trial."""
    trials = n - run["before"]
    return float(curve[trials - 1]) if 1 <= trials <= len(curve) else None


def _median_at(found: list[tuple[Row, np.ndarray]], n: int) -> float | None:
    values = [value for run, curve in found if (value := _at(run, curve, n)) is not None]
    return float(np.median(values)) if values else None


def _end(found: list[tuple[Row, np.ndarray]]) -> int:
    return int(found[0][0]["before"] + len(found[0][1]))


def _bars(name: str, curves: Curves) -> list[tuple[str, str, bool]]:
    """What the curves say of the bars: our hypervolume beside the truth, the rivals' at 400, and the long run's."""
    found = []
    for own in (OURS, ON_FISHER):
        if own not in curves:
            continue
        ours = curves[own]
        end = 150 if name == "digits" else _end(ours)
        values = [value for run, curve in ours if (value := _at(run, curve, end)) is not None]
        mine = float(np.median(values))
        case = name + (", with metric=fisher" if own == ON_FISHER else "")
        if name == "digits":
            text = f"{100 * mine:.2f} %" + (f", the worst of {len(values)} seeds {100 * min(values):.2f} %" if values[1:] else "")
            found.append((f"{case}: 99.5 % of the true hypervolume within 150 evaluations", text, min(values) >= 0.995))
        last = 400 if end < 400 else end
        rivals = {
            run: value
            for run, seeds in curves.items()
            if "ours" not in run and "long" not in run and (value := _median_at(seeds, min(last, _end(seeds)))) is not None
        }
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
    counts = [n for n in COUNTS if any(_median_at(found, n) is not None for found in curves.values())]
    head = ["sampler", "seeds", *(f"after {n}" for n in counts), "at the end", "seconds, proposing", "seconds, all"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    order = sorted(curves, key=lambda run: -float(np.median([curve[-1] for _, curve in curves[run]])))
    for run in order:
        cells = []
        for n in (*counts, None):
            values = [curve[-1] if n is None else _at(r, curve, n) for r, curve in curves[run]]
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


def _checked(name: str, found: Row, rows: list[Row], bars: list[tuple[str, str, bool]]) -> list[str]:
    measured, additive = np.array(found["measured"]), np.array(found["additive"])
    predicted = np.array([s["predicted"] for s in found["surrogates"]])
    deviations = np.array([s["deviation"] for s in found["surrogates"]])
    halves = np.array(found["halves"])
    ceiling = kendalltau(halves[:, 0], halves[:, 1]).statistic
    tau = {
        "additive": kendalltau(additive, measured).statistic,
        "surrogate": float(np.median([kendalltau(p, measured).statistic for p in predicted])),
    }
    rms = {
        "additive": float(np.sqrt(np.mean((additive - measured) ** 2))),
        "surrogate": float(np.median(np.sqrt(np.mean((predicted - measured) ** 2, axis=1)))),
    }
    z = float(np.median(np.sqrt(np.mean(((predicted - measured) / deviations) ** 2, axis=1))))
    ratio = rms["surrogate"] / rms["additive"]
    asked = f"{name}: error of log loss at most 0.6 of the additive model's, {len(measured)} held out"
    text = f"{ratio:.2f}, fitted to {found['trained_on']}; Kendall tau {tau['surrogate']:.3f}, split-half ceiling {ceiling:.3f}"
    bars.append((asked, text, ratio <= 0.6))
    losses = {key: np.array(found[f"loss_{key}"]) for key in ("additive", "ours", "solved", "true")}
    ratios = {key: np.median(np.atleast_2d(losses[key] / losses["additive"]), axis=0) for key in ("ours", "solved", "true")}
    thirds = {key: [float(np.median(part)) for part in np.array_split(ratio, 3)] for key, ratio in ratios.items()}
    for key, way in (("ours", "the front as searched"), ("solved", "two more evaluations a budget, as `mpsearch solve`")):
        asked = f"{name}: loss at equal bytes in the tightest third at most 0.8 of the additive ILP's"
        bars.append((asked, f"{thirds[key][0]:.2f}: {way}", thirds[key][0] <= 0.8))
    rows += [
        {
            "what": "surrogate, error of log loss",
            "case": f"{name}, {len(measured)} held out",
            "value": rms["surrogate"],
            "unit": "nats, rms",
            "rival": "additive",
            "rival_value": rms["additive"],
            "ratio": rms["additive"] / rms["surrogate"],
        },
        {
            "what": "loss at equal bytes",
            "case": f"{name}, tightest third of budgets",
            "value": thirds["ours"][0],
            "unit": "of the additive ILP's, median",
        },
    ]
    several = f"median of {len(predicted)} searches" if len(predicted) > 1 else "one search"
    return [
        f"**The surrogate**, fitted to {found['trained_on']} evaluations ({several}), on {len(measured)} random mixed",
        "allocations that no search asked for, all within 1 bit of the best front known:",
        "",
        "| | error of ln loss, rms | Kendall τ |",
        "| --- | ---: | ---: |",
        f"| additive | {rms['additive']:.3f} | {tau['additive']:.3f} |",
        f"| surrogate | {rms['surrogate']:.3f} (**{ratio:.2f}** of it) | {tau['surrogate']:.3f} |",
        f"| split-half ceiling: one half of the search data against the other, {len(halves)} allocations | | {ceiling:.3f} |",
        "",
        f"Its error bars: the errors are {z:.2f} times what they say (rms; 1.0 is right).",
        "",
        "**Loss at equal bytes**, ours over the exact additive optimum's, measured alike, medians of 10 budgets each:",
        "",
        "| | tightest third | middle | loosest |",
        "| --- | ---: | ---: | ---: |",
        "| the front as searched | " + " | ".join(f"{value:.2f}" for value in thirds["ours"]) + " |",
        "| two more evaluations at each budget (`mpsearch solve`) | " + " | ".join(f"{v:.2f}" for v in thirds["solved"]) + " |",
        *(["| the true front | " + " | ".join(f"{v:.2f}" for v in thirds["true"]) + " |"] if name == "digits" else []),
    ]


def _fronts(found: Row) -> list[str]:
    best = max(row["hypervolume"] for row in found["rows"])
    return [
        f"**Whole fronts on the confirm split** (its first {found['n']:,} samples): what of a front's hypervolume is left there.",
        "",
        "| sampler | evaluations | points | hypervolume there | of the best |",
        "| --- | ---: | ---: | ---: | ---: |",
        *(
            f"| {row['run']} | {row['total']:,} | {len(row['points'])} | {row['hypervolume']:.3f} "
            f"| {100 * row['hypervolume'] / best:.2f} % |"
            for row in sorted(found["rows"], key=lambda row: -row["hypervolume"])
        ),
    ]


def _confirmed(name: str, c: Row, bars: list[tuple[str, str, bool]]) -> list[str]:
    quality = Quality(c["quality"].replace("_", " "), c["kind"])
    other = name.partition("_")[2].replace("_", " ")
    images = f", searched on {other} images instead" if other else ""
    lines = [
        f"**At equal bits, on the confirm split{images}** ({c['n']:,} samples that no search saw; the float model has "
        f"{quality.text(c['float'])}), beside the additive optimum (ILP on KL). Of several searches the mean; positive "
        "differences are for the better; the interval is paired, 95 %:",
        "",
        f"| bits | | {quality.label} | difference | interval | each search | KL | KL on the search data |",
        "| ---: | --- | ---: | ---: | --- | --- | ---: | ---: |",
    ]
    for row in c["rows"]:
        if row["way"] == "additive":
            cells = [f"{row['bits']:g}", "additive optimum", quality.text(row["quality"]), "", "", ""]
            lines.append("| " + " | ".join([*cells, f"{row['loss']:.4f}", f"{row['search_loss']:.4f}"]) + " |")
            continue
        each = ", ".join(f"{quality.scale * value:+.2f}" for value in row["each"])
        difference, low, high = (f"{quality.scale * row[key]:+.2f}" for key in ("difference", "low", "high"))
        star = "**" if row["low"] > 0 else ""
        cells = [f"{row['bits']:g}", row["way"], quality.text(row["quality"]), star + difference + star, f"{low} to {high}", each]
        searched = "" if row["search_loss"] is None else f"{row['search_loss']:.4f}"
        lines.append("| " + " | ".join([*cells, f"{row['loss']:.4f}", searched]) + " |")
        if "budget" in row["way"] and not other:
            asked = f"{name}: {quality.name} on the confirm split at {row['bits']:g} bits better than the additive optimum's"
            bars.append((asked, f"{difference} ({low} to {high})", row["low"] > 0))
    return lines


def _cost(found: list[Row], rows: list[Row]) -> list[str]:
    lines = [
        "| groups x schemes | proposing, ms | every so often, the variances too | Optuna's own bookkeeping |",
        "| --- | ---: | ---: | ---: |",
    ]
    for row in found:
        lines.append(f"| {row['groups']:,} x 8 | {row['ms']:.0f} | {row['first_ms']:.0f} | {row['optuna_ms']:.0f} |")
        rows.append({"what": "proposal", "case": f"{row['groups']} groups x 8", "value": row["ms"], "unit": "ms, processor time"})
    return [*lines, "", "Processor time of one thread, median of 5, after 300 evaluations; more evaluations cost no more."]
