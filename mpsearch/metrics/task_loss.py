"""Measured task loss: the increase of the task's own loss on the targets of the search split; can be negative."""

from __future__ import annotations

from mpsearch.evaluation import Score
from mpsearch.metrics.base import MeasuredMetric


class TaskLoss(MeasuredMetric):
    """Increase of the mean cross-entropy in nats, or of the loss that the task has in its place."""

    name = "task_loss"
    unit = "nats"

    def value(self, score: Score, baseline: Score) -> float:
        """The task loss minus the float model's."""
        return score.cross_entropy - baseline.cross_entropy
