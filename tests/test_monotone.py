"""Bits that never fall along chains of groups: every promise against enumeration, in spaces small enough for it."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpsearch.monotone import Monotone

BITS = np.array([2.0, 3.0, 4.0, 4.0, 6.0, 8.0])  # two of them weigh the same


@st.composite
def orders(draw):
    """An order of 2 to 6 groups in one or two chains, rising or falling, some choices forbidden; a random generator."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n, m = draw(st.integers(2, 6)), draw(st.integers(2, 6))
    groups, split = rng.permutation(n), int(rng.integers(2, n + 1))
    chains = [sorted(part.tolist(), reverse=bool(rng.integers(2))) for part in (groups[:split], groups[split:]) if len(part) > 1]
    bits = np.tile(BITS[:m], (n, 1))
    forbidden = rng.random(bits.shape) < draw(st.sampled_from([0, 0.3]))
    forbidden[np.arange(n), rng.integers(0, m, n)] = False
    return Monotone(chains, np.where(forbidden, np.inf, bits)), rng


def kept(order):
    """[n, n_groups]: all allocations that keep the order, one by one."""
    every = itertools.product(*(np.flatnonzero(row) for row in order.allowed))
    pairs = [pair for chain in order.chains for pair in itertools.pairwise(chain)]
    return [c for c in every if all(order.level[a, c[a]] <= order.level[b, c[b]] for a, b in pairs)]


def narrowed(order):
    """The order without the choices that no allocation has; None where there is no allocation."""
    consistent = order.consistent()
    if not consistent.any(1).all():
        return None
    return Monotone(order.chains, np.where(consistent, order.level, np.inf).astype(float))


SOME = orders().map(lambda case: (narrowed(case[0]), case[1])).filter(lambda case: case[0])  # that some allocation keeps


def total(table, choice):
    return table[np.arange(len(table)), choice].sum(-1)


@settings(max_examples=150, deadline=None)
@given(orders())
def test_every_allocation_in_order_is_counted_and_listed(case):
    order, _ = case
    every = kept(order)
    assert order.count == len(every)
    assert [tuple(choice) for choice in order.every()] == every
    if every:
        np.testing.assert_array_equal(order.consistent(), [[c in column for c in range(order.level.shape[1])] for column in
                                                           map(set, zip(*every, strict=True))])  # fmt: skip
        assert order.holds(np.array(every)).all()
    else:
        assert narrowed(order) is None
    product = np.array(list(itertools.product(*(np.flatnonzero(row) for row in order.allowed))))
    assert order.holds(product).sum() == len(every)


@settings(max_examples=150, deadline=None)
@given(SOME)
def test_the_least_total_is_found(case):
    order, rng = case
    every = order.every()
    tables = rng.normal(size=(3, *order.level.shape)) * 10.0 ** rng.integers(-9, 9, (3, 1, 1))
    further = (rng.random(tables.shape) < 0.2) & ~np.eye(order.level.shape[1], dtype=bool)[every[rng.integers(len(every))]]
    tables[further] = np.inf  # forbidden for this once, but one allocation is left
    found = order.argmin(tables)
    assert order.holds(found).all()
    for table, choice in zip(tables, found, strict=True):
        best = total(table, every).min()
        assert total(table, choice) == pytest.approx(best, rel=1e-9, abs=1e-12 * np.abs(table[np.isfinite(table)]).sum())


@settings(max_examples=150, deadline=None)
@given(SOME)
def test_the_nearest_takes_the_fewest_steps(case):
    order, rng = case
    every = order.every()
    scores = np.where(order.allowed, rng.random((20, *order.level.shape)), 0)
    choices = scores.argmax(2)
    found = order.nearest(choices)
    assert order.holds(found).all()
    groups = np.arange(len(order.level))
    for choice, near in zip(choices, found, strict=True):
        level = order.level[groups, choice]
        steps, fewest = np.abs(order.level[groups, near] - level).sum(), np.abs(order.level[groups, every] - level).sum(1).min()
        assert steps == fewest
        np.testing.assert_array_equal(near, order.nearest(choice))
        if fewest == 0:
            np.testing.assert_array_equal(near, choice)


@settings(max_examples=150, deadline=None)
@given(SOME)
def test_a_move_pushes_what_stands_in_its_way(case):
    order, rng = case
    every, groups = order.every(), np.arange(len(order.level))
    center = every[rng.integers(len(every))]
    losses, table = rng.random(order.level.shape), rng.random(order.level.shape)
    order = order.preferring(losses)
    added = order.pushing(center, np.stack([table, losses]))
    alone = order.free(center)
    for group, to in np.argwhere(order.allowed):
        moved = center.copy()
        moved[group] = to
        assert alone[group, to] == order.holds(moved)
        near = order.nearest(moved[None], center)[0]
        possible = any(choice[group] == to for choice in every)
        assert possible, "no choice is left that no allocation has"
        assert order.level[group, near[group]] == order.level[group, to], "what was moved stays where it was moved to"
        level, before = order.level[groups, every], order.level[groups, center]
        others = [np.abs(a - before).sum() for a, choice in zip(level, every, strict=True) if choice[group] == to]
        assert np.abs(order.level[groups, near] - before).sum() == min(others)
        if np.isfinite(added[0, group, to]):
            pushed = order.pushed(center, group, to)
            assert order.holds(pushed)
            assert pushed[group] == to
            assert total(table, pushed) - total(table, center) == pytest.approx(added[0, group, to])
            assert total(losses, pushed) - total(losses, center) == pytest.approx(added[1, group, to])
    assert np.isfinite(added).all() or not order.allowed.all(), "only what is forbidden bars a move"


def test_of_equal_bits_the_one_of_less_loss_follows():
    order = Monotone([[0, 1, 2]], np.tile(BITS, (3, 1)))
    for best in (2, 3):
        loss = np.zeros((3, 6))
        loss[:, 5 - best] = 1  # of the columns 2 and 3, both of 4 bits
        assert order.preferring(loss).pushed(np.zeros(3, dtype=np.intp), 0, 2).tolist() == [2, best, best]


def test_without_chains_there_is_no_order():
    order = Monotone([], np.tile(BITS, (3, 1)))
    assert not order
    choices = np.random.default_rng(0).integers(0, 6, (9, 3))
    assert order.holds(choices).all()
    np.testing.assert_array_equal(order.nearest(choices), choices)
    table = np.random.default_rng(1).normal(size=(3, 6))
    np.testing.assert_array_equal(order.argmin(table), table.argmin(1))
    np.testing.assert_array_equal(order.pushing(choices[0], table), table - table[np.arange(3), choices[0]][:, None])
    assert order.count == 6**3


def test_ten_thousand_groups_are_no_obstacle():
    """Generous: some 2 ms the optimum, 0.1 s the nearest of a hundred, on one core of 2024."""
    rng = np.random.default_rng(0)
    order = Monotone([range(6000), range(9999, 5999, -1)], np.tile(np.arange(1, 9.0), (10_000, 1)))
    table, choices = rng.normal(size=(10_000, 8)), rng.integers(0, 8, (30, 10_000))
    start = time.process_time()
    best, near = order.argmin(table), order.nearest(choices)
    assert time.process_time() - start < 2
    assert order.holds(best)
    assert order.holds(near).all()
    assert total(table, best) <= total(table, near).min()
