"""Runs compared: the tables are computed again by hand, and runs of other data are refused."""

import io
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from synthetic import resnet, run_of

from mpsearch.errors import InputError
from mpsearch.evaluation import FINETUNED, REFINED, Score
from mpsearch.intervals import paired_interval
from mpsearch.pipeline.compare import names
from mpsearch.reporting.comparison import Compared, at_equal_bytes, compare, series_of
from mpsearch.runs.samples import FOLDER, SampleFiles
from mpsearch.runs.verified import Verified

MORE = {"data_sha256": "a"}


@pytest.fixture(scope="module")
def runs():
    made = {name: run_of(resnet()[:8], n=60, seed=seed, identity=MORE) for name, seed in (("front", 0), ("ilp", 1))}
    return {name: Compared(run) for name, run in made.items()}


def with_samples(compared, folder, seed, n=400):
    """The run with files of samples whose means are those that the run recorded."""
    rng, files = np.random.default_rng(seed), SampleFiles(folder)
    folder.mkdir()
    shared = np.random.default_rng(7).normal(size=n)
    for e in compared.run.on("confirm").values():
        values = [mean + 0.01 * (x - x.mean()) for mean in (e.quality, e.loss) for x in [shared + 0.1 * rng.normal(size=n)]]
        qualities, losses = (x.astype(np.float32) for x in values)
        files.write(e.allocation, e.origin, Score(e.loss, 0, e.quality, 0, 0, 0, n, qualities, losses=losses))
    return replace(compared, files=files)


def test_the_table_has_the_best_point_of_each_run_at_equal_bytes(runs):
    series = [s for name, run in runs.items() for s in series_of(name, run)]
    assert [s.name for s in series] == ["front", "ilp"]
    table = at_equal_bytes(series)
    assert set(table.series) == {"front", "ilp"}
    for row in table.itertuples():
        run = runs[row.series].run
        searched = run.on("search")
        shown = {e.allocation for e in (*run.front, *(e for _, e in run.uniform))}
        fitting = [e for a, e in run.on("confirm").items() if a in shown and e.size_bytes <= row.bytes]
        best = min(fitting, key=lambda e: searched[e.allocation].loss)
        assert (row.loss, row.size_bytes, row.point) == (best.loss, best.size_bytes, best.allocation.id)
        assert row.drop == pytest.approx(run.baseline("confirm").quality - best.quality)
        assert row.drop_low <= row.drop <= row.drop_high
    assert (np.diff(table.bytes.unique()) > 0).all()


def staged(compared):
    """The run with refined and trained evaluations of each confirmed point, of which every one is better than before."""
    later = [
        replace(e, trial=None, origin=origin, loss=e.loss / divisor)
        for origin, divisor in ((REFINED, 2), (FINETUNED, 4))
        for split in ("search", "confirm")
        for a, e in compared.run.on(split).items()
        if a in compared.run.on("confirm")
    ]
    return replace(compared, run=replace(compared.run, evaluations=[*compared.run.evaluations, *later]))


def test_refined_unrefined_and_trained_points_are_series_of_their_own(runs):
    series = list(series_of("a", staged(runs["front"])))
    assert [s.name for s in series] == ["a refined", "a unrefined", "a trained"]
    allocation = series[0].points[0].allocation
    losses = [next(e.loss for e in s.points if e.allocation == allocation) for s in series]
    assert losses == pytest.approx([losses[0], 2 * losses[0], losses[0] / 2])


