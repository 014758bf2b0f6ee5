"""The data of the page as JSON: what the scripts draw. Every text in it is shown as text, never read as HTML."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mpsearch.allocation import SearchSpace
from mpsearch.errors import run_option
from mpsearch.evaluation import Evaluation
from mpsearch.reporting.answer import Recommendation, answer, drop_of, recommendations, savings, size_text
from mpsearch.reporting.curves import hypervolume_curve, interactions, kendall, predicted_losses, searched, strongest
from mpsearch.reporting.findings import budget_positions, cautions, score_text, splits_sentence, times_differ, times_sentence
from mpsearch.reporting.layer_map import layer_sections
from mpsearch.reporting.summary import next_steps
from mpsearch.reporting.tables import evenly
from mpsearch.reporting.verified import verified_rows
from mpsearch.runs.left_out import read_left_out
from mpsearch.runs.run import Run
from mpsearch.runs.verified import Verified

MAX_ALLOCATED = (
    400_000  # groups x points whose allocations are in the page; of a longer front the confirmed ones and an even part
)
MAX_BROWSED = 3_000  # evaluations drawn one by one; with more, an even part
PARTS = {"codes": "codes", "values": "float values", "scales": "scales", "zero_points": "zero points"}


def content(
    run: Run,
    picked: Evaluation,
    folder: Path,
    confirmed: pd.DataFrame | None,
    verified: Sequence[Verified] = (),
    phases: Sequence[Any] = (),
) -> dict[str, Any]:
    """All that the page shows of a run, JSON-able.

    Parameters
    ----------
    run, picked
        The run and the point that the page begins with.
    folder
        The run's folder, which the commands name.
    confirmed
        The table of `confirm.csv`, where there is one.
    verified
        The rows of `verified.csv`.
    phases
        `mpsearch.progress.Phase`: how long each part took.
    """
    quality, advice = run.quality, recommendations(run, picked)
    points = _points(run, picked, advice)
    at = {e.allocation: i for i, e in enumerate(points)}
    return {
        "model": run.identity.get("model_name", "Model"),
        "task": run.identity.get("task_name", "its task"),
        "answer": answer(run, picked),
        "running": bool(phases) and not phases[-1].finished,
        "quality": {"label": quality.label, "scale": quality.scale, "sign": quality.sign, "drop": quality.drop_label},
        "loss": run.loss_label,
        "objectives": list(run.objectives),
        "budgets": {column: budget_positions(run, column) for column in ("size_bytes", *run.objectives)},
        "baselines": {s: {"quality": number(e.quality), "n": e.n_samples} for s, e in run.baselines.items()},
        "recommendations": [
            {"purpose": r.purpose, "point": at[r.point.allocation], "certain": r.certain, "cells": _cells(run, r.point)}
            for r in advice
        ],
        "savings": [[s.what, s.before, s.after, s.source] for s in savings(run, picked, verified)],
        "points": _described(run, points, picked, confirmed),
        "allocations": _allocations(run, points, picked),
        "picked": at[picked.allocation],
        "command": _commands(run, picked, folder),
        **_space(run.space),
        "tried": _tried(run),
        "sensitivity": _sensitivity(run),
        "predicted": _predicted(run),
        "hypervolume": _hypervolume(run),
        "interactions": _interactions(run, picked),
        "splits": _splits(run),
        "phases": [[p.what, p.done, p.total, number(p.seconds), p.finished, p.peak_bytes] for p in phases],
        "warnings": [*cautions(run), *read_left_out(folder)],
        "times": times_sentence(run).strip() if times_differ(run) else "",
        "verified": dict(zip(("header", "rows"), verified_rows(run, verified), strict=True)),
    }


def number(value: float | None, digits: int = 4) -> float | None:
    """A number with so many significant digits; `None` for what JSON has no number for."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.{digits}g}")


def numbers(values: Iterable[float], digits: int = 4) -> list[float | None]:
    """The same of many."""
    return [number(float(value), digits) for value in values]


def _points(run: Run, picked: Evaluation, advice: Sequence[Recommendation]) -> list[Evaluation]:
    """The front, the uniform allocations, the picked point and the recommended ones, once each, smallest first."""
    known = {e.allocation: e for e in (*run.front, *(e for _, e in run.uniform))}
    known.setdefault(picked.allocation, picked)
    for each in advice:
        known.setdefault(each.point.allocation, each.point)
    return sorted(known.values(), key=lambda e: (e.size_bytes, e.loss))


