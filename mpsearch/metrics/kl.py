"""Measured loss: quantize one group, run the search split, and compare the outputs with the float model's."""

from __future__ import annotations

from mpsearch.evaluation import Score
from mpsearch.metrics.base import MeasuredMetric


class KL(MeasuredMetric):
    """The mean divergence from the float model (by default the KL divergence, in nats); needs neither labels nor gradients."""

    name = "kl"
    unit = "nats"
    exact = True

    def value(self, score: Score, baseline: Score) -> float:
        """The score's loss."""
        return score.loss