def test_one_trained_point_has_one_row(runs):
    compared, trained = runs["front"], runs["front"].run.front[len(runs["front"].run.front) // 2].allocation
    later = [replace(compared.run.on(split)[trained], trial=None, origin=FINETUNED) for split in ("search", "confirm")]
    compared = replace(compared, run=replace(compared.run, evaluations=[*compared.run.evaluations, *later]))
    table = at_equal_bytes(list(series_of("a", compared)))
    assert table[table.series == "a trained"].point.tolist() == [trained.id]


def test_a_point_is_chosen_by_its_search_loss_and_not_by_what_is_reported(runs):
    compared = runs["front"]
    worst = max(compared.run.on("confirm").values(), key=lambda e: e.size_bytes)
    rows = [replace(e, loss=100.0) if e == worst else e for e in compared.run.evaluations]
    (series,) = series_of("a", replace(compared, run=replace(compared.run, evaluations=rows)))
    chosen = series.best(worst.size_bytes)
    assert chosen.allocation == worst.allocation
    assert chosen.loss == 100.0


def test_differences_are_paired_where_both_runs_kept_their_samples(runs, tmp_path):
    pairs = {name: with_samples(runs[name], tmp_path / name, seed) for seed, name in enumerate(runs)}
    series = [s for name, compared in pairs.items() for s in series_of(name, compared)]
    table = at_equal_bytes(series)
    first, other = (table[table.series == name].set_index("bytes") for name in pairs)
    assert first.loss_difference.isna().all()
    by_id = {(name, e.allocation.id): e for name, c in pairs.items() for e in c.run.on("confirm").values()}
    for size, row in other.iterrows():
        if row.point == first.loc[size].point:
            continue
        points = by_id["ilp", row.point], by_id["front", first.loc[size].point]
        (own, losses), (reference, others) = (pairs[n].samples(e) for n, e in zip(("ilp", "front"), points, strict=True))
        assert row.loss_difference == pytest.approx(points[0].loss - points[1].loss)
        assert (row.loss_difference_low, row.loss_difference_high) == pytest.approx(paired_interval(losses, others))
        low, high = paired_interval(own, reference)
        assert row.drop_difference == pytest.approx(points[1].quality - points[0].quality, abs=1e-6)
        assert (row.drop_difference_low, row.drop_difference_high) == pytest.approx((-high, -low))
        assert row.drop_difference_high - row.drop_difference_low < 0.25 * (row.drop_high - row.drop_low), "shared noise cancels"
    text = compare(pairs, tmp_path / "new").read_text()
    assert "worse than `front`" in text
    assert "Intervals are paired" in text
    assert "not paired" not in text


def test_the_same_weights_have_no_difference(runs, tmp_path):
    compared = with_samples(runs["front"], tmp_path / "front", 0)
    pairs = {"a": compared, "b": replace(compared)}
    table = at_equal_bytes([s for name, compared in pairs.items() for s in series_of(name, compared)])
    ends = [f"{what}_difference{end}" for what in ("loss", "drop") for end in ("", "_low", "_high")]
    assert (table[table.series == "b"][ends] == 0).all(axis=None)
    assert "0 (same outputs)" in compare(pairs, tmp_path / "new").read_text()


def test_damaged_or_missing_samples_leave_no_paired_interval_and_are_named(runs, tmp_path):
    pairs = {name: with_samples(runs[name], tmp_path / name, seed) for seed, name in enumerate(runs)}
    point = next(iter(runs["ilp"].run.on("confirm").values()))
    file, quality = pairs["ilp"].files.path(point.allocation, point.origin), runs["ilp"].run.quality
    content = file.read_bytes()
    assert pairs["ilp"].samples(point) is not None
    pickled = io.BytesIO()
    np.save(pickled, np.array([{}], dtype=object), allow_pickle=True)
    for damaged in (b"", content[:-1], content[:40] + b"\x00" + content[41:], content + content, pickled.getvalue()):
        file.write_bytes(damaged)
        assert pairs["ilp"].files.read(point, quality) is None
    file.write_bytes(content)
    assert pairs["ilp"].files.read(replace(point, loss=point.loss * 1.01), quality) is None, "of another evaluation"
    for path in (tmp_path / "ilp" / FOLDER).iterdir():
        path.unlink()
    text = compare(pairs, tmp_path / "new").read_text()
    assert "(not paired)" in text
    assert f"no readable samples of the point in its folder `{FOLDER}/`" in text
    assert "loss_difference_low" not in pd.read_csv(tmp_path / "new" / "comparison.csv")


def test_files_in_their_runtimes_are_series_of_their_own(runs, tmp_path):
    point = runs["ilp"].run.front[2]
    scores = {"loss": 0.02, "packed_loss": 0.02, "quality": 0.9, "quality_low": 0.89, "quality_high": 0.91, "n_samples": 400}
    times = {"ms": 1.5, "ms_low": 1.4, "ms_high": 1.6, "float_ms": 2.0, "packed_ms": 1.8, "measured_on": "a test"}
    rows = [
        Verified("onnx", "onnxruntime", point.allocation.id, False, size, **scores, **times) for size in (1, point.size_bytes)
    ]
    page = compare({**runs, "ilp": replace(runs["ilp"], verified=rows)}, tmp_path)
    text = page.read_text()
    assert text.count("ilp in onnxruntime (onnx)") == 1, "of a file the latest row"
    assert f"| {point.size_bytes:,} | 90.00 (89.00 to 91.00) | 0.02 | 1.5 (a test) |" in text
    assert "ilp in onnxruntime (onnx)" in page.with_name("comparison.svg").read_text()


def test_the_comparison_is_written(runs, tmp_path):
    page = compare({**runs, "ilp": staged(runs["ilp"])}, tmp_path / "new")
    text = page.read_text()
    table = pd.read_csv(page.with_name("comparison.csv"))
    assert set(table.series) == {"front", "ilp refined", "ilp unrefined", "ilp trained"}
    assert text.count("**") >= 2 * table.bytes.nunique(), "the least loss at each size"
    assert {path.name for path in page.parent.iterdir()} == {"comparison.md", "comparison.csv"} | {
        f"comparison.{suffix}" for suffix in ("png", "svg", "pdf")
    }
    svg = page.with_name("comparison.svg").read_text()
    for name in set(table.series):
        assert name in svg


def test_what_cannot_be_compared_is_said(runs, tmp_path):
    other = Compared(run_of(resnet()[:8], n=30, identity={"data_sha256": "b"}))
    with pytest.raises(InputError, match="another data sha256"):
        compare({"a": runs["front"], "b": other}, tmp_path)
    alone = Compared(run_of(resnet()[:8], n=30, confirmed=0, identity=MORE))
    with pytest.raises(InputError, match="Got 0 confirmed fronts"):
        compare({"a": alone, "b": alone}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_runs_of_a_sweep_are_named_by_what_differs(tmp_path):
    settings = [
        {"sampler": {"_target_": "a.b.TPE", "n": 3}, "seed": 0, "scheme": ["w2"]},
        {"sampler": {"_target_": "a.b.Ilp"}, "seed": 1, "scheme": ["w2"]},
    ]
    numbered, named = [tmp_path / "0", tmp_path / "1"], [tmp_path / "a", tmp_path / "b"]
    assert names(numbered, settings) == ["sampler TPE, seed 0", "sampler Ilp, seed 1"]
    assert names(numbered, settings[:1] * 2) == ["#0", "#1"]
    assert names(named, settings) == ["a", "b"]
