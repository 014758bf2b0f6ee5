"""Measured task loss: the rise of the task's own loss on the search split's targets; may be negative, is noisy where small."""

from __future__ import annotations

from mpsearch.evaluation import Score
from mpsearch.metrics.base import MeasuredMetric


class TaskLoss(MeasuredMetric):
    """Rise of the mean cross-entropy in nats, or of what the task has in its place."""

    name = "task_loss"
    unit = "nats"

    def value(self, score: Score, baseline: Score) -> float:
        """The task loss minus the float model's."""
        return score.cross_entropy - baseline.cross_entropy
