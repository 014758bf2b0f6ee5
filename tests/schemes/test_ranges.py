"""How static ranges are chosen: against what a search over the values themselves finds, and where each must end."""

import itertools

import pytest
import torch

from mpsearch.errors import InputError
from mpsearch.schemes.histogram import Histogram
from mpsearch.schemes.input import IntegerInput
from mpsearch.schemes.ranges import PERCENTILE, RANGES, RATIOS


def values(kind):
    torch.manual_seed(0)
    x = torch.randn(20_000)
    if kind == "relu":
        return x.relu()
    if kind == "outlier":
        return torch.cat([x, torch.tensor([100.0])])
    return x * torch.where(x < 0, 0.1, 1.0) if kind == "skewed" else x


def range_of(wanted, x):
    return RANGES[wanted.range](Histogram.from_values(x), wanted.rounded, wanted.symmetric)


def static(bits, range, symmetric):
    return IntegerInput(bits, "static", symmetric, range)


def error(wanted, x, low, high):
    return (wanted.rounded(x.double(), low, high)[1] - x).square().mean().item()


@pytest.mark.parametrize("kind", ["normal", "relu", "outlier", "skewed"])
@pytest.mark.parametrize("name", RANGES)
def test_a_range_holds_zero_and_no_more_than_was_seen(kind, name):
    x = values(kind)
    for bits, symmetric in itertools.product((2, 4, 8, 16), (True, False)):
        low, high = range_of(static(bits, name, symmetric), x)
        assert low <= 0 <= high
        assert high - low > 0
        assert max(-low, high) <= x.abs().max()
        if symmetric:
            assert low == -high
        else:
            assert low >= min(x.min(), 0.0)
        if name == "minmax":
            assert max(-low, high) == x.abs().max()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_mse_is_the_least_error_of_the_values(bits, symmetric):
    """Beside every candidate of a grid, on the values and not their histogram."""
    for kind in ("normal", "relu", "outlier", "skewed"):
        x, wanted = values(kind), static(bits, "mse", symmetric)
        most = float(x.abs().max())
        low, high = (-most, most) if symmetric else (min(float(x.min()), 0.0), float(x.max()))
        ratios = [(r, r) for r in RATIOS[::3]] if symmetric else itertools.product(RATIOS[::9], RATIOS[::9])
        least = min(error(wanted, x, r * low, s * high) for r, s in ratios)
        assert error(wanted, x, *range_of(wanted, x)) <= 1.02 * least


@pytest.mark.parametrize("bits", [4, 8])
def test_percentile_mse_and_entropy_clip_an_outlier(bits):
    x = values("outlier")
    for name in ("percentile", "mse", "entropy"):
        _, high = range_of(static(bits, name, True), x)
        # 8 bits of the whole range cost a mean error of (100 / 127)^2 / 12 = 0.05, clipping to T (100 - T)^2 / 20,001.
        assert high < (95 if name == "mse" and bits == 8 else 30), name


def test_percentile_counts_the_zeros():
    for symmetric in (True, False):
        x = torch.cat([torch.zeros(99_995), torch.arange(1.0, 6.0)])
        low, high = range_of(static(8, "percentile", symmetric), x)
        assert high < 0.01, "99.995 % are 0"
        x = torch.cat([torch.zeros(60_000), torch.rand(40_000)])
        low, high = range_of(static(8, "percentile", symmetric), x)
        assert high == pytest.approx(x.quantile(PERCENTILE).item(), abs=1e-3)
        assert low == (-high if symmetric else 0)


def test_entropy_of_what_the_codes_tell_whole_is_all_of_it():
    """Four bits tell 15 values apart: nothing is lost, and nothing is to be clipped."""
    x = torch.arange(16.0).repeat(50)
    assert range_of(static(4, "entropy", False), x) == (0.0, 15.0)


def test_sixteen_bits_clip_next_to_nothing():
    x = values("normal")
    for name, symmetric in itertools.product(("mse", "entropy"), (True, False)):
        low, high = range_of(static(16, name, symmetric), x)
        assert high > 0.9 * x.max()
        assert low < 0.9 * x.min()


def test_one_value_is_a_range():
    for name, symmetric in itertools.product(RANGES, (True, False)):
        wanted = static(8, name, symmetric)
        x = torch.tensor([-0.7])
        tensors = wanted.stored(Histogram.from_values(x))
        assert wanted.fake_quantize(x, 1, tensors) == pytest.approx(-0.7, rel=0.02), (name, symmetric)


def test_zeros_alone_have_no_range():
    for name in RANGES:
        with pytest.raises(InputError, match="its input is 0 in all of the calibration data"):
            static(8, name, True).stored(Histogram.from_values(torch.zeros(5)))