def _described(
    run: Run, points: Sequence[Evaluation], picked: Evaluation, confirmed: pd.DataFrame | None
) -> list[dict[str, Any]]:
    """Each point with its scores on every split, and the texts that are shown of it."""
    uniform, front = {x.allocation: scheme for scheme, x in run.uniform}, {e.allocation for e in run.front}
    measured = {"search": run.on("search"), "confirm": run.on("confirm"), "trained": run.finetuned("confirm")}
    baselines, notes = run.baselines, {} if confirmed is None else _notes(confirmed)
    described = []
    for e in points:
        splits = {split: x for split, table in measured.items() if (x := table.get(e.allocation)) is not None}
        described.append(
            {
                "id": e.allocation.id,
                "bytes": e.size_bytes,
                "bits": number(e.average_bits, 5),
                "costs": {column: number(e.cost(column)) for column in run.objectives},
                "front": e.allocation in front,
                "uniform": uniform.get(e.allocation),
                "picked": e.allocation == picked.allocation,
                "scores": {split: _score(x) for split, x in splits.items()},
                "facts": _facts(run, e, splits, baselines),
                "notes": notes.get(e.allocation.to_json(), []),
            }
        )
    return described


def _score(e: Evaluation) -> dict[str, Any]:
    ends = {"quality": e.quality, "low": e.quality_low, "high": e.quality_high, "loss": e.loss, "ms": e.measured_ms}
    return {name: number(value, 5) for name, value in ends.items()}


def _facts(
    run: Run, e: Evaluation, splits: Mapping[str, Evaluation], baselines: Mapping[str, Evaluation]
) -> list[tuple[str, str]]:
    """What is shown of a point, as (label, text)."""
    quality = run.quality
    facts = [("bits per weight", f"{e.average_bits:.3f} ({e.average_bits_all:.3f} of all parameters)")]
    facts.append(("size", f"{e.size_bytes:,} bytes, {100 * e.fraction:.1f} % of float32"))
    facts += [(column.replace("_", " "), f"{value:.4g}") for column, value in e.costs.items()]
    for split, measured in splits.items():
        where, baseline = ("confirm, trained", "confirm") if split == "trained" else (split, split)
        facts.append((f"loss, {where}", f"{measured.loss:.4g}"))
        facts.append((f"{quality.name}, {where}", score_text(quality, measured)))
        if baseline in baselines:  # the interval is that of the paired difference; about the quality it may exceed 100 %
            drop, low, high = (quality.difference(x) for x in measured.drop_from(baselines[baseline], quality))
            facts.append((f"{quality.drop_word}, {where}", f"{drop}{quality.drop_unit} (95 %: {low} to {high})"))
        if measured.measured_ms is not None:
            spread = f"{measured.measured_ms_low:.3g} to {measured.measured_ms_high:.3g}"
            facts.append(("forward pass", f"{measured.measured_ms:.3g} ms (quartiles {spread})"))
    return facts


def _notes(confirmed: pd.DataFrame) -> dict[str, list[str]]:
    """Allocation, as JSON -> what the confirm split says of a point of the front."""
    said: dict[str, list[str]] = {}
    for row in confirmed[confirmed.scheme == ""].itertuples():
        notes = said.setdefault(row.allocation, ["not inferior"] if row.non_inferior == "yes" else [])
        if not pd.isna(row.dominated_by_bytes):
            significantly = "significantly dominated" if row.significantly_dominated else "dominated in loss"
            notes.append(f"{significantly} on the confirm split by a point of {int(row.dominated_by_bytes):,} bytes")
    return said


def _cells(run: Run, e: Evaluation) -> list[str]:
    return [size_text(e.size_bytes), f"{e.average_bits:.2f}", f"{100 * e.fraction:.1f} %", *drop_of(run, e)]


