"""In this process: an allocation is scored when it is submitted. The default."""

from __future__ import annotations

from concurrent.futures import Future

from mpsearch.allocation import Allocation
from mpsearch.evaluation import Score
from mpsearch.executors.base import Executor, Make, Scorer, set_threads


class InProcess(Executor):
    """See above."""

    workers = 1

    def __init__(self, threads: int | None = None) -> None:
        super().__init__(threads)

    def start(self, engine: Scorer, make: Make | None = None) -> None:
        """The process's own engine is the worker."""
        self._engine = engine
        set_threads(self.threads)

    def close(self) -> None:
        """There is nothing to let go."""

    def submit(self, allocation: Allocation) -> Future[Score]:
        """See `Executor`; done when it comes back. What the engine raises is raised here."""
        future: Future[Score] = Future()
        future.set_result(self._engine.score(allocation, "search"))
        return future
