"""The surrogate (mpsearch/surrogate.py) on losses whose interactions are known."""

import ctypes
import functools
import shutil
import subprocess
import warnings

import numpy as np
import pytest
from scipy.stats import kendalltau

from mpsearch.optimize.surrogate import Surrogate

N_GROUPS, BITS = 24, np.array([2, 3, 4, 6, 8])


def made_up(pairs=(), ceiling=np.inf, seed=0):
    """(sensitivities, loss of choices [n, n_groups]): |sum of errors|^2 with correlations `pairs` {(g, h): rho}, saturating."""
    rng = np.random.default_rng(seed)
    amplitude = np.exp(rng.normal(-2, 0.7, N_GROUPS))[:, None] * 2.0 ** -(BITS - 2.0)

    def loss(choices):
        chosen = amplitude[np.arange(N_GROUPS), choices]
        total = np.square(chosen).sum(1)
        for (g, h), rho in dict(pairs).items():
            total = total + 2 * rho * chosen[:, g] * chosen[:, h]
        return -ceiling * np.expm1(-total / ceiling) if np.isfinite(ceiling) else total

    return amplitude**2, loss


def choices_of(n, seed):
    """Mixed allocations that lean to few or to many bits."""
    rng = np.random.default_rng(seed)
    lean = rng.uniform(-1.5, 1.5, (n, 1, 1)) * np.arange(len(BITS))
    return (rng.gumbel(size=(n, N_GROUPS, len(BITS))) + lean).argmax(2)


def fitted(losses, truth, n=300, seed=1, exact=True):
    surrogate, choices = Surrogate(losses, exact), choices_of(n, seed)
    surrogate.choose_variances(choices, np.log(truth(choices)))
    surrogate.fit(choices, np.log(truth(choices)))
    return surrogate


@functools.cache
def taught():
    """(surrogate, sensitivities, loss of choices), fitted to measurements of strong interactions, for tests that only ask it."""
    losses, truth = made_up(STRONG)
    return fitted(losses, truth), losses, truth


def rms(values):
    return float(np.sqrt(np.mean(np.square(values))))


STRONG = {(0, 1): 0.95, (2, 3): -0.9, (4, 9): 0.9, (5, 6): -0.9, (7, 8): 0.9, (10, 11): 0.95}


def held_out_errors(surrogate, truth):
    """(of the additive model, of the surrogate) in log loss, on allocations that it was not fitted to."""
    choices = choices_of(300, 2)
    truth = np.log(truth(choices))
    return surrogate.additive(choices) - truth, surrogate.predict(choices)[0] - truth


def test_without_measurements_it_is_the_additive_model():
    losses, _ = made_up()
    surrogate, choices = Surrogate(losses), choices_of(20, 0)
    mean, deviation = surrogate.predict(choices)
    np.testing.assert_allclose(mean, np.log(losses[np.arange(N_GROUPS), choices].sum(1)))
    assert (deviation > 0.1).all()
    table = surrogate.table(choices[0])
    np.testing.assert_allclose(table, losses / losses[np.arange(N_GROUPS), choices[0]].sum())


def test_it_learns_interactions_that_the_additive_model_cannot_see():
    surrogate, _, truth = taught()
    additive, learned = held_out_errors(surrogate, truth)
    assert rms(additive) > 0.1
    assert rms(learned) < 0.6 * rms(additive)


def test_more_measurements_teach_more():
    losses, truth = made_up(STRONG)
    errors = [rms(held_out_errors(fitted(losses, truth, n), truth)[1]) for n in (25, 100, 400)]
    assert errors[0] > errors[1] > errors[2]


def test_the_evidence_takes_up_no_interactions_where_there_are_none():
    losses, truth = made_up()
    plain, bound = fitted(losses, truth), taught()[0]
    assert plain.variances[3] < 0.1 * bound.variances[3]
    _, learned = held_out_errors(plain, truth)
    assert rms(learned) < 0.02


def test_the_link_saturates():
    losses, truth = made_up(ceiling=0.3)
    additive, learned = held_out_errors(fitted(losses, truth, 40), truth)
    assert rms(additive) > 0.3
    assert rms(learned) < 0.1 * rms(additive)


def test_a_metric_of_another_unit_is_as_good():
    losses, truth = made_up(STRONG)
    one, other = (fitted(scale * losses, truth, exact=False) for scale in (1.0, 1e4))
    errors = [rms(held_out_errors(s, truth)[1]) for s in (one, other)]
    assert errors[1] < 1.2 * errors[0]


def test_a_group_alone_is_known_whatever_the_others_do_together():
    """Where every measured allocation is dearer than its sum, one in which a single group is damaged still is not."""
    losses, truth = made_up({(g, h): 0.3 for g in range(N_GROUPS) for h in range(g)})
    alone = np.full((N_GROUPS, N_GROUPS), len(BITS) - 1)
    np.fill_diagonal(alone, 0)
    exact, other = (fitted(losses, truth, 60, exact=exact).predict(alone) for exact in (True, False))
    errors = [rms(mean - np.log(truth(alone))) for mean, _ in (exact, other)]
    assert errors[0] < 0.8 * errors[1]
    assert np.median(exact[1]) < np.median(other[1])


def test_its_error_bars_are_honest():
    surrogate, _, truth = taught()
    choices = choices_of(300, 2)
    mean, deviation = surrogate.predict(choices)
    assert 0.5 < rms((mean - np.log(truth(choices))) / deviation) < 2
    known = choices_of(300, 1)
    assert np.median(surrogate.predict(known)[1]) < np.median(deviation)


