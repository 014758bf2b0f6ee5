"""`report.md`: what a run found, and how, in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from mpsearch.evaluation import Evaluation
from mpsearch.graph.unsearched import sentence
from mpsearch.intervals import FEWEST, is_approximate, proportion_interval
from mpsearch.packed.layers import kernel_for
from mpsearch.reporting.answer import answer
from mpsearch.reporting.findings import drop_text, findings, splits_sentence, times_sentence
from mpsearch.reporting.summary import MAX_UNIFORM, SIZES, summary_header, summary_rows
from mpsearch.reporting.tables import evenly
from mpsearch.reporting.verified import verified_rows
from mpsearch.runs.run import Run
from mpsearch.runs.verified import Verified

MAX_FRONT = 12  # rows; fewer where points were trained, or opened in a runtime
MAX_TRAINED, MAX_VERIFIED = 3, 3  # rows
FIGURES = {
    "pareto": "Pareto front",
    "layers": "Scheme of each layer",
    "layers_front": "Schemes along the front",
    "sensitivity": "Sensitivity",
    "interactions": "Interactions",
    "search": "Predicted and measured losses, and the hypervolume",
}
INPUTS_ALONE = (
    "Inputs are rounded just before a layer's product; its output, and all operations between layers (activations, pooling, "
    "residual additions), are float32: no two operations exchange integers."
)


def page(
    run: Run,
    picked: Evaluation,
    confirmed: pd.DataFrame | None,
    figures: Sequence[str] = (),
    verified: Sequence[Verified] = (),
    left_out: Sequence[str] = (),
) -> str:
    """`report.md`, at most 80 lines.

    `confirmed` is the table of `confirm.csv`, where there is one; `figures` are the names of those that were drawn, `verified` is
    what exported files measure in their runtimes, `left_out` says what the run did not do to end in time.
    """
    trained, opened = _trained(run), _verified(run, verified[-MAX_VERIFIED:])
    n_rows = MAX_FRONT - (4 if trained else 0) - (4 if opened else 0)
    blocks = [
        f"# {run.identity.get('model_name', 'Model')} on {run.identity.get('task_name', 'its task')}",
        f"**{answer(run, picked)}** The page `index.html` in this folder shows each point with its layers and commands.",
        " ".join([_setting(run), *left_out]),
        "\n".join(f"![{FIGURES[name]}]({name}.png)" for name in figures if name in FIGURES),
        "## Findings",
        "\n".join(findings(run, picked, confirmed)),
        markdown_table(summary_header(run), summary_rows(run, picked, MAX_UNIFORM)),
        _measurements(run),
        _schemes(run),
        "## The front",
        _front(run, confirmed, picked, n_rows),
        *trained,
        *opened,
        "Tables: `front.csv`, `uniform.csv`, `confirm.csv`, `evaluations.csv`, `sensitivity.csv`; the space: `space.json`; "
        "the settings: `config.yaml`.",
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def _setting(run: Run) -> str:
    """What was searched, and on which data."""
    space, identity = run.space, run.identity
    n_trials = sum(e.trial is not None for e in run.evaluations)
    return " ".join(
        [
            f"{len(space.groups)} layers or groups, {len(space.schemes)} schemes: 10^{space.log10_combinations:.1f} "
            f"allocations. {n_trials} trials measured {len(run.on('search'))} different ones; {len(run.front)} of them make the "
            "front.",
            *[f"{split.capitalize()} data: {description}." for split, description in identity.get("data", {}).items()],
            *([sentence(identity["not_searched"])] if "not_searched" in identity else []),
            *([f"Channels were equalized beforehand: {_equalizer(identity)}."] if identity.get("equalizer") else []),
            *([splits_sentence(identity["overlap"])] if "overlap" in identity else []),
        ]
    )


def _schemes(run: Run) -> str:
    schemes = run.space.schemes
    listed = "; ".join(f"`{name}`: {scheme.describe()}" for name, scheme in schemes.items())
    alone = f" {INPUTS_ALONE}" if any(scheme.input_format is not None for scheme in schemes.values()) else ""
    return f"Schemes: {listed}.{alone}"


def _front(run: Run, confirmed: pd.DataFrame | None, picked: Evaluation, n_rows: int) -> str:
    """At most `n_rows` points of the front, confirmed ones where there are any, with what the confirm split says of them."""
    quality, marks = run.quality, {}
    if confirmed is not None:
        marks = {row.allocation: row for row in confirmed[confirmed.scheme == ""].itertuples()}
    rows = []
    known = [e for e in run.front if not marks or e.allocation.to_json() in marks or e.allocation == picked.allocation]
    kept = evenly(len(known), n_rows if len(known) <= n_rows else n_rows - 1)  # a place for the picked one
    for e in (e for i, e in enumerate(known) if i in kept or e.allocation == picked.allocation):
        mark = marks.get(e.allocation.to_json())
        notes = ["picked"] if e.allocation == picked.allocation else []
        drop = ""
        if mark is not None:
            drop = drop_text(quality, mark.drop, mark.drop_low, mark.drop_high)
            notes += ["not inferior"] if mark.non_inferior == "yes" else []
            if not pd.isna(mark.dominated_by_bytes):
                better = f", whose {quality.name} is significantly better" if mark.significantly_dominated else ""
                notes.append(f"dominated by {int(mark.dominated_by_bytes):,} bytes{better}")
        rows.append((*_sizes(e), f"{e.loss:.4g}", quality.text(e.quality), drop, "; ".join(notes)))
    header = [*SIZES, "loss search", f"{quality.label} search", f"{quality.drop_label}, confirm (95 %)", ""]
    about = f"{len(rows)} of the {len(run.front)} points, of {len(marks)} that were confirmed; `front.csv` has all.\n\n"
    return (about if len(rows) < len(run.front) else "") + markdown_table(header, rows)


def _trained(run: Run) -> list[str]:
    """The section on the points that were trained, the latest ones; empty where none was."""
    quality, trained, baseline = run.quality, run.finetuned("confirm"), run.baseline("confirm")
    if not trained or baseline is None:
        return []
    confirmed, on_search = run.on("confirm"), run.finetuned("search")
    rows = []
    for after in list(trained.values())[-MAX_TRAINED:]:
        both = confirmed[after.allocation], after
        losses, qualities = [f"{e.loss:.4g}" for e in both], [quality.text(e.quality) for e in both]
        drops = [drop_text(quality, *e.drop_from(baseline, quality)) for e in both]
        rows.append((*_sizes(after), *losses, *qualities, *drops, f"{on_search[after.allocation].seconds:.0f}"))
    header = [*SIZES, "loss before", "loss after", f"{quality.label} before", f"{quality.label} after"]
    header += [f"{quality.drop_label}, before (95 %)", f"{quality.drop_label}, after (95 %)", "seconds of training"]
    about = (
        "Trained as they are stored (`mpsearch finetune`, or `confirm.finetune_steps`); scored on the confirm split, the epoch "
        "chosen on the search split."
    )
    return ["## After training", about, markdown_table(header, rows)]


def _verified(run: Run, verified: Sequence[Verified]) -> list[str]:
    """The section on exported files in their runtimes; empty where none was verified."""
    if not verified:
        return []
    about = (
        "Files that `mpsearch verify` exported, opened and scored on the confirm split by their runtime; next to it the loss of "
        "our packed model. Milliseconds are medians of interleaved forward passes "
        f"({'; '.join(dict.fromkeys(v.measured_on for v in verified))}). Table: `verified.csv`."
    )
    return ["## In the runtime", about, markdown_table(*verified_rows(run, verified))]


def _sizes(e: Evaluation) -> tuple[str, str, str]:
    return f"{e.average_bits:.3f}", f"{e.average_bits_all:.3f}", f"{e.size_bytes:,}"


def _measurements(run: Run) -> str:
    """What the intervals are, whether a point ran simulated or packed, which layers no kernel runs, and the times."""
    text = _intervals(run)
    text += (
        " On the search split scores are simulated: dequantized weights, float32 arithmetic, inputs rounded as the scheme says."
    )
    confirmed = run.on("confirm").values()
    if any(e.packed for e in confirmed):
        text += " On the confirm split the models ran on packed weights."
        if wrong := [e for e in confirmed if not e.verified]:
            sizes = ", ".join(f"{e.size_bytes:,}" for e in wrong)
            text += f" **Unverified: the points of {sizes} bytes.** Their packed outputs differ from the simulated ones."
        used = {pair for e in confirmed for pair in run.space.layer_schemes(e.allocation)}
        without = {(la.kind, name) for la, name in used if kernel_for(la.kind, la.shape, run.space.schemes[name]) is None}
        if without:
            pairs = ", ".join(f"{kind} in `{name}`" for kind, name in sorted(without))
            text += f" No kernel runs {pairs}: such layers are dequantized at every call, which is slow."
    return text + times_sentence(run)


def _intervals(run: Run) -> str:
    """What the intervals are, and what the samples of the confirm split can show at all."""
    text = "Intervals are 95 % intervals of the difference from the float model on the same samples."
    baseline = run.baseline("confirm")
    if baseline is None:
        return text
    n = baseline.n_samples
    if run.quality.kind == "share":
        least = proportion_interval(0, 0, n)[1]
        text += f" {n:,} samples cannot show a drop below {100 * least:.2g} points, even where no prediction changes."
    if is_approximate(n):
        text += f" They are approximate: the confirm split has {n} independent samples, and coverage needs at least {FEWEST}."
    return text


def _equalizer(identity: Mapping[str, Any]) -> str:
    """The equalizer with its settings: "CrossLayer (tolerance=0.001, max_sweeps=100)"."""
    fields = {key: value for key, value in identity["equalizer"].items() if key not in ("class", "sha256")}
    name = identity["equalizer"]["class"]
    return name + (f" ({', '.join(f'{key}={value}' for key, value in fields.items())})" if fields else "")
