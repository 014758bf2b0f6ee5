"""Intervals of paired differences: that they cover what they promise, and what they are made of."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import binom, norm, t

from mpsearch.errors import InputError
from mpsearch.intervals import cluster_values, is_approximate, paired_interval, pairs_to_show, proportion_interval

Z = norm.ppf(0.975)


def pairs(gained, lost, n):
    """Values and their reference, 0 or 1, `[n]`."""
    reference = np.zeros(n)
    reference[gained : gained + lost] = 1
    values = np.zeros(n)
    values[:gained] = 1
    return values, reference


@pytest.mark.parametrize("n", [100, 200, 400, 1000, 5000])
def test_a_share_is_covered_with_0_to_40_discordant_samples(n):
    """Exactly, from the multinomial probabilities of all counts: two-sided at least 93 %, the upper end at least 97 %."""
    counts = np.array([(b, c) for b in range(72) for c in range(72 - b) if b + c <= n])
    ends = np.array([proportion_interval(int(b), int(c), n) for b, c in counts])
    assert (ends[:, 0] < ends[:, 1]).all(), "never of width 0"
    total = counts.sum(1)
    for expected in (0.0, 0.05, 0.2, 0.5, 1, 2, 3, 4, 4.4, 5, 5.9, 7, 10, 15, 20, 30, 40):
        for gained in (0.0, 0.1, 0.25, 0.5, 0.9):
            chance = binom.pmf(total, n, expected / n) * binom.pmf(counts[:, 0], total, gained)
            truth = expected * (2 * gained - 1) / n
            covered = chance[(ends[:, 0] <= truth) & (truth <= ends[:, 1])].sum()
            assert covered >= 0.93, (expected, gained)
            assert chance[ends[:, 1] < truth].sum() <= 0.03, (expected, gained)


@pytest.mark.parametrize(("gained", "lost", "n"), [(0, 0, 400), (12, 2, 50), (1, 0, 30), (3, 9, 200), (0, 5, 60), (40, 35, 5000)])
def test_a_share_has_the_outer_limits_of_two_published_intervals(gained, lost, n):
    """Tango's: the score statistic is z where the likelihood is the largest that this difference allows. Bonett and Price's."""

    def statistic(delta):
        low, high = max(0.0, -delta), (1 - delta) / 2

        def likelihood(q):
            chances = ((gained, q + delta), (lost, q), (n - gained - lost, 1 - 2 * q - delta))
            return -sum(count * math.log(max(chance, 1e-300)) for count, chance in chances)

        q = minimize_scalar(likelihood, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
        return (gained - lost - n * delta) / math.sqrt(n * (2 * q + delta - delta**2))

    low, high = proportion_interval(gained, lost, n)
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = Z * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    for end, other, sign in ((low, up - down - half, 1), (high, up - down + half, -1)):
        beyond = sign * statistic(end) - Z  # 0: Tango's own limit; above 0: further out
        assert beyond == pytest.approx(0, abs=1e-3) or (beyond > 0 and end == pytest.approx(other))
    assert proportion_interval(lost, gained, n) == pytest.approx((-high, -low))
    assert paired_interval(*pairs(gained, lost, n)) == (low, high)


def test_no_change_in_n_samples_still_leaves_room_for_one():
    z2 = Z**2
    assert paired_interval(np.ones(400), np.ones(400)) == pytest.approx((-z2 / (400 + z2), z2 / (400 + z2)))
    assert z2 / (400 + z2) == pytest.approx(0.0095, abs=1e-4)
    for margin in (0.005, 0.02, 0.1):
        n = pairs_to_show(margin)
        assert proportion_interval(0, 0, n)[1] <= margin < proportion_interval(0, 0, n - 1)[1]
    assert -1 <= proportion_interval(0, 1, 1)[0] < proportion_interval(0, 1, 1)[1] <= 1


def test_a_mean_has_student_s_interval_of_the_differences():
    rng = np.random.default_rng(0)
    reference = rng.normal(3, 1, 20)
    values = reference + rng.normal(0.2, 0.1, 20)
    d = values - reference
    half = t.ppf(0.975, 19) * math.sqrt(((d - d.mean()) ** 2).sum() / 19 / 20)
    assert paired_interval(values, reference) == pytest.approx((d.mean() - half, d.mean() + half))
    with pytest.raises(InputError, match="one independent sample"):
        paired_interval([3.0], [2.0])
    assert [is_approximate(n) for n in (15, 16)] == [True, False]


def test_a_mean_is_covered_where_texts_differ_in_length_and_in_loss():
    """Texts of 50 to 800 tokens, each with a difference of its own: tokens or windows as samples would cover far less."""
    rng = np.random.default_rng(0)
    hits = {16: 0, 64: 0}
    for n in hits:
        for _ in range(1500):
            sizes = rng.integers(50, 800, n)
            own = rng.gamma(4, 0.01, n)
            clusters = np.repeat(np.arange(n), sizes)
            low, high = paired_interval(cluster_values(own[clusters] + rng.normal(0, 0.05, len(clusters)), clusters), np.zeros(n))
            hits[n] += low <= 0.04 <= high
    assert min(hits.values()) / 1500 >= 0.93


def test_clusters_keep_the_mean_of_all_values():
    values, clusters = np.array([1.0, 3.0, 10.0, 20.0, 30.0, 40.0]), np.array([7, 7, 2, 2, 2, 2])
    found = cluster_values(values, clusters)  # means 25 and 2, of 4 and 2 of 6 values
    assert found.mean() == pytest.approx(values.mean())
    mean = 104 / 6
    assert found == pytest.approx([mean + 4 * 2 / 6 * (25 - mean), mean + 2 * 2 / 6 * (2 - mean)])
    assert cluster_values([1.0, 2, 3, 5], [0, 0, 1, 1]) == pytest.approx([1.5, 4])
