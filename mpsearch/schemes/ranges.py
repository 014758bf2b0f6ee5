"""Choosing the range of a static input's codes from the histogram of the calibration data.

Each function takes the `Histogram`, `rounded`, and whether the range is `symmetric`, and returns (low, high) with low <= 0 <=
high; a symmetric range has low = -high. `rounded(values, low, high)` returns (codes as integers, the values they stand for, the
step) in the format to be used, float64. Zeros are left out of the errors, as every range holds 0 exactly.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mpsearch.schemes.histogram import Histogram

Rounded = Callable[[Tensor, float, float], tuple[Tensor, Tensor, float]]

PERCENTILE = 0.9999
SMALLEST_COUNT = 1e-4  # of a bin of Q that is empty where P is not, as in MXNet and ONNX Runtime
RATIOS = torch.linspace(1.0, 0.02, 99).tolist()  # of the largest value


def minmax(histogram: Histogram, rounded: Rounded, symmetric: bool) -> tuple[float, float]:
    """The smallest and the largest value."""
    high = max(-histogram.low, histogram.high)
    return (-high, high) if symmetric else (histogram.low, histogram.high)


def percentile(histogram: Histogram, rounded: Rounded, symmetric: bool) -> tuple[float, float]:
    """99.99 % of the magnitudes; asymmetric: all but 0.01 % of the values at each end (Wu et al. 2020, section 4.2)."""
    counts = histogram.counts.clone()
    counts[-histogram.first] += histogram.n_zeros
    edges = histogram.edges
    if symmetric:
        high = min(_reached(edges.abs(), counts), minmax(histogram, rounded, symmetric)[1])
        return (-high, high)
    return max(-_reached(-edges, counts), histogram.low), min(_reached(edges, counts), histogram.high)


def _reached(edges: Tensor, counts: Tensor) -> float:
    """The smallest edge up to which `PERCENTILE` of the counts lie; 0 at least."""
    ascending = edges.argsort(stable=True)
    share = counts[ascending].cumsum(0).double() / max(int(counts.sum()), 1)
    return max(edges[ascending][int((share < PERCENTILE).sum())].item(), 0.0)


def mse(histogram: Histogram, rounded: Rounded, symmetric: bool) -> tuple[float, float]:
    """The least mean squared error of the values."""
    centres, counts = histogram.centres, histogram.counts.double()

    def error(low: float, high: float) -> float:
        _, values, step = rounded(centres, low, high)
        each = (values - centres).square()
        if step < histogram.width:  # within a bin errors are those of a uniform density, whatever its middle's
            each = torch.where((centres >= low) & (centres <= high), step**2 / 12, each)
        return float(counts @ each)

    return _least(error, minmax(histogram, rounded, symmetric), symmetric)


def entropy(histogram: Histogram, rounded: Rounded, symmetric: bool) -> tuple[float, float]:
    """The least KL divergence of the quantized distribution (Migacz 2017, "8-bit Inference with TensorRT").

    The reference P is the histogram with the values beyond the range in its outermost bins; Q has each code's values, those
    beyond the range left out, spread evenly over the bins of P that round to it. Ranges of fewer bins than codes are not tried.
    """
    starts, centres, counts = histogram.numbers * histogram.width, histogram.centres, histogram.counts.double()

    def divergence(low: float, high: float) -> float:
        codes, _, step = rounded(centres, low, high)
        if step < histogram.width:
            return torch.inf
        inside = (starts >= low) & (starts <= high)
        kept = torch.where(inside, counts, 0.0)
        reference = kept.clone()
        first, last = (int(i) for i in inside.nonzero()[[0, -1], 0])
        reference[first] += counts[:first].sum()
        reference[last] += counts[last + 1 :].sum()
        by_code = (codes - codes.min()).long()
        within = (reference > 0).double()
        mass, n_bins = (torch.bincount(by_code, weights) for weights in (kept, within))
        q = torch.where(reference > 0, (mass / n_bins.clamp(min=1.0))[by_code].clamp(min=SMALLEST_COUNT), 0.0)
        p, q = reference / reference.sum(), q / q.sum()
        used = p > 0
        return float((p[used] * (p[used] / q[used]).log()).sum())

    return _least(divergence, minmax(histogram, rounded, symmetric), symmetric)


def _least(error: Callable[[float, float], float], whole: tuple[float, float], symmetric: bool) -> tuple[float, float]:
    """The range of the least error among `RATIOS` of the whole range: of both ends alike, or of one after the other."""
    low, high = best = whole
    if symmetric:
        return min(((r * low, r * high) for r in RATIOS), key=lambda ends: error(*ends))
    for _ in range(2 if low and high else 1):
        best = min(((best[0], r * high) for r in RATIOS), key=lambda ends: error(*ends)) if high else best
        best = min(((r * low, best[1]) for r in RATIOS), key=lambda ends: error(*ends)) if low else best
    return best


RANGES = {"minmax": minmax, "percentile": percentile, "mse": mse, "entropy": entropy}
