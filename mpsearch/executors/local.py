"""A pool of processes on this machine, spawned (a fork would copy PyTorch's threads in mid-flight)."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import SpawnContext, SpawnProcess
from multiprocessing.process import parent_process
from typing import Any

from mpsearch.allocation import Allocation
from mpsearch.errors import InputError, check_integer
from mpsearch.evaluation import Score
from mpsearch.executors.base import Executor, Make, Scorer, made_in_worker
from mpsearch.progress import quiet

MOST_DEATHS = 3  # in a row, with nothing done between them: then it is the work that kills

_scorer: Scorer


class _Spawn(SpawnContext):
    """Remembers the processes that it started, to kill them."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[SpawnProcess] = []

    def Process(self, *args: Any, **kwargs: Any) -> SpawnProcess:  # type: ignore[override]  # noqa: N802
        """Called by the pool, which starts it at once."""
        process = SpawnProcess(*args, **kwargs)
        self.started.append(process)
        return process


class Local(Executor):
    """`workers` processes. One that is killed breaks the pool, which is made anew and given again what was not done."""

    def __init__(self, workers: int = 2, threads: int | None = 1) -> None:
        super().__init__(threads)
        check_integer("executor.workers", workers)
        self.workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def start(self, engine: Scorer, make: Make) -> None:
        """The workers build their engines when the first work comes."""
        self._make, self._deaths, self._lock = make, 0, threading.Lock()
        self._closed = False
        self._pool = self._new_pool()

    def submit(self, allocation: Allocation) -> Future[Score]:
        """See `Executor`."""
        promised: Future[Score] = Future()
        self._submit(promised, allocation)
        return promised

    def close(self) -> None:
        """Kills the workers: what they do is not wanted any more."""
        if self._pool is None:
            return
        self._closed = True
        for process in self._context.started:
            process.kill()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _new_pool(self) -> ProcessPoolExecutor:
        self._context = _Spawn()
        return ProcessPoolExecutor(self.workers, self._context, initializer=_begin, initargs=(self._make, self.threads))

    def _submit(self, promised: Future[Score], allocation: Allocation) -> None:
        with self._lock:
            pool = self._pool
            assert pool is not None
            try:
                running = pool.submit(_score, allocation)
            except BrokenProcessPool:
                pool = self._renewed(pool)
                running = pool.submit(_score, allocation)

        def done(future: Future[Score]) -> None:
            if self._closed or future.cancelled():
                return
            error = future.exception()
            if error is None:
                self._deaths = 0
                promised.set_result(future.result())
            elif not isinstance(error, BrokenProcessPool):
                promised.set_exception(error)
            else:
                try:
                    with self._lock:
                        self._renewed(pool)
                    self._submit(promised, allocation)
                except InputError as refused:
                    promised.set_exception(refused)

        running.add_done_callback(done)

    def _renewed(self, broken: ProcessPoolExecutor) -> ProcessPoolExecutor:
        """A new pool in the place of the broken one, once for all that were running there."""
        if self._pool is broken:
            self._deaths += 1
            if self._deaths > MOST_DEATHS:
                raise InputError(
                    f"The workers died {self._deaths} times in a row without a result (too little memory for "
                    f"{self.workers} of them?). Take a smaller executor.workers, or executor=in_process; its messages say more."
                )
            self._pool = self._new_pool()
        assert self._pool is not None
        return self._pool


def _begin(make: Make, threads: int | None) -> None:
    """In a worker: build its engine; leave the interrupt to the parent, and end where the parent has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    global _scorer
    _scorer = made_in_worker(make, threads)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _score(allocation: Allocation) -> Score:
    with quiet():
        return _scorer.score(allocation, "search")
