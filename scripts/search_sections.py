"""Parts of the page of `bench_search.py`: what was checked beside the searches, and KL beside Fisher sensitivities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import kendalltau
from search_runs import METRIC_OF, ON_KL, OURS

from mpsearch.quality import Quality

Row = dict[str, Any]
Curves = dict[str, list[tuple[Row, np.ndarray]]]
Bars = list[tuple[str, str, bool]]  # asked for, measured, met


def value_at(run: Row, curve: np.ndarray, n: int) -> float | None:
    """The hypervolume after `n` evaluations, those of the sensitivity counted; None before the first and after the last trial."""
    trials = n - run["before"]
    return float(curve[trials - 1]) if 1 <= trials <= len(curve) else None


def median_at(found: list[tuple[Row, np.ndarray]], n: int) -> float | None:
    values = [value for run, curve in found if (value := value_at(run, curve, n)) is not None]
    return float(np.median(values)) if values else None


def errors(of: Row, measured: np.ndarray) -> tuple[float, float, float]:
    """Of the surrogates of some searches, medians: the error of ln loss (rms), Kendall's tau, the error in its own error bars."""
    predicted = np.array([s["predicted"] for s in of["surrogates"]])
    deviations = np.array([s["deviation"] for s in of["surrogates"]])
    error = float(np.median(np.sqrt(np.mean((predicted - measured) ** 2, axis=1))))
    tau = float(np.median([kendalltau(p, measured).statistic for p in predicted]))
    return error, tau, float(np.median(np.sqrt(np.mean(((predicted - measured) / deviations) ** 2, axis=1))))


def thirds(found: Row, losses: Sequence[Any]) -> list[float]:
    """Of the tightest, middle and loosest budgets the median loss over that of the additive optimum on KL."""
    ratio = np.median(np.atleast_2d(np.array(losses) / np.array(found[ON_KL]["loss_additive"])), axis=0)
    return [float(np.median(part)) for part in np.array_split(ratio, 3)]


def checked(name: str, found: Row, rows: list[Row], bars: Bars) -> list[str]:
    """The surrogate on held-out allocations, and the loss at equal bytes."""
    measured, halves = np.array(found["measured"]), np.array(found["halves"])
    ceiling = kendalltau(halves[:, 0], halves[:, 1]).statistic
    base = np.array(found[ON_KL]["additive"])
    base_error = float(np.sqrt(np.mean((base - measured) ** 2)))
    best = "the true front" if name == "digits" else "the best of all that was measured"
    lines = [
        f"**The surrogate**, fitted to {found['n']} evaluations (median of the searches; those of the sensitivities counted), on "
        f"{len(measured)} random mixed allocations that no search asked for, all within 1 bit of the best front known:",
        "",
        "| | searches | error of ln loss, rms | of the additive one's on KL | Kendall τ | error over its error bars |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    budgets = [
        "**Loss at equal bytes**, over the exact additive optimum's on KL, measured alike, medians of "
        f"{len(found['limits']) // 3} budgets each:",
        "",
        "| | tightest third | middle | loosest |",
        "| --- | ---: | ---: | ---: |",
    ]

    def add(label: str, losses: Sequence[Any]) -> float:
        parts = thirds(found, losses)
        budgets.append(f"| {label} | " + " | ".join(f"{value:.2f}" for value in parts) + " |")
        return parts[0]

    for own, metric in METRIC_OF.items():
        if own not in found:
            continue
        of = found[own]
        additive = np.array(of["additive"])
        additive_error, tau = float(np.sqrt(np.mean((additive - measured) ** 2))), kendalltau(additive, measured).statistic
        lines.append(f"| additive on {metric} | | {additive_error:.3f} | {additive_error / base_error:.2f} | {tau:.3f} | |")
        if own != ON_KL:
            add(f"additive optimum on {metric}", of["loss_additive"])
        if not of["surrogates"]:
            continue
        error, tau, z = errors(of, measured)
        ratio = error / base_error
        lines.append(f"| surrogate on {metric} | {len(of['surrogates'])} | {error:.3f} | **{ratio:.2f}** | {tau:.3f} | {z:.2f} |")
        case = name + ("" if own == OURS else f", with metric={metric}")
        asked = f"{case}: error of log loss at most 0.6 of the additive model's, {len(measured)} held out"
        bars.append(
            (asked, f"{ratio:.2f}, fitted to {found['n']}; Kendall tau {tau:.3f}, split-half ceiling {ceiling:.3f}", ratio <= 0.6)
        )
        for key, way in (("ours", "the front as searched"), ("solved", "two more evaluations at each budget (`mpsearch solve`)")):
            tightest = add(f"{own}: {way}", of[f"loss_{key}"])
            asked = f"{case}: loss at equal bytes in the tightest third at most 0.8 of the additive ILP's"
            least = thirds(found, found["loss_known"])[0]
            bars.append((asked, f"{tightest:.2f}: {way} ({least:.2f}: {best})", tightest <= 0.8))
            rows.append(
                {
                    "what": "loss at equal bytes",
                    "case": f"{case}, tightest third of budgets, {way}",
                    "value": tightest,
                    "unit": "of the additive ILP's, median",
                }
            )
        rows.append(
            {
                "what": "surrogate, error of log loss",
                "case": f"{case}, {len(measured)} held out",
                "value": error,
                "unit": "nats, rms",
                "rival": "additive on KL",
                "rival_value": base_error,
                "ratio": base_error / error,
            }
        )
    lines.append(
        f"| split-half ceiling: half of the search data against the other, {len(halves)} allocations | | | | {ceiling:.3f} | |"
    )
    add(best, found["loss_known"])
    return [*lines, "", *budgets]


