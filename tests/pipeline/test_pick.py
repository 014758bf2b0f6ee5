"""Which point of a front is picked, and the error messages where there is none."""

import dataclasses

import numpy as np
import pytest

from mpsearch.allocation import Allocation, SearchSpace
from mpsearch.errors import InputError
from mpsearch.evaluation import Evaluation, SensitivityTable
from mpsearch.layer import LayerSpec
from mpsearch.pipeline.pick import pick
from mpsearch.runs.run import Run
from mpsearch.schemes.integer import Integer

SPACE = SearchSpace.build([LayerSpec("a", "linear", (9, 9), 81, "a", ("a",))], {f"s{i}": Integer(4, i + 1) for i in range(6)})


def point(i, size_bytes, loss, quality, **values):
    fixed = {"origin": "sampler", "split": "search", "feasible": True, "n_samples": 10, "seconds": 0.0, "fraction": 0.1}
    scores = {"loss": loss, "cross_entropy": loss, "quality": quality, "quality_low": quality, "quality_high": quality}
    sizes = {"size_bytes": size_bytes, "average_bits": size_bytes / 1000}
    return Evaluation(trial=i, allocation=SPACE.allocation([i]), **{**fixed, **scores, **sizes, **values})


# Only the largest point keeps within half a point of the float model. 5,000 bytes lie beyond the budget.
FLOAT = dataclasses.replace(point(0, 32000, 0.0, 0.951), trial=None, origin="float", allocation=Allocation())
POINTS = [
    point(0, 1000, 1.0, 0.60),
    point(1, 2000, 1e-3, 0.90),
    point(2, 3000, 3e-4, 0.92),
    point(3, 4000, 1e-4, 0.95),
    point(4, 5000, 1e-5, 0.99, feasible=False),
    point(5, 3500, 0.5, 0.99),
]


def result(*confirmed):
    table = SensitivityTable("kl", "nats", np.ones((1, 6)), SPACE)
    return Run(SPACE, "accuracy", [FLOAT, *POINTS[::-1], *confirmed], table)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ({}, 4000),
        ({"max_bytes": 1000}, 1000),
        ({"max_bytes": "3.4kB"}, 3000),
        ({"max_bytes": "1GB"}, 4000),
        ({"bits": 2.0}, 2000),
        ({"bits": 2.999}, 2000),
        ({"min_quality": 0.0}, 1000),
        ({"min_quality": 0.9}, 2000),
        ({"min_quality": 0.93}, 4000),
        ({"max_bytes": 3500, "bits": 2.5}, 2000),
        ({"max_bytes": 2500, "bits": "3.5"}, 2000),
        ({"max_bytes": 3500, "min_quality": 0.85}, 2000),
    ],
    ids=str,
)
def test_the_point_that_is_picked(limit, expected):
    found = pick(result(), **limit)
    assert found.size_bytes == expected
    assert found.split == "search"


def test_accuracy_is_that_of_the_confirm_split_where_it_was_measured():
    confirmed = [dataclasses.replace(e, split="confirm", trial=None, quality=e.quality - 0.03) for e in POINTS]
    assert pick(result(*confirmed), min_quality=0.9).size_bytes == 4000
    assert pick(result(), min_quality=0.9).size_bytes < 4000
    assert pick(result(*confirmed[2:4]), min_quality=0.6).size_bytes == 3000, "of the confirmed points"
    with pytest.raises(InputError, match=r"on the confirm split; the best has 0.8700"):
        pick(result(*confirmed[:2]), min_quality=0.9)


def test_milliseconds_are_those_that_were_measured():
    timed = [dataclasses.replace(e, split="confirm", trial=None, measured_ms=10.0 - i) for i, e in enumerate(POINTS)]
    assert pick(result(*timed), max_ms=8.5).size_bytes == 4000
    assert pick(result(*timed), max_ms=8.5, max_bytes=3000).size_bytes == 3000
    with pytest.raises(InputError, match="has at most 6 ms; the least is 7 ms"):
        pick(result(*timed), max_ms=6)
    assert pick(result(*timed[2:3]), max_ms=8.5).size_bytes == 3000, "of the timed points"
    with pytest.raises(InputError, match="No point that fits was timed"):
        pick(result(), max_ms=8.5)


def test_the_front_of_another_objective():
    slow = [dataclasses.replace(e, costs={"latency_ms": 10.0 - i}) for i, e in enumerate(POINTS)]
    table = SensitivityTable("kl", "nats", np.ones((1, 6)), SPACE)
    found = Run(SPACE, "accuracy", slow, table, objectives=["latency_ms"], costs=["latency_ms"])
    assert [e.size_bytes for e in found.front] == [3500, 4000], "of lower latency, or of lower loss"
    assert pick(found, max_bytes=3999).size_bytes == 3500


@pytest.mark.parametrize(
    ("limit", "sentence"),
    [
        ({"max_bytes": 999}, r"No point of the front has at most 999 bytes; the least is 1,000 bytes"),
        ({"bits": 0.5}, r"at most 0.5 bits; the least is 1 bits"),
        ({"min_quality": 0.96}, r"has accuracy >= 0.96 on the search split; the best has 0.9500"),
        ({"max_bytes": "big"}, "'big' is not a size"),
        (
            {"max_bytes": 3000, "min_quality": 0.95},
            r"has accuracy >= 0.95 on the search split; the best has 0.9200",
        ),
        ({"max_bytes": 1500, "bits": 0.9}, r"at most 0.9 bits; the least is 1 bits"),
        ({"max_drop": 0.01, "min_quality": 0.9}, "one of pick.max_drop, pick.min_quality and pick.max_quality"),
        ({"max_quality": 3}, "higher is better: give pick.min_quality, not pick.max_quality"),
        ({"point": "abc"}, "No allocation of this run has the id 'abc'"),
        ({"point": "abc", "bits": 3}, "pick.point names one point; got 1 more"),
        ({"bits": "few"}, "pick.bits must be a number; got 'few'"),
        ({"min_quality": [1]}, r"pick.min_quality must be a number; got '\[1\]'"),
    ],
)
def test_what_cannot_be_picked_is_said(limit, sentence):
    with pytest.raises(InputError, match=sentence):
        pick(result(), **limit)


def test_an_empty_front_is_said():
    table = SensitivityTable("kl", "nats", np.ones((1, 6)), SPACE)
    with pytest.raises(InputError, match="no point to pick yet"):
        pick(Run(SPACE, "accuracy", POINTS[4:5], table))


def test_any_measured_allocation_has_an_id():
    ids = {e.allocation.id for e in POINTS}
    assert len(ids) == len(POINTS)
    for e in POINTS:  # those beyond the budget and those that are dominated, too
        assert pick(result(), point=e.allocation.id).allocation == e.allocation
