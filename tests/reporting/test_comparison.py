"""Runs compared: the table is computed again by hand, and runs of other data are refused."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from synthetic import resnet, run_of

from mpsearch.errors import InputError
from mpsearch.evaluation import FINETUNED
from mpsearch.pipeline.compare import names
from mpsearch.reporting.comparison import at_equal_bytes, compare, series_of

MORE = {"data_sha256": "a"}


@pytest.fixture(scope="module")
def runs():
    return {name: run_of(resnet()[:8], n=60, seed=seed, identity=MORE) for name, seed in (("front", 0), ("ilp", 1))}


def test_the_table_has_the_best_point_of_each_run_at_equal_bytes(runs):
    series = [s for name, run in runs.items() for s in series_of(name, run)]
    assert [s.name for s in series] == ["front", "ilp"]
    table = at_equal_bytes(series)
    assert set(table.series) == {"front", "ilp"}
    for row in table.itertuples():
        run = runs[row.series]
        shown = {e.allocation for e in (*run.front, *(e for _, e in run.uniform))}
        fitting = [e for a, e in run.on("confirm").items() if a in shown and e.size_bytes <= row.bytes]
        best = min(fitting, key=lambda e: e.loss)
        assert (row.loss, row.size_bytes, row.point) == (best.loss, best.size_bytes, best.allocation.id)
        assert row.drop == pytest.approx(run.baseline("confirm").quality - best.quality)
        assert row.drop_low <= row.drop <= row.drop_high
    assert (np.diff(table.bytes.unique()) > 0).all()


def test_trained_points_are_a_series_of_their_own(runs):
    run = runs["front"]
    trained = [replace(e, trial=None, origin=FINETUNED, loss=e.loss / 2) for e in run.on("confirm").values()]
    assert [s.name for s in series_of("a", replace(run, evaluations=[*run.evaluations, *trained]))] == ["a", "a trained"]


def test_the_comparison_is_written(runs, tmp_path):
    page = compare(runs, tmp_path / "new")
    text = page.read_text()
    table = pd.read_csv(page.with_name("comparison.csv"))
    assert len(table) == 2 * table.bytes.nunique()
    assert text.count("| **") + text.count(" **") >= table.bytes.nunique()
    assert "paired with the float model" in text
    assert {path.name for path in page.parent.iterdir()} == {"comparison.md", "comparison.csv"} | {
        f"comparison.{suffix}" for suffix in ("png", "svg", "pdf")
    }
    svg = page.with_name("comparison.svg").read_text()
    assert "front" in svg
    assert "ilp" in svg


def test_what_cannot_be_compared_is_said(runs, tmp_path):
    other = run_of(resnet()[:8], n=30, identity={"data_sha256": "b"})
    with pytest.raises(InputError, match="another data sha256"):
        compare({"a": runs["front"], "b": other}, tmp_path)
    alone = run_of(resnet()[:8], n=30, confirmed=0, identity=MORE)
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
