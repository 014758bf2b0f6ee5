"""What a whole loss will be, from the first part of it; and when a trial stops."""

import dataclasses

import numpy as np
import pytest

from mpsearch.errors import InputError
from mpsearch.evaluation import Evaluation
from mpsearch.fidelity import FEWEST, UNKNOWN, rungs, stops, whole_losses


def told(losses, first, stopped=False):
    """Evaluations of rising size with these losses, whole and at one rung."""
    blank = Evaluation(0, "sampler", {}, "search", 0, 0, 0, 0, 0, 0, 0, 0, True, 0, 0)
    return [
        dataclasses.replace(blank, loss=loss, size_bytes=i, rung_losses=(at,), stopped=stopped)
        for i, (loss, at) in enumerate(zip(losses, first, strict=True))
    ]


def test_whole_losses_are_read_off_the_trials_measured_whole():
    rng = np.random.default_rng(0)
    first = rng.uniform(-9, 0, 200)
    whole = 0.3 * np.sin(first) + 1.1 * first - 2 + rng.normal(0, 0.1, 200)
    at = np.linspace(-8, -1, 50)
    means, deviations = whole_losses(at, first, whole)
    error = means - (0.3 * np.sin(at) + 1.1 * at - 2)
    assert np.sqrt(np.mean(error**2)) < 0.07
    assert 0.07 < np.median(deviations) < 0.16
    means, deviations = whole_losses(at, first[: FEWEST - 1], first[: FEWEST - 1] - 2)
    np.testing.assert_allclose(means, at - 2)
    assert (deviations == UNKNOWN).all()
    assert whole_losses(at, first[:0], first[:0])[0].tolist() == at.tolist()


def test_a_trial_stops_where_the_front_is_out_of_reach():
    rng = np.random.default_rng(1)
    losses = np.exp(-np.arange(30) / 4)
    first = losses * 3 * np.exp(rng.normal(0, 0.1, 30))
    known = told(losses, first)
    ((n, most),) = stops([2], known, {"size_bytes": 20})
    assert n == 2
    assert 3 * losses[20] * 1.05 < most < 3 * losses[20] * 1.6
    assert stops([2], known[: FEWEST - 1], {"size_bytes": 20}) == [(2, np.inf)], "too few to tell"
    assert stops([2], told(losses, first, stopped=True), {"size_bytes": 20}) == [(2, np.inf)]
    assert stops([], known, {"size_bytes": 20}) == []


def test_where_the_sampler_revisits_all_stop_at_the_first_rung_and_go_on_past_it():
    losses = np.exp(-np.arange(30) / 4)
    known = [dataclasses.replace(e, rung_losses=(3 * e.loss, 2 * e.loss)) for e in told(losses, losses)]
    assert stops([1, 2], known, {"size_bytes": 20}, revisits=True) == [(1, -1.0), (2, np.inf)]
    first, (n, most) = stops([1, 2], known, {"size_bytes": 20}, seen=1, revisits=True)
    assert first == (1, np.inf)
    assert (n, most) == (2, pytest.approx(2 * losses[20]))


def test_rungs_are_whole_batches():
    assert rungs([0.125, 0.25, 0.5], 16) == [2, 4, 8]
    assert rungs([0.125, 0.25, 0.5], 2) == [1]
    assert rungs([0.5], 1) == []
    with pytest.raises(InputError, match="rungs are parts of the search data"):
        rungs([1.0], 8)
