"""The last screen of a command: how small the model can get, how it compares with uniform allocations, and what to do next."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mpsearch.errors import run_option
from mpsearch.evaluation import FINETUNED, Evaluation
from mpsearch.reporting.findings import drop_text, non_inferior_sentence, times_differ, times_sentence, warnings
from mpsearch.reporting.tables import evenly
from mpsearch.runs.noninferiority import smallest_non_inferior
from mpsearch.runs.run import Run

SIZES = ("bits", "bits of all", "bytes")  # of the searched weights, of all parameters
MAX_UNIFORM = 6  # uniform allocations on the screen


@dataclass(frozen=True)
class Summary:
    """A table (`header`, `rows` of cells) under a `title`; `lines` of text to print after it; the commands to go on with."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    lines: tuple[str, ...]
    steps: tuple[str, ...]


def summary(run: Run, picked: Evaluation, folder: Path | None = None, max_drop: float | None = None) -> Summary:
    """The summary of a run.

    Parameters
    ----------
    run, picked
        The run and the point of its front to show; a finetuned evaluation stands for the trained weights.
    folder
        The run's folder, for the commands that go on from here; without it they are left out.
    max_drop
        The drop of quality that counts as none, by default the run's own.
    """
    answer = smallest_non_inferior(run, run.max_drop if max_drop is None else float(max_drop))
    lines = [
        f"Picked: {picked.average_bits:.2f} bits per weight, {picked.size_bytes:,} bytes, {100 * picked.fraction:.1f} % of the "
        "float32 model.",
        non_inferior_sentence(run, answer),
        times_sentence(run).strip() if times_differ(run) else "",
        *(f"warning: {warning}" for warning in warnings(run)),
    ]
    title = f"{len(run.front)} points on the Pareto front"
    header = (re.sub(r",? (search|confirm)", r"\n\1", name) for name in summary_header(run))  # narrow, so that rows do not wrap
    rows = summary_rows(run, picked, MAX_UNIFORM)
    steps = next_steps(run, picked, folder) if folder else []
    return Summary(title, tuple(header), tuple(rows), tuple(line for line in lines if line), tuple(steps))


def next_steps(run: Run, picked: Evaluation, folder: Path) -> list[str]:
    """The commands that go on from the picked point: write it, train it, or ask for another size."""
    option, point = run_option(folder), f"pick.point={picked.allocation.id}"
    is_trained = picked.origin == FINETUNED
    steps = [("export a point", f"mpsearch export {option} {point}{' finetuned=true' if is_trained else ''}")]
    if not is_trained:
        steps.append(("train it first", f"mpsearch finetune {option} {point}"))
    steps.append(("another size", f"mpsearch solve {option} budget.bytes=<bytes>"))
    return [f"{purpose}: {command}" for purpose, command in steps]


def summary_header(run: Run) -> tuple[str, ...]:
    """The columns of `summary_rows`; the times are left out where they do not tell the points apart."""
    q = run.quality.label
    drop = f"{run.quality.drop_label}, confirm (95 %)"
    return ("", *SIZES, "loss search", f"{q} search", f"{q} confirm", drop, *(["ms"] if times_differ(run) else []))


def summary_rows(run: Run, picked: Evaluation, max_uniform: int | None = None) -> list[tuple[str, ...]]:
    """A row each for the float model, the uniform allocations and the picked point, with the columns of `summary_header`.

    `max_uniform` keeps so many of the uniform allocations, evenly spread.
    """
    uniform = [(f"uniform {scheme}", e) for scheme, e in run.uniform]
    if max_uniform is not None:
        uniform = [uniform[i] for i in evenly(len(uniform), max_uniform)]
    name = "picked, trained" if picked.origin == FINETUNED else "picked"
    named = [("float", run.baseline()), *uniform, (name, picked)]
    return [_row(run, name, e) for name, e in named if e is not None]


def _row(run: Run, name: str, e: Evaluation) -> tuple[str, ...]:
    quality, baseline = run.quality, run.baseline("confirm")
    confirmed = baseline if e.origin == "float" else run.confirmed(e)
    score = drop = "not measured"
    milliseconds = ""
    if confirmed is not None:
        score = quality.text(confirmed.quality)
        drop = drop_text(quality, *confirmed.drop_from(baseline, quality)) if baseline and e.origin != "float" else ""
        milliseconds = "" if confirmed.measured_ms is None else f"{confirmed.measured_ms:.3g}"
    sizes = f"{e.average_bits:.2f}", f"{e.average_bits_all:.2f}", f"{e.size_bytes:,}"
    times = [milliseconds] if times_differ(run) else []
    return (name, *sizes, f"{e.loss:.4g}", quality.text(e.quality), score, drop, *times)
