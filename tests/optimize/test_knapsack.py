"""The knapsack against scipy's milp as referee, and against enumeration where the space is tiny."""

import itertools
import os
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import eye, kron

from mpsearch.errors import InputError
from mpsearch.optimize import knapsack

KINDS = ["layers", "noisy", "random", "ties", "milliseconds", "uniform"]


def instance(n_groups: int, n_choices: int, kind: str, seed: int = 0):
    """Losses and costs as a search meets them: layers of a network, falling fourfold per bit, and less friendly variants."""
    rng = np.random.default_rng(seed)
    bits = np.array([2, 3, 4, 5, 6, 8, 16][:n_choices])
    numel = 576 * rng.integers(1, 64, n_groups) * rng.integers(1, 64, n_groups)
    cost = numel[:, None] * bits + (numel[:, None] // 64) * 16
    loss = np.exp(rng.normal(0, 1.5, n_groups))[:, None] * 4.0**-bits
    if kind == "noisy":
        loss = loss + rng.normal(0, 1e-4, loss.shape)  # also negative, not monotone
    elif kind == "random":
        loss, cost = rng.normal(size=loss.shape), rng.integers(1, 10**6, loss.shape)
    elif kind == "ties":
        cost = 1000 * rng.integers(1, 20, n_groups)[:, None] * bits
    elif kind == "milliseconds":
        cost = cost * 1e-6 * rng.random(cost.shape).cumsum(1)
    elif kind == "uniform":
        cost = np.tile(589_824 * bits, (n_groups, 1))
    if kind in ("random", "ties"):
        loss[rng.random(loss.shape) < 0.2] = np.inf
        loss[: n_groups // 10, 1:] = np.inf  # one choice only
        loss[:, 0] = np.where(np.isfinite(loss).any(1), loss[:, 0], 1.0)
    return loss, cost


def between(loss, cost, share: float) -> float:
    allowed = np.isfinite(loss)
    low, high = np.where(allowed, cost, np.inf).min(1).sum(), np.where(allowed, cost, -np.inf).max(1).sum()
    return low + share * (high - low)


def referee(loss, cost, limit: float):
    """The optimum by HiGHS, which prints from C on some instances: stdout is silenced round it."""
    n_groups, n_choices = loss.shape
    allowed = np.isfinite(loss).ravel()
    one_each = kron(eye(n_groups), np.ones((1, n_choices)))
    scale = cost.max()
    stdout, null = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    try:
        result = milp(
            np.where(allowed, loss.ravel(), 0.0),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(cost.reshape(1, -1) / scale, -np.inf, limit / scale)],
            integrality=np.ones(loss.size),
            bounds=Bounds(0, allowed.astype(float)),
            options={"mip_rel_gap": 0, "time_limit": 20},
        )
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(null)
    return result.x.reshape(loss.shape).argmax(1)


def enumerated(loss, costs):
    """Every allowed allocation [n, n_groups], its total loss [n], its total costs [n, n_budgets]."""
    rows = np.arange(len(loss))
    every = np.array(list(itertools.product(*(np.flatnonzero(np.isfinite(row)) for row in loss))))
    return every, loss[rows, every].sum(1), np.stack([cost[rows, every].sum(1) for cost in costs], axis=1)


@st.composite
def tiny(draw, n_budgets: int = 1):
    n_groups, n_choices = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    loss = rng.integers(-3, 6, (n_groups, n_choices)) / 2 if draw(st.booleans()) else rng.normal(size=(n_groups, n_choices))
    forbidden = rng.random(loss.shape) < 0.2
    forbidden[np.arange(n_groups), rng.integers(0, n_choices, n_groups)] = False
    loss = np.where(forbidden, np.inf, loss)
    costs = [
        rng.integers(0, 9, loss.shape) if whole else rng.random(loss.shape)
        for whole in draw(st.lists(st.booleans(), min_size=n_budgets, max_size=n_budgets))
    ]
    return loss, costs, rng


@pytest.mark.parametrize(("n_groups", "n_choices"), [(20, 6), (54, 7), (224, 7)])
@pytest.mark.parametrize("kind", KINDS)
def test_solve_finds_the_optimum_of_the_referee(kind, n_groups, n_choices):
    loss, cost = instance(n_groups, n_choices, kind)
    for share in (0.05, 0.3):
        limit = between(loss, cost, share)
        ours, theirs = knapsack.solve(loss, cost, limit), referee(loss, cost, limit)
        assert ours.dtype == np.intp
        assert knapsack.total(cost, ours) <= limit
        if knapsack.total(cost, theirs) <= limit:  # HiGHS rounds
            assert knapsack.total(loss, ours) <= knapsack.total(loss, theirs) + 1e-9


@settings(max_examples=300, deadline=None)
@given(tiny())
def test_solve_equals_enumeration(case):
    loss, (cost,), rng = case
    _, losses, costs = enumerated(loss, [cost])
    for limit in [*rng.choice(costs[:, 0], 3), costs.max() + 1]:
        choice = knapsack.solve(loss, cost, limit)
        best = losses[costs[:, 0] <= limit].min()
        assert knapsack.total(cost, choice) <= limit
        assert knapsack.total(loss, choice) == pytest.approx(best, abs=1e-9)
    with pytest.raises(InputError, match="cheapest allocation"):
        knapsack.solve(loss, cost, costs.min() - 1e-3)


def test_beyond_the_states_the_gap_is_known():
    """Subset sums: every state is on the convex hull, so nothing is pruned; the limit itself bounds the loss."""
    cost = 2 * np.random.default_rng(0).integers(10**5, 10**6, (100, 7))
    loss = -1e-6 * cost
    limit = between(loss, cost, 0.5) // 2 * 2 + 1
    choice = knapsack.solve(loss, cost, limit, max_states=1000)
    assert knapsack.total(cost, choice) <= limit
    gap = knapsack.total(loss, choice) + 1e-6 * limit
    assert 0 < gap < 1e-3 * abs(knapsack.total(loss, choice))


@pytest.mark.parametrize("kind", KINDS)
def test_front_spans_the_costs_and_is_not_dominated(kind):
    loss, cost = instance(20, 6, kind)
    points = knapsack.front(loss, cost, 50)
    spent, lost = ([knapsack.total(table, point) for point in points] for table in (cost, loss))
    assert 10 < len(points) <= 50
    assert all(a < b for a, b in itertools.pairwise(spent))
    assert all(a > b for a, b in itertools.pairwise(lost))
    assert spent[0] == pytest.approx(np.where(np.isfinite(loss), cost, np.inf).min(1).sum())
    assert lost[-1] == pytest.approx(loss.min(1).sum())
    for point in points[1:-1:7]:
        np.testing.assert_array_equal(point, knapsack.solve(loss, cost, knapsack.total(cost, point)))


@pytest.mark.parametrize("kind", KINDS)
def test_vertices_are_optimal_for_their_own_cost(kind):
    loss, cost = instance(20, 6, kind)
    points = knapsack.vertices(loss, cost, 40)
    spent, lost = ([knapsack.total(table, point) for point in points] for table in (cost, loss))
    assert 10 < len(points) <= 40
    assert all(a < b for a, b in itertools.pairwise(spent))
    assert all(a > b for a, b in itertools.pairwise(lost))
    for own_cost, own_loss in list(zip(spent, lost, strict=True))[::5]:
        assert own_loss == pytest.approx(knapsack.total(loss, knapsack.solve(loss, cost, own_cost)))


def test_front_of_no_choice_is_one_point():
    assert [point.tolist() for point in knapsack.front(np.ones((3, 1)), np.ones((3, 1)), 5)] == [[0, 0, 0]]
    with pytest.raises(ValueError, match="two ends"):
        knapsack.front(np.ones((3, 1)), np.ones((3, 1)), 1)


def test_the_same_question_gets_the_same_answer():
    loss, cost = instance(54, 7, "ties")
    limit = between(loss, cost, 0.3)
    np.testing.assert_array_equal(knapsack.solve(loss, cost, limit), knapsack.solve(loss.copy(), cost.copy(), limit))
    np.testing.assert_array_equal(knapsack.front(loss, cost, 9), knapsack.front(loss.copy(), cost.copy(), 9))


@settings(max_examples=300, deadline=None)
@pytest.mark.parametrize("n_budgets", [1, 2, 3])
@given(data=st.data())
def test_repair_gets_under_every_budget_that_can_be_met(n_budgets, data):
    loss, tables, rng = data.draw(tiny(n_budgets))
    every, _, costs = enumerated(loss, tables)
    choice = every[rng.integers(len(every))]
    limits = [float(rng.choice(column)) for column in costs.T]
    if not (costs <= limits).all(1).any():
        with pytest.raises(InputError):
            knapsack.repair(choice, loss, tables, limits)
        return
    before = choice.copy()
    repaired = knapsack.repair(choice, loss, tables, limits)
    np.testing.assert_array_equal(choice, before)
    spent = [knapsack.total(table, repaired) for table in tables]
    assert all(total <= limit for total, limit in zip(spent, limits, strict=True))
    assert np.isfinite(knapsack.total(loss, repaired))
    if all(knapsack.total(table, choice) <= limit for table, limit in zip(tables, limits, strict=True)):
        np.testing.assert_array_equal(repaired, choice)


def test_repair_takes_the_move_that_adds_least_loss_per_cost():
    cost = np.array([[2, 4, 8], [2, 4, 8], [2, 4, 8]])
    loss = np.array([[0.9, 0.1, 0.0], [0.9, 0.4, 0.0], [0.9, 0.8, 0.0]])
    assert knapsack.repair([2, 2, 2], loss, [cost], [20]).tolist() == [1, 2, 2]
    assert knapsack.repair([2, 2, 2], loss, [cost], [16]).tolist() == [1, 1, 2]
    assert knapsack.repair([2, 2, 2], loss, [cost], [15]).tolist() == [1, 1, 0]  # 0.9 for 6 beats 0.8 for 4
    assert knapsack.repair([2, 2, 2], loss, [], []).tolist() == [2, 2, 2]


def test_repair_saves_most_first_where_the_losses_say_nothing():
    cost = np.array([[1, 2, 3], [10, 20, 30]])
    assert knapsack.repair([2, 2], np.zeros((2, 3)), [cost], [20]).tolist() == [2, 0]


def test_repair_leaves_a_choice_that_is_not_allowed_first():
    cost, loss = np.array([[1, 2, 3], [1, 2, 3]]), np.array([[0.5, 0.1, np.inf], [0.5, 0.1, 0.0]])
    assert knapsack.repair([2, 2], loss, [cost], [5]).tolist() == [1, 2]


def test_repair_where_budgets_pull_against_one_another():
    size, latency = np.array([[1, 4], [1, 4]]), np.array([[4, 1], [4, 1]])
    repaired = knapsack.repair([0, 0], np.zeros((2, 2)), [size, latency], [5, 5])
    assert sorted(repaired.tolist()) == [0, 1]
    third = np.array([[1, 9], [1, 9]])
    assert sorted(knapsack.repair([0, 0], np.zeros((2, 2)), [size, latency, third], [5, 5, np.inf]).tolist()) == [0, 1]
    with pytest.raises(InputError, match="together"):
        knapsack.repair([0, 0], np.zeros((2, 2)), [size, latency], [4, 4])


@pytest.mark.parametrize("kind", KINDS)
def test_repair_at_scale(kind):
    loss, cost = instance(2000, 7, kind)
    limits = [between(loss, cost, 0.1), between(loss, np.sqrt(cost), 0.2)]
    rng = np.random.default_rng(1)
    choice = np.array([rng.choice(np.flatnonzero(np.isfinite(row))) for row in loss])
    repaired = knapsack.repair(choice, loss, [cost, np.sqrt(cost)], limits)
    assert knapsack.total(cost, repaired) <= limits[0]
    assert knapsack.total(np.sqrt(cost), repaired) <= limits[1]


def test_bad_input_is_refused():
    loss, cost = np.ones((2, 2)), np.ones((2, 2))
    with pytest.raises(InputError, match="not a number"):
        knapsack.solve(np.full((2, 2), np.nan), cost, 9)
    with pytest.raises(InputError, match="Group 1 has no choice"):
        knapsack.solve([[1.0, 1.0], [np.inf, np.inf]], cost, 9)
    with pytest.raises(ValueError, match="alike"):
        knapsack.solve(loss, np.ones((2, 3)), 9)


def test_proposals_are_cheap():
    """Generous: some 1 ms, 2 ms and 0.5 ms on one core of 2024."""
    for n_groups, n_choices, allowed_seconds in ((20, 6, 0.03), (224, 7, 0.2)):
        loss, cost = instance(n_groups, n_choices, "noisy")
        limit = between(loss, cost, 0.2)
        assert _fastest(lambda: knapsack.solve(loss, cost, limit)) < allowed_seconds  # noqa: B023
    dearest = np.full(len(loss), loss.shape[1] - 1)
    assert _fastest(lambda: knapsack.repair(dearest, loss, [cost], [limit])) < 0.02


def _fastest(call) -> float:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def test_front_ends_at_the_limit():
    rng = np.random.default_rng(3)
    cost = np.cumsum(rng.integers(1, 50, (12, 5)), axis=1)
    loss = np.sort(rng.random((12, 5)), axis=1)[:, ::-1]
    whole = knapsack.front(loss, cost, 9)
    limit = int((knapsack.total(cost, whole[0]) + knapsack.total(cost, whole[-1])) / 2)
    found = knapsack.front(loss, cost, 9, limit)
    assert len(found) > 3
    assert (found[0] == whole[0]).all()
    assert all(knapsack.total(cost, choice) <= limit for choice in found)
    assert knapsack.total(loss, found[-1]) == pytest.approx(knapsack.total(loss, knapsack.solve(loss, cost, limit)))
