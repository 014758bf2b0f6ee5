"""Measured KL divergence: quantize one group, run the search split, compare the predictions with the float model's."""

from __future__ import annotations

from mpsearch.evaluation import Score
from mpsearch.metrics.base import MeasuredMetric


class KL(MeasuredMetric):
    """Mean KL(float || quantized) in nats; needs neither labels nor gradients."""

    name = "kl"
    unit = "nats"

    @property
    def exact(self) -> bool:
        """It is the loss."""
        return True

    def value(self, score: Score, baseline: Score) -> float:
        """The score's loss."""
        return score.loss
