"""Measuring each group alone: each pair once, recorded before the next begins, resumed where it stopped."""

import numpy as np
import pytest

from mpsearch.evaluation import SensitivityTable
from mpsearch.metrics.base import SensitivityMetric
from mpsearch.pipeline.sensitivity import measure_sensitivity


class Numbered(SensitivityMetric):
    """The n-th pair that is measured costs n; every pair is noted when its turn comes."""

    name, unit = "numbered", "turns"

    def __init__(self, log):
        self.log = log

    def measure(self, engine, pairs):
        for n, pair in enumerate(pairs):
            self.log.append(("measured", *pair))
            yield float(n)


@pytest.fixture
def engine(tiny):
    return tiny.engine(tiny.net(), tiny.task(), pin=["second:w2|w8"])


def run(engine, known=None):
    log = []
    table = measure_sensitivity(engine, Numbered(log), known, lambda *row: log.append(("recorded", *row)))
    return table, log


def test_every_allowed_pair_once_in_order(engine):
    table, log = run(engine)
    assert table.metric == "numbered"
    assert table.unit == "turns"
    assert table.values.tolist() == [[0, 1, 2], [3, np.inf, 4], [5, 6, 7]]
    assert np.isinf(table.losses()).tolist() == [[False] * 3, [False, True, False], [False] * 3]
    expected = [("first", s) for s in ("w2", "w4", "w8")] + [("second", "w2"), ("second", "w8")]
    expected += [("last", s) for s in ("w2", "w4", "w8")]
    assert [row[1:3] for row in log if row[0] == "measured"] == expected


def test_each_value_is_recorded_before_the_next_is_measured(engine):
    _, log = run(engine)
    assert [row[0] for row in log] == ["measured", "recorded"] * 8
    assert [row[3] for row in log[1::2]] == list(range(8))


def test_what_is_known_is_not_measured_again(engine):
    known = {("first", "w2"): 10.0, ("last", "w8"): 11.0, ("second", "w2"): 12.0}
    table, log = run(engine, known)
    assert table.values.tolist() == [[10, 0, 1], [12, np.inf, 2], [3, 4, 11]]
    assert not {row[1:3] for row in log} & set(known)
    assert len(log) == 10


def test_where_all_is_known_the_metric_is_not_asked(engine):
    pairs = [(group, scheme) for group, names in zip(engine.space.names, engine.space.choices, strict=True) for scheme in names]
    metric = Numbered([])
    metric.measure = None
    table = measure_sensitivity(engine, metric, dict.fromkeys(pairs, 2.0))
    assert (table.values[engine.space.allowed] == 2.0).all()


def test_losses_forbid_what_may_not_be_taken_even_where_it_was_measured(engine):
    known = {("second", "w4"): 0.5}
    table, _ = run(engine, known)
    assert table.values[1, 1] == 0.5
    assert table.losses()[1, 1] == np.inf


class Joint(Numbered):
    """Knows effects too: of the n-th pair, n and 2 n."""

    def measure_joint(self, engine, pairs, deadline=None):
        self.log.append(("joint",))
        numbers = np.arange(len(pairs), dtype=np.float64)
        return numbers, np.stack([numbers, 2 * numbers]).astype(np.float32)


def joint(engine, known=None, effects=None):
    log = []
    keep = lambda found: log.append(("kept", found.shape))  # noqa: E731
    record = lambda *row: log.append(("recorded", *row))  # noqa: E731
    return measure_sensitivity(engine, Joint(log), known, record, effects=effects, keep=keep), log


def test_effects_come_with_the_values_and_are_kept_first(engine):
    table, log = joint(engine)
    assert table.values.tolist() == [[0, 1, 2], [3, np.inf, 4], [5, 6, 7]]
    assert table.effects[0].tolist() == [[0, 1, 2], [3, 0, 4], [5, 6, 7]]
    assert table.effects[1].tolist() == [[0, 2, 4], [6, 0, 8], [10, 12, 14]]
    assert [row[0] for row in log] == ["joint", "kept"] + ["recorded"] * 8


def test_an_interrupted_run_measures_effects_again_but_keeps_its_values(engine):
    whole, _ = joint(engine)
    again, log = joint(engine, {("first", "w2"): 9.0}, whole.effects)
    assert [row[0] for row in log] == ["joint", "kept"] + ["recorded"] * 7
    assert again.values[0].tolist() == [9, 1, 2]
    done = {(g, s): whole.values[i, j] for i, g in enumerate(engine.space.names) for j, s in enumerate(("w2", "w4", "w8"))}
    table, log = joint(engine, done, whole.effects)
    assert not log
    assert table.effects is whole.effects
    table, log = joint(engine, done)  # their file was lost
    assert [row[0] for row in log] == ["joint", "kept"]


@pytest.mark.parametrize(("worst", "expected"), [(40.0, 400.0), (0.3, 10.0)])
def test_a_scheme_that_breaks_the_model_counts_ten_times_the_worst(tiny, worst, expected):
    """Ten times the largest finite value, at least 10; what a group may not take stays infinite."""
    space = tiny.engine(tiny.net(), tiny.task(), pin=["last:w4|w8"]).space
    values = np.array([[np.inf, 0.2, 0.1], [np.nan, worst, 0.01], [99.0, 0.1, 0.0]])
    losses = SensitivityTable("kl", "nats", values, space).losses()
    assert losses.tolist() == [[expected, 0.2, 0.1], [expected, worst, 0.01], [np.inf, 0.1, 0.0]]
