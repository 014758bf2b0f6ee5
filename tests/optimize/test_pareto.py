"""Pareto maths against the slow versions, and by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mpsearch.errors import InputError
from mpsearch.optimize.pareto import hypervolume, nearest_front, non_dominated

coordinates = st.integers(0, 5).map(float) | st.sampled_from([np.inf, -np.inf, 0.5])


def slow_non_dominated(points):
    mask = []
    for i, p in enumerate(points):
        dominated = any((q <= p).all() and (q < p).any() for q in points)
        repeated = any((q == p).all() for q in points[:i])
        mask.append(not dominated and not repeated)
    return mask


@given(st.integers(1, 4).flatmap(lambda k: arrays(np.float64, st.tuples(st.integers(0, 12), st.just(k)), elements=coordinates)))
def test_non_dominated_equals_the_slow_version(points):
    assert non_dominated(points).tolist() == slow_non_dominated(points)


def test_of_identical_points_the_first_is_kept():
    assert non_dominated([[2, 1], [1, 2], [1, 2], [2, 1], [3, 3]]).tolist() == [True, True, False, False, False]
    assert non_dominated([[1, 2, 3], [1, 2, 3]]).tolist() == [True, False]
    assert non_dominated(np.empty((0, 2))).tolist() == []


def test_hypervolume_by_hand():
    assert hypervolume([4], [0.01], 8, 1) == pytest.approx(4 * 2)
    # bits 2..4 at one decade, 4..8 at two
    assert hypervolume([4, 2], [0.01, 0.1], 8, 1) == pytest.approx(2 * 1 + 4 * 2)
    assert hypervolume([4, 2, 5, 4], [0.01, 0.1, 0.02, 0.01], 8, 1) == pytest.approx(10)  # dominated, repeated


def test_hypervolume_floors_the_kl_and_ignores_what_lies_beyond_the_reference():
    assert (
        hypervolume([4], [0.0], 8, 1) == hypervolume([4], [1e-9], 8, 1) == hypervolume([4], [-1e-3], 8, 1) == pytest.approx(4 * 9)
    )
    assert hypervolume([8, 9, 3, 3], [0.1, 1e-3, 1.0, np.inf], 8, 1) == 0
    assert hypervolume([], [], 8, 1) == 0
    assert hypervolume([4], [1e-10], 8, 1e-9) == 0


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(-10, 2)), max_size=8))
def test_hypervolume_counts_the_cells_of_a_grid(points):
    bits, decades = np.array(points, dtype=float).reshape(-1, 2).T
    cells = sum(
        any(b <= x and max(d, -9) <= y for b, d in zip(bits, decades, strict=True)) for x in range(8) for y in range(-9, 1)
    )
    assert hypervolume(bits, 10.0**decades, 8, 10) == pytest.approx(cells)


def test_nan_is_refused():
    for call in (
        lambda: non_dominated([[0, np.nan]]),
        lambda: hypervolume([4, np.nan], [0.1, 0.1], 8, 1),
        lambda: hypervolume([4], [np.nan], 8, 1),
        lambda: hypervolume([4], [0.1], 8, np.nan),
    ):
        with pytest.raises(InputError, match="NaN"):
            call()
    with pytest.raises(ValueError, match="must be"):
        non_dominated([1, 2])
    with pytest.raises(ValueError, match="alike"):
        hypervolume([1, 2], [1], 8, 1)


def test_those_nearest_the_front_are_kept_in_their_order():
    costs, losses = [4, 1, 2, 3, 5], [1.0, 5.0, 6.5, 3.0, 1.5]
    assert nearest_front(costs, losses, 3).tolist() == [0, 1, 3]
    assert nearest_front(costs, losses, 4).tolist() == [0, 1, 3, 4]
    assert nearest_front(costs, losses, 5).tolist() == list(range(5))
