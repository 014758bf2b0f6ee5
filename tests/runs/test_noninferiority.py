"""The smallest non-inferior point: the sequence, what decides it, and what too few samples leave undecided."""

import dataclasses
import math

import numpy as np
import pytest

from mpsearch.allocation import Allocation, SearchSpace
from mpsearch.errors import InputError
from mpsearch.evaluation import Evaluation, SensitivityTable
from mpsearch.intervals import proportion_interval
from mpsearch.layer import LayerSpec
from mpsearch.pipeline.pick import pick
from mpsearch.quality import Quality
from mpsearch.reporting.findings import non_inferior_sentence
from mpsearch.runs.noninferiority import needed, smallest_non_inferior
from mpsearch.runs.run import Run
from mpsearch.schemes.integer import Integer

N = 6
SPACE = SearchSpace.build([LayerSpec("a", "linear", (9, 9), 81, "a", ("a",))], {f"s{i}": Integer(2 + i) for i in range(N)})
TABLE = SensitivityTable("kl", "nats", np.ones((1, N)), SPACE)


def row(allocation, split, origin, quality, low, high, n, i):
    sizes = {"size_bytes": 1000 * (i + 1), "average_bits": 2.0 + i, "fraction": 0.1, "feasible": True, "seconds": 0.0}
    scores = {"loss": 0.0 if origin == "float" else 10.0**-i, "cross_entropy": 0.0}
    trial = i if split == "search" and origin == "sampler" else None
    return Evaluation(
        trial, origin, allocation, split, quality=quality, quality_low=low, quality_high=high, n_samples=n, **sizes, **scores
    )


def result(pairs, n, kind="share", max_drop=None, confirmed=True):
    """A front of points with (gained, lost) samples of `n` each, smallest first; the float model is right on half of them.

    On the search split no quality changes at all: what that split would say of a drop is nothing.
    """
    rows = [row(Allocation(), split, "float", 0.5, 0.5, 0.5, n, 31) for split in ("search", "confirm")]
    for i, (gained, lost) in enumerate(pairs):
        low, high = proportion_interval(gained, lost, n)
        rows.append(row(SPACE.allocation([i]), "search", "sampler", 0.5, 0.49, 0.51, n, i))
        if confirmed:
            quality = 0.5 + (gained - lost) / n
            rows.append(row(SPACE.allocation([i]), "confirm", "sampler", quality, 0.5 + low, 0.5 + high, n, i))
    identity = {"quality_kind": kind} | ({} if max_drop is None else {"max_drop": max_drop})
    return Run(SPACE, "accuracy", rows, TABLE, {}, identity)


def unconfirmed(run, *sizes):
    """The run without the confirm evaluations of these sizes."""
    return dataclasses.replace(run, evaluations=[e for e in run.evaluations if e.split == "search" or e.size_bytes not in sizes])


def size(found):
    return found.point.size_bytes


def test_points_are_tested_from_the_largest_down_until_one_fails():
    """The smallest point has by chance no drop; the one above it drops clearly: no significance test may name the smallest."""
    run = result([(0, 0), (10, 300), (5, 20), (4, 10), (3, 6), (2, 2)], 5000)
    highs = [-proportion_interval(b, c, 5000)[0] for b, c in [(0, 0), (10, 300), (5, 20), (4, 10), (3, 6), (2, 2)]]
    assert [high <= 0.005 for high in highs] == [True, False, False, True, True, True]
    found = smallest_non_inferior(run, 0.005)
    assert (size(found), found.decided, found.split, len(found.tested), found.n_needed) == (4000, True, "confirm", 4, None)
    assert found.drop == pytest.approx(6 / 5000)
    assert found.drop_high == pytest.approx(highs[3])
    assert size(smallest_non_inferior(run, 0.0055)) == 3000, "the upper limit of 15 net losses is 0.0051"
    assert pick(run).size_bytes == 4000, "the default pick"
    said = non_inferior_sentence(run, found)
    for words in (
        "not inferior to the float model by more than 0.50 points",
        "5.00 bits (4,000 bytes)",
        "confirm split decided",
    ):
        assert words in said
    assert "4 of 6 points were tested" in said


def test_the_margin_of_a_run_is_the_default():
    assert result([], 10).max_drop == 0.005
    assert result([], 10, "perplexity").max_drop == 0.01
    run = result([(0, 20), (0, 6), (0, 0)], 400, max_drop=0.02)
    assert pick(run).size_bytes == 3000
    assert proportion_interval(0, 0, 400)[1] < 0.02 < -proportion_interval(0, 6, 400)[0]


def test_400_samples_cannot_decide_on_half_a_point():
    run = result([(0, 30), (0, 4), (1, 2), (0, 1), (0, 0)], 400)
    found = smallest_non_inferior(run, 0.005)
    assert not found.decided
    assert found.within
    assert size(found) == 3000, "its estimated drop is 0.0025, that of the next one 0.01"
    expected = 400 * ((-proportion_interval(1, 2, 400)[0] - 0.0025) / 0.0025) ** 2
    assert found.n_needed == pytest.approx(expected, abs=1)
    said = non_inferior_sentence(run, found)
    for words in (
        "Undecided",
        "the 400 samples of the confirm split",
        "0.25 points",
        f"about {found.n_needed:,} samples would",
    ):
        assert words in said
    assert pick(run).size_bytes == 3000


