"""The sentences of a report, computed again by hand from the rows that they speak of."""

import dataclasses
import math

import numpy as np

from mpsearch.allocation import Allocation, SearchSpace
from mpsearch.evaluation import Evaluation, SensitivityTable
from mpsearch.layer import LayerSpec
from mpsearch.reporting.findings import overfit_warning, splits_sentence, times_differ, times_sentence, uniform_sentences
from mpsearch.reporting.summary import summary_header, summary_rows
from mpsearch.runs.run import Run
from mpsearch.schemes.integer import Integer

LAYERS = [LayerSpec(name, "linear", (9, 9), 81, name, (name,)) for name in ("a", "b")]
SPACE = SearchSpace.build(LAYERS, {"w2": Integer(2), "w4": Integer(4), "w8": Integer(8)})
MIXED = [SPACE.allocation(choice) for choice in ([0, 1], [1, 2])]


def row(allocation, split, size, loss, quality, n=400, **more):
    scores = {
        "loss": loss,
        "cross_entropy": loss,
        "quality": quality,
        "quality_low": quality - 0.01,
        "quality_high": quality + 0.01,
    }
    sizes = {"size_bytes": size, "average_bits": size / 100, "fraction": 0.1, "feasible": True, "seconds": 0.0, "n_samples": n}
    origin = "sampler" if allocation else "float"
    return Evaluation(0 if split == "search" and allocation else None, origin, allocation, split, **sizes, **scores, **more)


def rows(float_search=0.98, float_confirm=0.97, n_search=400, times=None):
    """Two mixed allocations between the uniform ones. On the search split one dominates w4, on the confirm split it does not."""
    search = {"w2": (300, 0.9, 0.60), "w4": (500, 0.05, 0.95), "w8": (900, 0.001, 0.98)}
    confirm = {"w2": (300, 0.8, 0.61), "w4": (500, 0.05, 0.95), "w8": (900, 0.004, 0.961)}
    found = [
        row(Allocation(), "search", 3600, 0.0, float_search, n_search),
        row(Allocation(), "confirm", 3600, 0.0, float_confirm),
    ]
    for split, table in (("search", search), ("confirm", confirm)):
        found += [row(SPACE.uniform(name), split, *values) for name, values in table.items()]
    found += [row(MIXED[0], "search", 400, 0.04, 0.96), row(MIXED[1], "search", 700, 0.01, 0.975)]
    found += [row(MIXED[0], "confirm", 400, 0.07, 0.94), row(MIXED[1], "confirm", 700, 0.003, 0.965)]
    if times is not None:
        timed = [e for e in found if e.split == "confirm" and e.origin != "float"]
        for e, ms in zip(timed, times, strict=True):
            spread = {
                "measured_ms": ms,
                "measured_ms_low": ms - 0.1,
                "measured_ms_high": ms + 0.2,
                "measured_on": "Z80, 1 threads",
            }
            found[found.index(e)] = dataclasses.replace(e, **spread)
    return found


def result(identity=None, kind="share", **options):
    table = SensitivityTable("kl", "nats", np.ones((2, 3)), SPACE)
    return Run(SPACE, "accuracy", rows(**options), table, {}, {"quality_kind": kind, **(identity or {})})


def test_uniform_allocations_are_dominated_on_the_confirm_split_with_their_accuracy():
    said = uniform_sentences(result())
    assert len(said) == 1, "w4 is dominated on the search split alone, and w2 on neither"
    assert said[0] == (
        "On the confirm split uniform w8 is dominated: at no more bytes a point of the front has a loss of 0.003 instead of "
        "0.004, and accuracy 96.50 % instead of 96.10 %."
    )
    alone = result()
    alone = dataclasses.replace(alone, evaluations=[e for e in alone.evaluations if e.split == "search"])
    assert uniform_sentences(alone) == [
        "On the search split uniform w4 is dominated: at no more bytes a point of the front has a loss of 0.04 instead of "
        "0.05, and accuracy 96.00 % instead of 95.00 %."
    ]


def test_a_model_that_was_trained_on_the_search_data_is_found():
    assert overfit_warning(result()) is None, "98 and 97 % of 400 do not differ significantly"
    warning = overfit_warning(result(float_search=0.998, float_confirm=0.915))
    p, q = (0.998 * 400 + 1) / 402, (0.915 * 400 + 1) / 402
    least = p - q - 1.959964 * math.sqrt(p * (1 - p) / 402 + q * (1 - q) / 402)
    assert f"8.3 points more (95 % interval from {100 * least:.1f})" in warning
    for words in ("search split (accuracy 99.80 %, 400 samples)", "confirm split (91.50 %, 400 samples)", "5 to 13 times"):
        assert words in warning
    assert overfit_warning(result(float_search=0.915, float_confirm=0.998)) is None, "the other way round it is no sign"
    assert overfit_warning(result(kind="perplexity", float_search=4.0, float_confirm=4.3)) is None
    assert "much better" in overfit_warning(result(kind="perplexity", float_search=3.8, float_confirm=4.3))
    assert overfit_warning(result(kind="perplexity", float_search=4.3, float_confirm=3.8)) is None


def test_times_are_shown_where_they_tell_points_apart():
    differing, alike = result(times=[1.0, 2.0, 3.0, 1.5, 2.5]), result(times=[1.0, 1.1, 9.0, 1.1, 1.0])
    assert times_differ(differing)
    assert not times_differ(alike), "0.1 ms between the quartiles of all points, 0.3 between those of one"
    assert "medians of forward passes on Z80, 1 threads; the quartiles of repeated passes are 0.3 ms apart" in times_sentence(
        differing
    )
    assert "Times are left out, for the points' quartiles are only 0.1 ms apart" in times_sentence(alike)
    for run, shown in ((differing, True), (alike, False), (result(), False)):
        header, table = summary_header(run), summary_rows(run, run.front[0])
        assert ("ms" in header) is shown
        assert {len(cells) for cells in table} == {len(header)}
    assert times_sentence(result()) == ""


def test_the_splits_are_called_disjoint_only_after_a_check():
    samples = {"calibration": 500, "search": 400, "confirm": 1200}
    shared = dict.fromkeys(("search in the calibration", "confirm in the calibration", "confirm in the search"), 0)
    said = splits_sentence({"samples": samples, "shared": shared})
    assert said.startswith("The splits are disjoint: no input occurs in two of them (500 calibration, 400 search, 1,200 confirm")
    said = splits_sentence({"samples": samples, "shared": shared | {"confirm in the search": 12}})
    assert "The splits are not disjoint" in said
    assert "12 of the confirm in the search split" in said
    assert "was not checked" in splits_sentence(None)


def test_every_measured_number_of_the_summary_names_its_split():
    header = summary_header(result())
    assert all("search" in name or "confirm" in name for name in header[header.index("bytes") + 1 :])
