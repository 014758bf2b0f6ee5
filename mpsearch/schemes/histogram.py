"""Histogram of a layer's input, kept by calibration to choose the range of its codes; its range grows with the data.

Bins are a power of two wide and start at 0 on both sides, so that a wider bin is two narrower ones: the histogram of all values
does not depend on their batches and their order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

N_BINS = 2048
SMALLEST_EXPONENT = -126  # of a normal float32 number


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts int64 of values in bins 2**`exponent` wide, the narrowest that cover them and 0 with at most `N_BINS`.

    Bin i is number `first` + i: a value v is in bin trunc(v / 2**exponent), so that bin 0 reaches from 0 to both sides. Values
    that are 0 are in `n_zeros` alone: every range holds 0 exactly. `low` <= 0 <= `high` are the extreme values, or 0.
    """

    exponent: int
    first: int
    counts: Tensor
    n_zeros: int
    low: float
    high: float

    @classmethod
    def from_values(cls, x: Tensor) -> Histogram:
        """The histogram of all values of x, which are finite."""
        x = x.detach().float().flatten()
        low, high = (min(x.min().item(), 0.0), max(x.max().item(), 0.0)) if len(x) else (0.0, 0.0)
        exponent, first, n_bins = _bins(low, high)
        bins = (x * 2.0**-exponent).int().sub_(first)  # exact but for what is below 2**-126 bins; .int() truncates
        counts = torch.bincount(bins, minlength=n_bins).cpu()
        n_zeros = len(x) - int(x.count_nonzero())
        counts[-first] -= n_zeros
        return cls(exponent, first, counts, n_zeros, low, high)

    @classmethod
    def merged(cls, histograms: Sequence[Histogram]) -> Histogram:
        """The histogram of all the values of several."""
        if len(histograms) == 1:
            return histograms[0]
        low, high = min(h.low for h in histograms), max(h.high for h in histograms)
        exponent, first, n_bins = _bins(low, high)
        counts = torch.zeros(n_bins, dtype=torch.int64)
        for histogram in histograms:
            wider = 2 ** min(exponent - histogram.exponent, 31)
            counts.index_add_(0, torch.div(histogram.numbers, wider, rounding_mode="trunc") - first, histogram.counts)
        return cls(exponent, first, counts, sum(h.n_zeros for h in histograms), low, high)

    @property
    def numbers(self) -> Tensor:
        """int64: each bin's number."""
        return torch.arange(self.first, self.first + len(self.counts))

    @property
    def width(self) -> float:
        """Of a bin."""
        return 2.0**self.exponent

    @property
    def starts(self) -> Tensor:
        """float64: the end of each bin that is nearer to 0; 0 of bin 0."""
        return self.numbers.double() * self.width

    @property
    def centres(self) -> Tensor:
        """float64: the middle of each bin; 0 of bin 0."""
        return (self.numbers + 0.5 * self.numbers.sign().double()) * self.width

    @property
    def edges(self) -> Tensor:
        """float64: the end of each bin that is farther from 0; the positive one of bin 0."""
        return (self.numbers + torch.where(self.numbers < 0, -1.0, 1.0).double()) * self.width


def _bins(low: float, high: float) -> tuple[int, int, int]:
    """Exponent, number of the first bin, and the number of bins."""
    _, above = math.frexp(high - low)
    exponent = max(above - 12, SMALLEST_EXPONENT) if high > low else SMALLEST_EXPONENT  # half the least possible width
    while True:
        first, last = (math.trunc(math.ldexp(end, -exponent)) for end in (low, high))
        if last - first < N_BINS:
            return exponent, first, last - first + 1
        exponent += 1
