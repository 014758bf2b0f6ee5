"""95 % intervals of the difference of two models, measured on the same samples.

Values that are 0 or 1 (hits and misses) get a score interval: of the limits by Tango (1998, Statistics in Medicine 17, 891-908,
equation 3) and by Bonett and Price (2012, Journal of Educational and Behavioral Statistics 37, 479-488, adjusted Wald) the outer
ones. Alone, Tango's covers a little less than 93 % where 4 to 6 samples differ, and the upper limit of Bonett and Price is passed
in 6.7 instead of 2.5 % of cases; together they cover at least 95 %, each end at least 97 %. All other values get Student's t
interval of the mean difference. Values that are not independent (the tokens of a text) are first reduced to one for each
cluster. A measure of all samples together (F1, mAP) is resampled, with the same samples for both models.
`scripts/bench_intervals.py` measures their coverage.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri, stdtr, stdtrit

from mpsearch.errors import InputError

CONFIDENCE = 0.95
Z = float(ndtri((1 + CONFIDENCE) / 2))
N_RESAMPLES = 200  # of a bootstrap; its standard error is then known to 5 %
FEWEST = 16  # independent samples; with fewer, no limit is more than approximate


def paired_interval(values: ArrayLike, reference: ArrayLike) -> tuple[float, float]:
    """(low, high) of the mean of `values - reference`, both `[n]` and of the same independent samples.

    Raises `InputError` for a single sample of a quality that is not 0 or 1.
    """
    values, reference = np.asarray(values, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    differences = values - reference
    n = len(differences)
    bounded = all(((x >= 0) & (x <= 1)).all() for x in (values, reference))
    if bounded and np.isin(differences, (-1, 0, 1)).all():
        return proportion_interval(int((differences > 0).sum()), int((differences < 0).sum()), n)
    if n < 2:
        raise InputError("The quality has one independent sample, and no interval can be had of one. Give the split at least 2.")
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2) * differences.std(ddof=1) / np.sqrt(n))
    return float(differences.mean()) - half, float(differences.mean()) + half


@lru_cache(maxsize=100_000)
def proportion_interval(gained: int, lost: int, n: int) -> tuple[float, float]:
    """(low, high) of the difference of two proportions, where of `n` pairs `gained` went from 0 to 1 and `lost` from 1 to 0.

    Never of width 0: without a discordant pair it is +-z^2 / (n + z^2), +-0.0095 for 400 pairs.
    """
    low = max(min(-_tango_upper(lost, gained, n), _bonett_price(gained, lost, n)[0]), -1.0)
    high = min(max(_tango_upper(gained, lost, n), _bonett_price(gained, lost, n)[1]), 1.0)
    return low, high


def pairs_to_show(margin: float) -> int:
    """The fewest pairs n that show a difference below `margin` where none of them is discordant: z^2 / (n + z^2) <= margin."""
    return math.ceil(Z**2 * (1 - margin) / margin)


def cluster_values(values: ArrayLike, clusters: ArrayLike) -> NDArray[np.float64]:
    """One value for each cluster, float64 `[n_clusters]`, from `values` and integer `clusters` `[n]`; the same mean.

    A cluster's value is the mean m of all values plus w (m_c - m), m_c the cluster's own mean and w its share of the values
    times the number of clusters: the mean as a ratio of two sums, linearized (Cochran 1977, Sampling Techniques, section 6.3).
    Clusters of equal size have their own means.
    """
    values = np.asarray(values, dtype=np.float64)
    _, index, counts = np.unique(clusters, return_inverse=True, return_counts=True)
    mean, means = values.mean(), np.bincount(index, weights=values) / counts
    return mean + counts * (len(counts) / len(values)) * (means - mean)


def bootstrap_values(statistic: Callable[[NDArray[np.intp]], float], clusters: ArrayLike) -> NDArray[np.float64]:
    """Values `[N_RESAMPLES]` that `paired_interval` can take for those of samples, of a statistic of all samples together.

    `statistic(index)` is its value for the samples at `index`, integer `clusters` `[n]` are the independent unit of each sample.
    The mean of the values is the statistic of all samples, and the standard error of their mean is the bootstrap's (Efron and
    Tibshirani 1993, chapter 6, with the factor n / (n - 1) of the variance and Student's t of n - 1 degrees of freedom). The
    resamples are the same at every call, so that the values of two models are paired.
    """
    _, unit = np.unique(clusters, return_inverse=True)
    members = np.split(np.argsort(unit, kind="stable"), np.cumsum(np.bincount(unit))[:-1])
    n, random = len(members), np.random.default_rng(0)
    if n < 2:
        raise InputError("The quality has one independent sample, and no interval can be had of one. Give the split at least 2.")
    draws = random.integers(n, size=(N_RESAMPLES, n))
    replicates = np.array([statistic(np.concatenate([members[i] for i in draw])) for draw in draws])
    level = (1 + CONFIDENCE) / 2
    scale = np.sqrt(N_RESAMPLES * n / (n - 1)) * stdtrit(n - 1, level) / stdtrit(N_RESAMPLES - 1, level)
    return statistic(np.arange(len(unit))) + scale * (replicates - replicates.mean())


@lru_cache(maxsize=64)
def random_half(n: int) -> NDArray[np.bool_]:
    """bool `[n]`: half of `n` samples (one more where `n` is odd), drawn at random and the same at every call."""
    half = np.zeros(n, dtype=bool)
    half[np.random.default_rng(0).permutation(n)[: (n + 1) // 2]] = True
    half.setflags(write=False)
    return half


def smaller_p_value(values: ArrayLike, reference: ArrayLike) -> float:
    """One-sided p-value of a paired t test that `values` `[n]` have a smaller mean than `reference` `[n]`.

    Where few of the differences are large and positive, most means are below the true one, and Student's test is wrong too often:
    at a level of 0.0025 in 2 to 7 % of cases for 100 log-normal values. The statistic is therefore corrected for such a skewness
    (Johnson 1978, Journal of the American Statistical Association 73, 536-544), which makes that 0.5 to 1 %; one for the other
    sign, which would favour `values`, is not made. 1 where nothing can be said: of fewer than two samples, or of infinite values.
    """
    differences = np.asarray(values, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
    n = len(differences)
    if n < 2 or not np.isfinite(differences).all():
        return 1.0
    variance, mean = float(differences.var(ddof=1)), float(differences.mean())
    if variance == 0:
        return 0.0 if mean < 0 else 1.0
    skew = max(float(((differences - mean) ** 3).mean()), 0.0)
    corrected = mean + skew / (6 * n * variance) + skew * mean**2 / (3 * variance**2)
    return float(stdtr(n - 1, corrected * math.sqrt(n / variance)))


def combined_p_value(p_values: ArrayLike, weights: ArrayLike) -> float:
    """One-sided p-value of independent tests of one hypothesis, `[n]`, each weighted by the root of its number of samples.

    The weighted sum of normal deviates (Stouffer et al. 1949, The American Soldier; Liptak 1958).
    """
    weights = np.sqrt(np.asarray(weights, dtype=np.float64))
    deviates = -ndtri(np.clip(p_values, 1e-300, 1 - 1e-16))
    return float(ndtr(-(weights @ deviates) / np.linalg.norm(weights)))


def holm(p_values: ArrayLike, level: float) -> NDArray[np.bool_]:
    """bool `[n]`: the hypotheses that are rejected, so that the chance of any false rejection is at most `level` (Holm 1979)."""
    p_values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p_values, kind="stable")
    passed = p_values[order] <= level / np.arange(len(order), 0, -1)
    rejected = np.zeros(len(order), dtype=bool)
    rejected[order[: int(np.argmin(np.append(passed, False)))]] = True
    return rejected


def is_approximate(n: int) -> bool:
    """Whether an interval of `n` independent samples is too rough to rely on its coverage."""
    return n < FEWEST


def _tango_upper(gained: int, lost: int, n: int) -> float:
    """The largest difference that Tango's score test does not reject."""
    from scipy.optimize import brentq  # here, as it takes half a second to import, which a worker process need not spend

    estimate = (gained - lost) / n
    if estimate >= 1:
        return 1.0

    def excess(delta: float) -> float:
        a = 2 * n
        b = (2 * n - gained + lost) * delta - gained - lost
        c = -lost * delta * (1 - delta)
        share = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)  # of lost pairs, most likely under this difference
        return n * (delta - estimate) - Z * math.sqrt(max(n * (2 * share + delta * (1 - delta)), 0.0))

    return float(brentq(excess, estimate + 1e-12, 1.0))


def _bonett_price(gained: int, lost: int, n: int) -> tuple[float, float]:
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = Z * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    return up - down - half, up - down + half
