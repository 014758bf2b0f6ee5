"""`mpsearch export`: write a picked point."""

from __future__ import annotations

from pathlib import Path

from mpsearch.commands.prepare import Build, Settings, build_schemes, prepare
from mpsearch.commands.report import redraw
from mpsearch.commands.show import relative, summary
from mpsearch.equalization import recorded
from mpsearch.errors import InputError, run_option
from mpsearch.evaluation_rows import SCORED
from mpsearch.exporters.base import Picked
from mpsearch.finetune import restored
from mpsearch.pick import pick
from mpsearch.result import RunFolder, SearchResult


def export(settings: Settings, build: Build, folder: Path) -> None:
    """Write the picked point; the path of what was written is the last line printed."""
    if "n_trials" not in settings:
        raise InputError("This folder holds a sensitivity table alone; there is no point to export. Run: mpsearch search.")
    result = SearchResult.load(folder, build_schemes(settings, build))
    picked = pick(result, **settings["pick"])
    trained = [result.finetuned(split).get(picked.allocation) for split in SCORED]
    if settings["finetuned"] and trained[0] is None:
        raise InputError(f"This point was not trained. Run: mpsearch finetune {run_option(folder)} with the same pick.")
    exporter = build("exporter")
    prepared = prepare(settings, build, recorded(folder))
    RunFolder(folder).identify(prepared.identity(settings))
    engine, scored = prepared.engine(settings, folder), picked
    scores = {split: e for split in SCORED if (e := result.on(split).get(picked.allocation)) is not None}
    if settings["finetuned"] and trained[0] is not None:
        scored, scores = trained[0], {e.split: e for e in trained if e is not None}
        engine = restored(engine, scored.allocation, scored.loss, folder / "finetuned")
    before = prepared.model_sha256, prepared.folds, prepared.equalization
    what = Picked(scored, scores, result.baselines, result.quality_name, *before, result.budgets.get("bytes"))
    path = exporter.export(what, engine, folder)
    result, _, _ = redraw(folder, lambda _: picked, result.space.schemes)
    summary(result, scored, settings["pick"]["max_drop"])
    print(relative(path))
