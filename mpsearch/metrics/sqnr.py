"""Signal to quantization noise at the network's output, one group at a time.

The value is the reciprocal 1 / SQNR (noise power over signal power): unlike decibels it grows with the damage and adds up over
groups whose errors are independent.
"""

from __future__ import annotations

from mpsearch.evaluation import Score
from mpsearch.metrics.base import MeasuredMetric


class SQNR(MeasuredMetric):
    """sum (z' - z)^2 / sum z^2 over the logits z of the search split."""

    name = "sqnr"
    unit = "noise/signal"

    def value(self, score: Score, baseline: Score) -> float:
        """The score's noise."""
        return score.noise
