"""The contract of the sensitivity metrics: how much the model minds when one group alone takes a scheme."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar

from mpsearch.allocation import Allocation
from mpsearch.engine import QuantEngine
from mpsearch.evaluation import Score

Pair = tuple[str, str]


class SensitivityMetric(ABC):
    """A way to measure sensitivity; higher is worse, and values of different groups may be added."""

    name: ClassVar[str]
    unit: ClassVar[str]

    @abstractmethod
    def measure(self, engine: QuantEngine, pairs: Sequence[Pair]) -> Iterator[float]:
        """One value for each (group, scheme) of `pairs`, in their order; each is yielded as soon as it is known."""


class MeasuredMetric(SensitivityMetric):
    """Metrics that really quantize one group at a time and score the model on the search split."""

    @abstractmethod
    def value(self, score: Score, baseline: Score) -> float:
        """The sensitivity that a score shows, beside the float model's."""

    def measure(self, engine: QuantEngine, pairs: Sequence[Pair]) -> Iterator[float]:
        """One pass over the search split for each pair."""
        baseline = engine.score(Allocation())
        for group, scheme in pairs:
            yield self.value(engine.score(Allocation({group: scheme})), baseline)
