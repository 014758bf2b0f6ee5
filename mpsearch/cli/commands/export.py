"""`mpsearch export`: write a picked point."""

from __future__ import annotations

import functools
from pathlib import Path

from mpsearch.cli.commands.report import redraw
from mpsearch.cli.show import relative, summary
from mpsearch.errors import InputError, run_option
from mpsearch.evaluation import Evaluation
from mpsearch.exporters.base import Exporter, Picked, publish
from mpsearch.graph.channel_scaling import recorded
from mpsearch.pipeline.pick import pick
from mpsearch.pipeline.prepare import Build, Settings, build_schemes, prepare
from mpsearch.pipeline.verify import Source, TooLarge, check_loss, check_size, staging
from mpsearch.pipeline.without_data import absent_data, without_data
from mpsearch.runs.evaluation_rows import SCORED
from mpsearch.runs.run import Run, RunFolder
from mpsearch.training.finetune import restored


def export(settings: Settings, build: Build, folder: Path) -> None:
    """Write the picked point; the path of what was written is the last line printed.

    The files are written aside, loaded and scored again, and moved into `folder` only then: an earlier export there stays usable
    whatever fails. With their headers (JSON descriptions aside) they fit pick.max_bytes, or else the run's budget.bytes, which
    limits tensors alone while it searches; with pick.max_bytes the next smaller point is taken where headers make them too large.
    """
    if "n_trials" not in settings:
        raise InputError("This folder holds a sensitivity table alone; there is no point to export. Run: mpsearch search.")
    result = Run.load(folder, build_schemes(settings, build))
    picked = pick(result, **settings["pick"])
    trained = [result.finetuned(split).get(picked.allocation) for split in SCORED]
    if settings["finetuned"] and trained[0] is None:
        raise InputError(f"This point was not trained. Run: mpsearch finetune {run_option(folder)} with the same pick.")
    exporter: Exporter = build("exporter")
    absent = absent_data(settings)
    if absent is None:
        source = _with_data(settings, build, folder, trained[0] if settings["finetuned"] else None)
    elif settings["finetuned"]:
        raise InputError(f"{absent} does not exist, and a trained point is exported with the task's data only. Restore them.")
    else:
        source = without_data(settings, build, folder, result, absent)
    with staging(folder) as inside:
        while True:
            scores = {split: e for split in SCORED if (e := result.on(split).get(picked.allocation)) is not None}
            if settings["finetuned"]:
                scores = {e.split: e for e in trained if e is not None}
            scored = scores["search"]
            before = source.model_sha256, source.folds, source.equalization
            what = Picked(scored, scores, result.baselines, result.quality_name, *before)
            path = exporter.export(what, source.weights, inside)
            try:
                check_size(path, picked, settings["pick"], result)
                break
            except TooLarge as error:
                picked = _smaller(picked, result, settings, error)
        source.check(exporter, path, scored)
        path = publish(path, folder)
    result, _, _ = redraw(folder, lambda _: picked, result.space.schemes)
    summary(result, scored, settings["pick"].get("max_drop"))
    print(relative(path))


def _with_data(settings: Settings, build: Build, folder: Path, trained: Evaluation | None) -> Source:
    prepared = prepare(settings, build, recorded(folder))
    RunFolder(folder).identify(prepared.identity(settings))
    engine = prepared.engine(settings, folder)
    if trained is not None:
        engine = restored(engine, trained.allocation, trained.loss, folder / "finetuned")
    check = functools.partial(check_loss, prepared, engine)
    return Source(engine, prepared.model_sha256, prepared.folds, prepared.equalization, check)


def _smaller(picked: Evaluation, result: Run, settings: Settings, error: TooLarge) -> Evaluation:
    """The next smaller point, where one was asked for by its size; `error`, with what to do, where none was or there is none."""
    if settings["finetuned"] or settings["pick"].get("max_bytes") is None:
        raise InputError(
            f"{error} Give that limit as pick.max_bytes: the largest point whose files fit is exported then; or a larger one."
        ) from error
    if picked.size_bytes <= min(e.size_bytes for e in result.front):
        raise InputError(f"{error} It is the smallest of the front. Raise the limit, or search with smaller schemes.") from error
    smaller = pick(result, **{**settings["pick"], "max_bytes": picked.size_bytes - 1})
    print(f"{error} The next smaller point, of {smaller.size_bytes:,} bytes, is taken.")
    return smaller