def _allocations(run: Run, points: Sequence[Evaluation], picked: Evaluation) -> list[str | None]:
    """A character per group of each point, an index into the schemes; `None` where there are too many for a page."""
    most = max(MAX_ALLOCATED // max(len(run.space.names), 1), 8)
    kept = set(evenly(len(points), most))
    if len(points) > most:
        confirmed, uniform = run.on("confirm"), {e.allocation for _, e in run.uniform}
        wanted = [i for i, e in enumerate(points) if e.allocation in confirmed or e.allocation in uniform]
        kept |= {*wanted[:most], *(i for i, e in enumerate(points) if e.allocation == picked.allocation)}
    return [run.space.encode(e.allocation) if i in kept else None for i, e in enumerate(points)]


def _commands(run: Run, picked: Evaluation, folder: Path) -> list[dict[str, str]]:
    """The commands that go on from a point: what stands before and after its id."""
    commands = []
    export, *others = next_steps(run, picked, folder)
    verify = f"verify it in its runtime: mpsearch verify {run_option(folder)} pick.point={picked.allocation.id}"
    for step in [export, verify, *others]:
        purpose, _, command = step.partition(": ")
        before, point_id, after = command.partition(picked.allocation.id)
        commands.append({"purpose": purpose, "before": before, "after": after, "id": point_id and "yes"})
    return commands


def _space(space: SearchSpace) -> dict[str, Any]:
    """The groups, the schemes, the bits of each pair by kind of tensor, and where each layer stands on the map."""
    parts: dict[str, np.ndarray] = {}
    for i, group in enumerate(space.groups):
        for j, scheme in enumerate(space.schemes.values()):
            for layer in group.layers:
                for name, (dtype, shape) in scheme.layout(layer.shape).items():
                    table = parts.setdefault(PARTS.get(name, name.replace("_", " ")), np.zeros(space.allowed.shape, np.int64))
                    table[i, j] += dtype.itemsize * math.prod(shape)
    index = {group.name: i for i, group in enumerate(space.groups)}
    sections = layer_sections([layer.name for layer in space.layers])
    cells = [[[row, column, i] for i, (row, column) in s.cells.items()] for s in sections]
    return {
        "schemes": [
            {"name": name, "bits": scheme.weight_bits, "about": scheme.describe()} for name, scheme in space.schemes.items()
        ],
        "layers": [
            [x.name, index[x.group], x.kind, "\N{MULTIPLICATION SIGN}".join(map(str, x.shape)), x.numel] for x in space.layers
        ],
        "groups": [[g.name, g.numel] for g in space.groups],
        "storage": [[int(bits) for bits in row] for row in space.storage_bits],
        "parts": {name: [[int(n) for n in row] for row in table] for name, table in parts.items()},
        "other_bytes": space.other_bits / 8,
        "float_bytes": space.size_bits() / 8,
        "sections": [
            {"title": s.title, "rows": s.rows, "columns": s.columns, "cells": c} for s, c in zip(sections, cells, strict=True)
        ],
    }


def _tried(run: Run) -> dict[str, Any]:
    measured = searched(run)
    total = len(measured)
    measured = [measured[i] for i in evenly(total, MAX_BROWSED)]
    scores = {name: numbers([getattr(e, name) for e in measured], 5) for name in ("loss", "quality")}
    costs = {column: numbers([e.cost(column) for e in measured], 7) for column in ("average_bits", *run.objectives)}
    return {"total": total, "size_bytes": [e.size_bytes for e in measured], **costs, **scores}


def _sensitivity(run: Run) -> dict[str, Any]:
    table = run.sensitivity
    values = np.where(run.space.allowed, table.values, np.nan)
    return {"label": f"{table.metric} ({table.unit})", "values": [numbers(row, 3) for row in values]}


def _predicted(run: Run) -> dict[str, Any]:
    predicted, measured = predicted_losses(run)
    return {"predicted": numbers(predicted), "measured": numbers(measured), "tau": number(kendall(predicted, measured), 3)}


def _hypervolume(run: Run) -> dict[str, Any] | None:
    curve = hypervolume_curve(run)
    if curve is None:
        return None
    return {"evaluations": curve.evaluations.tolist(), "seconds": numbers(curve.seconds), "volumes": numbers(curve.volumes)}


def _interactions(run: Run, picked: Evaluation) -> dict[str, Any] | None:
    """The groups with the strongest interactions, and the matrix of theirs; `None` where none carries over."""
    matrix = interactions(run.sensitivity, picked)
    if matrix is None:
        return None
    part = strongest(matrix)
    values = [numbers(row, 2) for row in part.to_numpy()]
    return {"names": list(map(str, part.index)), "values": values, "total": len(matrix)}


def _splits(run: Run) -> dict[str, Any]:
    identity, quality = run.identity, run.quality
    rows = []
    for split, about in identity.get("data", {}).items():
        baseline = run.baselines.get(split)
        rows.append([split, about, "" if baseline is None else score_text(quality, baseline)])
    said = splits_sentence(identity["overlap"]).replace("**", "") if "overlap" in identity else ""
    return {"rows": rows, "sentence": said}