def test_how_many_samples_would_decide():
    share = Quality()
    assert needed(share, 0.005, 0.0, proportion_interval(0, 0, 400)[1], 400) >= 765
    n = needed(share, 0.005, 0.0, proportion_interval(0, 0, 400)[1], 400)
    assert proportion_interval(0, 0, n)[1] <= 0.005
    assert needed(share, 0.005, 0.006, 0.02, 400) is None
    assert needed(Quality("p", "perplexity"), 0.01, 0.005, 0.025, 50) == math.ceil(50 * 16)
    assert needed(Quality("p", "perplexity"), 0.01, 0.005, math.inf, 50) is None


def test_where_even_the_largest_point_drops_by_more_it_is_said():
    run = result([(0, 60), (0, 50), (0, 40)], 400)
    found = smallest_non_inferior(run, 0.005)
    assert (size(found), found.decided, found.within, found.n_needed) == (3000, False, False, None)
    assert "already has an estimated drop of 10.00 points" in non_inferior_sentence(run, found)
    assert pick(run).size_bytes == 3000
    with pytest.raises(InputError, match=r"drop of at most 0\.50 points: on the confirm split the largest one has 10\.00 points"):
        pick(run, max_drop=0.005)


def test_without_confirmation_the_search_split_is_named():
    run = result([(0, 60), (0, 1)], 400, confirmed=False)
    found = smallest_non_inferior(run, 0.005)
    assert (found.split, found.decided, size(found)) == ("search", False, 1000)
    assert "the front is not confirmed" in non_inferior_sentence(run, found)
    assert "on the search split" in non_inferior_sentence(run, found)


def test_a_perplexity_s_margin_is_relative():
    run = result([], 40, "perplexity")
    rows = [row(Allocation(), split, "float", 4.0, 4.0, 4.0, 40, 31) for split in ("search", "confirm")]
    for i, (ppl, low, high) in enumerate([(4.5, 4.4, 4.6), (4.03, 4.01, 4.05), (4.02, 4.00, 4.038), (4.001, 3.99, 4.01)]):
        rows += [row(SPACE.allocation([i]), split, "sampler", ppl, low, high, 40, i) for split in ("search", "confirm")]
    found = smallest_non_inferior(dataclasses.replace(run, evaluations=rows), 0.01)
    assert (size(found), found.decided) == (3000, True)
    assert (found.drop, found.drop_high) == pytest.approx((0.005, 0.0095))
    sentence = non_inferior_sentence(dataclasses.replace(run, evaluations=rows, quality_name="perplexity"), found)
    assert "rise of 0.50 % (95 % interval 0.00 to 0.95)" in sentence


def test_a_limit_leaves_a_shorter_sequence():
    run = result([(0, 0), (10, 300), (5, 20), (4, 10), (3, 6), (2, 2)], 5000)
    assert pick(run, max_drop=0.005, max_bytes=1000).size_bytes == 1000
    assert pick(run, max_drop=0.005, max_bytes=5000).size_bytes == 4000
    assert pick(run, max_drop=0.05).size_bytes == 3000 - 1000 * (-proportion_interval(10, 300, 5000)[0] <= 0.05)


@pytest.mark.parametrize("max_drop", [-0.1, math.inf])
def test_a_margin_that_is_none_is_refused(max_drop):
    with pytest.raises(InputError, match=r"pick\.max_drop is 0 or more; got"):
        pick(result([(0, 0)], 400), max_drop=max_drop)


def test_the_sequence_consists_of_the_confirmed_points():
    """A point that was not selected for confirmation is passed over, and cannot be the answer."""
    run = result([(0, 0), (10, 300), (5, 20), (4, 10), (3, 6), (2, 2)], 5000)
    found = smallest_non_inferior(unconfirmed(run, 4000, 5000), 0.005)
    assert (size(found), found.decided, [e.size_bytes for e in found.tested]) == (6000, True, [6000, 3000])
    assert found.n_points == 4
    assert "2 of 4 points were tested" in non_inferior_sentence(run, found)
    found = smallest_non_inferior(unconfirmed(run, *range(1000, 7000, 1000)), 0.005)
    assert (found.split, found.tested, found.n_points) == ("search", (), 6)
    assert smallest_non_inferior(run, 0.005, split="search").split == "search"


def test_a_quality_that_was_asked_for_is_looked_up_among_the_confirmed_points():
    run = result([(0, 0), (10, 300), (5, 20), (4, 10), (3, 6), (2, 2)], 5000)
    assert pick(run, min_quality=0.499).size_bytes == 1000
    assert pick(unconfirmed(run, 1000), min_quality=0.499).size_bytes == 5000
    with pytest.raises(InputError, match="confirm split"):
        pick(unconfirmed(run, 1000), min_quality=0.6)
