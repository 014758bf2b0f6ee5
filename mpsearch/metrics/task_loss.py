"""Measured task loss: the rise of the cross-entropy on the search split's labels; may be negative, is noisy where small."""

from __future__ import annotations

from mpsearch.evaluation import Score
from mpsearch.metrics.base import MeasuredMetric


class TaskLoss(MeasuredMetric):
    """Rise of the mean cross-entropy in nats."""

    name = "task_loss"
    unit = "nats"

    def value(self, score: Score, baseline: Score) -> float:
        """Cross-entropy less the float model's."""
        return score.cross_entropy - baseline.cross_entropy