def compared(name: str, n: int, curves: Curves, found: Mapping[str, Row]) -> list[str]:
    """The rows of a net in the table of `comparison`, one a metric."""
    lines = []
    for own, metric in METRIC_OF.items():
        if own not in curves or name.startswith("synthetic"):
            continue
        runs = curves[own]
        seconds = float(np.median([run["before_seconds"] for run, _ in runs]))
        cells = [name, f"`{metric}`", f"{runs[0][0]['before']} in {seconds:.0f} s", str(len(runs))]
        for at in (50, 100, n, 400):
            value = median_at(runs, at)
            cells.append("" if value is None else f"{100 * value:.2f} %")
        check = found.get("check", {})
        if own in check and check[own]["surrogates"]:
            cells += [f"{thirds(check, check[own][key])[0]:.2f}" for key in ("loss_ours", "loss_solved")]
            measured = np.array(check["measured"])
            additive = np.sqrt(np.mean((np.array(check[ON_KL]["additive"]) - measured) ** 2))
            cells.append(f"{errors(check[own], measured)[0] / additive:.2f}")
        else:
            cells += ["", "", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def comparison(nets: Sequence[str]) -> list[str]:
    """The table of the nets' rows."""
    return [
        "Hypervolumes at equal evaluations, as in the tables below (n: 150 on digits, else 220); the loss in the tightest third "
        "of budgets over that of the additive ILP on KL; the surrogate's error of ln loss over that of the additive model on KL.",
        "",
        "| net | `metric` | evaluations before | searches | after 50 | after 100 | after n | after 400 | tightest third "
        "| with `solve` | surrogate |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *nets,
    ]


def fronts(found: Row) -> list[str]:
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


def confirmed(name: str, c: Row, bars: list[tuple[str, str, bool]]) -> list[str]:
    quality = Quality(c["quality"].replace("_", " "), c["kind"])
    other = name.partition("resnet20_")[2].replace("_", " ")
    images = f", searched on {other} images instead" if other else ""
    digits = "+.4f" if c["kind"] == "number" else "+.2f"
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
        each = ", ".join(f"{quality.scale * value + 0.0:{digits}}" for value in row["each"])
        difference, low, high = (f"{quality.scale * row[key] + 0.0:{digits}}" for key in ("difference", "low", "high"))
        star = "**" if row["low"] > 0 else ""
        cells = [f"{row['bits']:g}", row["way"], quality.text(row["quality"]), star + difference + star, f"{low} to {high}", each]
        searched = "" if row["search_loss"] is None else f"{row['search_loss']:.4f}"
        lines.append("| " + " | ".join([*cells, f"{row['loss']:.4f}", searched]) + " |")
        if "budget" in row["way"] and not other:
            asked = f"{name}: {quality.name} on the confirm split at {row['bits']:g} bits better than the additive optimum's"
            bars.append((asked, f"{difference} ({low} to {high})", row["low"] > 0))
    return lines


def cost(found: list[Row], rows: list[Row]) -> list[str]:
    lines = [
        "| groups x schemes | proposing, ms | every so often, the variances too | Optuna's own bookkeeping |",
        "| --- | ---: | ---: | ---: |",
    ]
    for row in found:
        lines.append(f"| {row['groups']:,} x 8 | {row['ms']:.0f} | {row['first_ms']:.0f} | {row['optuna_ms']:.0f} |")
        rows.append({"what": "proposal", "case": f"{row['groups']} groups x 8", "value": row["ms"], "unit": "ms, processor time"})
    return [*lines, "", "Processor time of one thread, median of 5, after 300 evaluations; more evaluations cost no more."]
