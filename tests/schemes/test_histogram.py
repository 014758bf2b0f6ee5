"""The histogram of a layer's input: the same whatever the batches, bounded, and true to the values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpsearch.schemes.histogram import N_BINS, Histogram

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def same(a, b):
    return (a.exponent, a.first, a.n_zeros, a.low, a.high) == (b.exponent, b.first, b.n_zeros, b.low, b.high) and torch.equal(
        a.counts, b.counts
    )


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(FLOATS, min_size=1, max_size=6), min_size=1, max_size=5), st.randoms())
def test_it_is_the_same_whatever_the_batches(batches, random):
    whole = Histogram.from_values(torch.tensor([value for batch in batches for value in batch]))
    parts = [Histogram.from_values(torch.tensor(batch)) for batch in batches]
    random.shuffle(parts)
    merged = parts[0]
    for part in parts[1:]:
        merged = Histogram.merged([merged, part])
    assert same(merged, whole)
    assert same(Histogram.merged(parts), whole)


@settings(max_examples=150, deadline=None)
@given(st.lists(FLOATS, min_size=1, max_size=20))
def test_every_value_is_in_its_bin(values):
    x = torch.tensor(values)
    found = Histogram.from_values(x)
    assert len(found.counts) <= N_BINS
    assert int(found.counts.sum()) + found.n_zeros == len(x)
    assert found.n_zeros == int((x == 0).sum())
    assert (found.low, found.high) == (min(x.min().item(), 0.0), max(x.max().item(), 0.0))
    for value in x[x.abs() >= found.width].double():
        held = (found.starts.abs() <= value.abs()) & (value.abs() < found.edges.abs()) & (found.edges.sign() == value.sign())
        assert found.counts[held].tolist() != []
        assert found.counts[held].min() > 0


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_it_is_fine_enough(scale):
    """At least half the bins are in use, for one sign or both."""
    torch.manual_seed(0)
    for x in (torch.rand(1000), -torch.rand(1000), torch.rand(1000) - 0.3):
        assert N_BINS / 2 <= len(Histogram.from_values(scale * x).counts) <= N_BINS


def test_half_precision_and_nothing():
    x = torch.tensor([0.5, -1.25, 0.0])
    assert same(Histogram.from_values(x.half()), Histogram.from_values(x))
    zeros = Histogram.from_values(torch.zeros(3, 4))
    assert (zeros.n_zeros, zeros.low, zeros.high, zeros.counts.tolist()) == (12, 0.0, 0.0, [0])
    assert Histogram.from_values(torch.zeros(0)).n_zeros == 0
