"""The page of a run, in Markdown: what was found, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from mpsearch.evaluation import FINETUNED, Evaluation
from mpsearch.graph.unsearched import sentence
from mpsearch.intervals import FEWEST, is_approximate, proportion_interval
from mpsearch.packed.layers import kernel_for
from mpsearch.reporting.findings import drop_text, findings, splits_sentence, times_differ, times_sentence
from mpsearch.runs.run import Run

SIZES = ("bits", "bits of all", "bytes")  # of the searched weights, of all parameters
INPUTS_ALONE = (
    "Inputs are rounded just before a layer's product; its output, and all that lies between layers (activations, pooling, "
    "residual additions), is float32: no two operations pass integers on."
)


def page(result: Run, picked: Evaluation, confirmed: pd.DataFrame | None) -> str:
    """`report.md`; `confirmed` is the table of `confirm.csv`, where there is one."""
    space, identity = result.space, result.identity
    tried = result.on("search")
    n_trials = sum(e.trial is not None for e in result.evaluations)
    front = result.front
    lines = [
        f"# {identity.get('model_name', 'Model')} on {identity.get('task_name', 'its task')}",
        "",
        f"{len(space.groups)} layers or groups, {len(space.schemes)} schemes: 10^{space.log10_combinations:.1f} allocations. "
        f"{n_trials} trials measured {len(tried)} different ones; {len(front)} of them make the front.",
        *[f"{split.capitalize()} data: {what}." for split, what in identity.get("data", {}).items()],
        *([sentence(identity["not_searched"])] if "not_searched" in identity else []),
        *([f"Channels were equalized beforehand: {_equalizer(identity)}."] if identity.get("equalizer") else []),
        *([splits_sentence(identity["overlap"])] if "overlap" in identity else []),
        "",
        "![Pareto front](pareto.png)",
        "",
        "## What was found",
        "",
        *findings(result, picked, confirmed),
        "",
        _markdown_table(summary_header(result), summary_rows(result, picked)),
        "",
        f"{_intervals(result)} {_how_it_ran(result)}{times_sentence(result)}",
        "",
        "## The schemes",
        "",
        *[f"- `{name}`: {scheme.describe()}" for name, scheme in space.schemes.items()],
        "",
        *([INPUTS_ALONE, ""] if any(scheme.input_format is not None for scheme in space.schemes.values()) else []),
        "## Bits of each layer",
        "",
        "![Bits of each layer](layers.png)",
        "",
        "## Layer sensitivity",
        "",
        "![Sensitivity](sensitivity.png)",
        "",
        *(["![Interactions](interactions.png)", ""] if result.sensitivity.effects is not None else []),
        "## The front",
        "",
        _front_markdown(result, confirmed, picked),
        "",
        *_trained(result),
        "Tables: `front.csv`, `uniform.csv`, `confirm.csv`, `evaluations.csv`, `sensitivity.csv`; the space: `space.json`; "
        "the settings: `config.yaml`.",
    ]
    return "\n".join(lines) + "\n"


def summary_rows(result: Run, picked: Evaluation) -> list[tuple[str, ...]]:
    """Of float, uniform and pick: what, bits, bytes; loss and quality on the search split; quality and drop on confirm.

    `picked` may be a finetuned evaluation: its row is then that of the trained weights.
    """
    confirmed, q = result.on("confirm"), result.quality
    rows: list[tuple[str, ...]] = []
    of_picked = "picked, trained" if picked.origin == FINETUNED else "picked"
    named = [("float", result.baseline()), *((f"uniform {s}", e) for s, e in result.uniform), (of_picked, picked)]
    for what, e in named:
        if e is None:
            continue
        c = result.baseline("confirm") if e.origin == "float" else confirmed.get(e.allocation)
        if e.origin == FINETUNED:
            c = result.finetuned("confirm").get(e.allocation)
        quality = drop = "not measured"
        milliseconds = ""
        if c is not None:
            quality = q.text(c.quality)
            milliseconds = "" if c.measured_ms is None else f"{c.measured_ms:.3g}"
            base = result.baseline("confirm")
            drop = drop_text(q, *c.drop_from(base, q)) if base and e.origin != "float" else ""
        sizes = f"{e.average_bits:.2f}", f"{e.average_bits_all:.2f}", f"{e.size_bytes:,}"
        on_search = (*sizes, f"{e.loss:.4g}", q.text(e.quality))
        rows.append((what, *on_search, quality, drop, *([milliseconds] if times_differ(result) else [])))
    return rows


def summary_header(result: Run) -> tuple[str, ...]:
    """The columns of `summary_rows`; the times are left out where they do not tell the points apart."""
    q = result.quality.label
    drop = f"{result.quality.drop_label}, confirm (95 %)"
    return ("", *SIZES, "loss search", f"{q} search", f"{q} confirm", drop, *(["ms"] if times_differ(result) else []))


def _front_markdown(result: Run, confirmed: pd.DataFrame | None, picked: Evaluation) -> str:
    q, quality = result.quality_name, result.quality
    marks: dict[str, Any] = {}
    if confirmed is not None:
        marks = {row.allocation: row for row in confirmed[confirmed.scheme == ""].itertuples()}
    rows = []
    for e in result.front:
        mark = marks.get(e.allocation.to_json())
        notes = ["picked"] if e.allocation == picked.allocation else []
        drop = ""
        if mark is not None:
            drop = drop_text(quality, mark.drop, mark.drop_low, mark.drop_high)
            notes += ["not inferior"] if mark.non_inferior == "yes" else []
            if not pd.isna(mark.dominated_by_bytes):
                notes.append(
                    f"dominated by {int(mark.dominated_by_bytes):,} bytes"
                    + (f", whose {q} is significantly better" if mark.significantly_dominated else "")
                )
        sizes = f"{e.average_bits:.3f}", f"{e.average_bits_all:.3f}", f"{e.size_bytes:,}"
        rows.append((*sizes, f"{e.loss:.4g}", quality.text(e.quality), drop, "; ".join(notes)))
    return _markdown_table([*SIZES, "loss search", f"{quality.label} search", f"{quality.drop_label}, confirm (95 %)", ""], rows)


def _trained(result: Run) -> list[str]:
    """The section on the points that were trained, smallest first; nothing where none was."""
    quality, found = result.quality, result.finetuned("confirm")
    baseline, before, on_search = result.baseline("confirm"), result.on("confirm"), result.finetuned("search")
    if not found or baseline is None:
        return []
    rows = []
    for allocation, after in sorted(found.items(), key=lambda pair: pair[1].size_bytes):
        was, searched = before[allocation], on_search[allocation]
        losses = f"{was.loss:.4g}", f"{after.loss:.4g}"
        qualities = quality.text(was.quality), quality.text(after.quality)
        drops = (drop_text(quality, *e.drop_from(baseline, quality)) for e in (was, after))
        sizes = f"{after.average_bits:.3f}", f"{after.average_bits_all:.3f}", f"{after.size_bytes:,}"
        rows.append((*sizes, *losses, *qualities, *drops, f"{searched.seconds:.0f}"))
    header = [*SIZES, "loss before", "loss after", f"{quality.label} before", f"{quality.label} after"]
    header += [f"{quality.drop_label}, before (95 %)", f"{quality.drop_label}, after (95 %)", "seconds of training"]
    return [
        "## After training",
        "",
        "Trained as they are stored (`mpsearch finetune`, or `confirm.finetune_steps`); scored on the confirm split, the epoch "
        "chosen on the search split.",
        "",
        _markdown_table(header, rows),
        "",
    ]


def _how_it_ran(result: Run) -> str:
    """What simulated and packed means, and which layers no kernel runs."""
    said = "On the search split scores are simulated: dequantized weights, float32 arithmetic, inputs rounded as the scheme says."
    confirmed = result.on("confirm").values()
    if not any(e.packed for e in confirmed):
        return said
    said += " On the confirm split the models ran on packed weights."
    if wrong := [e for e in confirmed if not e.verified]:
        sizes = ", ".join(f"{e.size_bytes:,}" for e in wrong)
        said += f" **Unverified: the points of {sizes} bytes.** Their packed outputs differ from the simulated ones."
    used = {(layer, e.allocation[g.name]) for e in confirmed for g in result.space.groups for layer in g.layers}
    without = {(la.kind, name) for la, name in used if kernel_for(la.kind, la.shape, result.space.schemes[name]) is None}
    if without:
        pairs = ", ".join(f"{kind} in `{name}`" for kind, name in sorted(without))
        said += f" No kernel runs {pairs}: such layers are dequantized at every call, which is slow."
    return said


def _equalizer(identity: Mapping[str, Any]) -> str:
    """The equalizer in the words of its config: "CrossLayer (tolerance=0.001, max_sweeps=100)"."""
    fields = {key: value for key, value in identity["equalizer"].items() if key not in ("_target_", "sha256")}
    name = identity["equalizer"]["_target_"].rpartition(".")[2]
    return name + (f" ({', '.join(f'{key}={value}' for key, value in fields.items())})" if fields else "")


def _intervals(result: Run) -> str:
    """What the intervals are, and what the samples of the confirm split can show at all."""
    said = "Intervals are 95 % intervals of the difference from the float model on the same samples."
    baseline = result.baseline("confirm")
    if baseline is None:
        return said
    n = baseline.n_samples
    if result.quality.kind == "share":
        least = proportion_interval(0, 0, n)[1]
        said += f" {n:,} samples cannot show a drop below {100 * least:.2g} points, even where no prediction changes."
    if is_approximate(n):
        said += f" They are approximate: the confirm split has {n} independent samples, and coverage needs at least {FEWEST}."
    return said


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])
