"""The contract of the sensitivity metrics: how much the model minds when one group alone takes a scheme."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from mpsearch.allocation import Allocation
from mpsearch.engine import QuantEngine
from mpsearch.errors import InputError
from mpsearch.evaluation import Score, Stop
from mpsearch.executors.base import Executor
from mpsearch.executors.in_process import InProcess

Pair = tuple[str, str]


class SensitivityMetric(ABC):
    """A way to measure sensitivity; higher is worse, and values of different groups may be added."""

    name: ClassVar[str]
    unit: ClassVar[str]

    @property
    def exact(self) -> bool:
        """Whether it is what a search measures of its trials: the loss, on all of the search data."""
        return False

    @abstractmethod
    def measure(self, engine: QuantEngine, pairs: Sequence[Pair]) -> Iterator[float]:
        """One value for each (group, scheme) of `pairs`, in their order; each is yielded as soon as it is known."""

    def measure_joint(self, engine: QuantEngine, pairs: Sequence[Pair]) -> tuple[NDArray[np.float64], NDArray[np.float32]] | None:
        """The values of `pairs` and their effects `[n, n_pairs]` (`SensitivityTable.effects`); `None`: it knows no effects."""
        return None

    def measure_on(self, executor: Executor, engine: QuantEngine, pairs: Sequence[Pair]) -> Iterator[tuple[Pair, float]]:
        """The same by pair, in the order in which they are done; here in this process, whatever the executor."""
        yield from zip(pairs, self.measure(engine, pairs), strict=True)


@dataclass(frozen=True)
class MeasuredMetric(SensitivityMetric):
    """Metrics that really quantize one group at a time and score the model on the search split.

    `share` is the part of the search data, from its beginning and in whole batches, that each is measured on.
    """

    share: float = 1.0

    def __post_init__(self) -> None:
        if not (isinstance(self.share, int | float) and 0 < self.share <= 1):
            raise InputError(f"metric.share is a number above 0 and at most 1, a part of the search data; '{self.share}' came.")

    @abstractmethod
    def value(self, score: Score, baseline: Score) -> float:
        """The sensitivity that a score shows, beside the float model's."""

    def measure(self, engine: QuantEngine, pairs: Sequence[Pair]) -> Iterator[float]:
        """One pass over the search split for each pair."""
        executor = InProcess()
        executor.start(engine)
        yield from (value for _, value in self.measure_on(executor, engine, pairs))

    def measure_on(self, executor: Executor, engine: QuantEngine, pairs: Sequence[Pair]) -> Iterator[tuple[Pair, float]]:
        """One evaluation for each pair, twice as many under way as there are workers."""
        n = max(1, round(self.share * len(engine.batches("search"))))
        stops: list[Stop] = [(n, -1.0)] if n < len(engine.batches("search")) else []
        baseline = executor.submit(Allocation()).result()
        left, running = list(reversed(pairs)), dict[Future[Score], Pair]()
        while left or running:
            while left and len(running) < (2 * executor.workers if executor.workers > 1 else 1):
                group, scheme = left.pop()
                running[executor.submit(Allocation({group: scheme}), stops)] = (group, scheme)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), self.value(future.result(), baseline)
