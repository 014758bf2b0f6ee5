"""Ray: one actor a worker, on a cluster that is there already or on this machine; actors that die are started again."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from mpsearch.allocation import Allocation
from mpsearch.errors import InputError
from mpsearch.evaluation import Score, Stop
from mpsearch.executors.base import Executor, Make, Scorer, at_least_one, made_in_worker
from mpsearch.progress import quiet


class Ray(Executor):
    """`workers` actors on the cluster at `address` ("auto": the one of this host; `None`: one that is started here)."""

    def __init__(self, workers: int = 2, address: str | None = None, threads: int | None = 1) -> None:
        super().__init__(threads)
        self.workers, self.address = at_least_one("executor.workers", workers), address
        self._ray: Any = None

    def start(self, engine: Scorer, make: Make) -> None:
        """Connect and start the actors; `InputError` where no cluster answers."""
        try:
            import ray
        except ImportError:
            raise InputError("executor=ray needs Ray: pip install 'mpsearch[ray]'.") from None
        try:
            ray.init(address=self.address, log_to_driver=False, include_dashboard=False if self.address is None else None)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(f"No Ray cluster answers at '{self.address}' ({' '.join(str(error).split())[:200]}).") from None
        actor = ray.remote(num_cpus=self.threads or 1, max_restarts=-1, max_task_retries=3)(_Worker)
        self._ray = ray
        self._actors = [actor.remote(make, self.threads) for _ in range(self.workers)]
        self._busy = [0] * self.workers

    def submit(self, allocation: Allocation, stops: Sequence[Stop] = ()) -> Future[Score]:
        """See `Executor`; goes to the actor that has least to do."""
        worker = self._busy.index(min(self._busy))
        self._busy[worker] += 1
        future: Future[Score] = self._actors[worker].score.remote(allocation, tuple(stops)).future()

        def done(_: Any) -> None:
            self._busy[worker] -= 1

        future.add_done_callback(done)
        return future

    def close(self) -> None:
        """Ends the actors; a cluster that was there goes on."""
        if self._ray is not None:
            self._ray.shutdown()


class _Worker:
    """In an actor: an engine, built when it starts."""

    def __init__(self, make: Make, threads: int | None) -> None:
        self._scorer = made_in_worker(make, threads)

    def score(self, allocation: Allocation, stops: tuple[Stop, ...]) -> Score:
        """The allocation's score on the search split."""
        with quiet():
            return self._scorer.score(allocation, "search", stops)