def test_its_table_ranks_the_moves_of_one_group_better_than_the_sensitivities():
    surrogate, losses, truth = taught()
    rows, taus = np.arange(N_GROUPS), []
    for center in choices_of(8, 3):
        moves = np.repeat(center[None], N_GROUPS, axis=0)
        moves[rows, rows] = np.where(center > 0, center - 1, 1)
        measured = np.log(truth(moves)) - np.log(truth(center[None]))
        tables = (surrogate.table(center), losses)
        taus.append([kendalltau(t[rows, moves[rows, rows]] - t[rows, center], measured).statistic for t in tables])
    learned, additive = np.mean(taus, axis=0)
    assert learned > additive + 0.1
    assert learned > 0.75


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_measurements_and_choices_that_are_not_allowed(n):
    losses, truth = made_up()
    choices = np.maximum(choices_of(n, 5), 1)
    losses = losses.copy()
    losses[:, 0] = np.inf
    surrogate = Surrogate(losses)
    surrogate.choose_variances(choices, np.log(truth(choices)))
    surrogate.fit(choices, np.log(truth(choices)))
    mean, deviation = surrogate.predict(choices)
    assert np.isfinite(mean).all()
    assert np.isfinite(deviation).all()
    assert np.isfinite(surrogate.table(choices[0])).all()


def test_sensitivities_of_zero_do_no_harm():
    surrogate = Surrogate(np.zeros((4, 2)))
    surrogate.fit(np.array([[0, 0, 0, 0], [1, 0, 1, 0]]), np.array([-3.0, -4.0]))
    assert np.isfinite(surrogate.predict(np.array([[1, 1, 1, 1]]))[0]).all()


def with_effects(n=40, seed=0):
    """(losses, effects, loss of choices): what groups do adds up as vectors of `n` features."""
    rng = np.random.default_rng(seed)
    directions = rng.normal(size=(n, N_GROUPS, 1)) + rng.normal(size=(n, 1, 1))
    effects = (directions / np.linalg.norm(directions, axis=0) * np.sqrt(made_up()[0])).astype(np.float32)

    def loss(choices):
        return 0.5 * np.square(effects[:, np.arange(N_GROUPS), choices].astype(np.float64).sum(2)).sum(0)

    return 0.5 * np.square(effects.astype(np.float64)).sum(0), effects, loss


def test_with_effects_it_knows_what_groups_do_together():
    losses, effects, truth = with_effects()
    choices = choices_of(50, 3)
    plain, knowing = Surrogate(losses, exact=False), Surrogate(losses, False, effects)
    assert rms(plain.predict(choices)[0] - np.log(truth(choices))) > 0.5
    assert knowing.predict(choices)[0] == pytest.approx(np.log(truth(choices)), abs=1e-4)
    own = losses * 1.5  # what the effects leave out is each group's own
    expected = truth(choices) + 0.5 * losses[np.arange(N_GROUPS), choices].sum(1)
    assert Surrogate(own, False, effects).predict(choices)[0] == pytest.approx(np.log(expected), abs=1e-4)


def test_effects_are_in_the_table_and_a_move_is_predicted_exactly():
    losses, effects, truth = with_effects()
    surrogate, choice = Surrogate(losses, False, effects), choices_of(1, 4)[0]
    table = surrogate.table(choice)
    now = truth(choice[None])[0]
    for group, to in ((0, 0), (3, 4), (17, 2)):
        moved = choice.copy()
        moved[group] = to
        change = table[group, to] - table[group, choice[group]]
        assert change == pytest.approx((truth(moved[None])[0] - now) / now, abs=1e-5)


def test_effects_that_cancel_altogether_are_not_believed():
    losses = np.full((2, 1), 0.5)
    effects = np.array([[[1.0], [-1.0]]], dtype=np.float32)
    mean, _ = Surrogate(losses, False, effects).predict(np.zeros((1, 2), dtype=np.intp))
    assert mean == pytest.approx(np.log(0.01))


def test_effects_that_fit_badly_are_learned_away():
    losses, effects, _ = with_effects()
    _, _, truth = with_effects(seed=1)
    blind, taught = Surrogate(losses, False, effects), Surrogate(losses, False, effects)
    choices, held = choices_of(300, 1), choices_of(300, 2)
    taught.choose_variances(choices, np.log(truth(choices)))
    taught.fit(choices, np.log(truth(choices)))
    before, after = (rms(s.predict(held)[0] - np.log(truth(held))) for s in (blind, taught))
    assert after < 0.5 * before


STACK_FILL = """
#include <stdint.h>
void fill_stack(void) {
    volatile uint32_t below[40000];
    for (int i = 0; i < 40000; ++i) below[i] = 0x7fa00000;  // a signaling NaN
}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler to fill the stack with")
def test_what_is_left_on_the_stack_gives_no_warning(tmp_path):
    """Five groups: OpenBLAS's AVX-512 kernel for five columns reads unset memory, and sets the flag for invalid operations."""
    (tmp_path / "fill.c").write_text(STACK_FILL)
    library = tmp_path / "fill.so"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", tmp_path / "fill.c", "-o", library], check=True)
    fill_stack = ctypes.CDLL(str(library)).fill_stack
    rng = np.random.default_rng(0)
    surrogate = Surrogate(rng.uniform(0.1, 1, (5, 4)))
    choices = rng.integers(0, 4, (11, 5))
    surrogate.fit(choices, np.log(rng.uniform(0.1, 3, 11)))
    expected = surrogate.predict(choices[:1]), surrogate.table(choices[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(20):
            fill_stack()
            mean, deviation = surrogate.predict(choices[:1])
            fill_stack()
            table = surrogate.table(choices[0])
            assert (mean, deviation) == expected[0]
            np.testing.assert_array_equal(table, expected[1])
