"""Dask: the workers of a cluster that is there already, on one host or many.

On hosts: `dask scheduler` on one, `dask worker tcp://head:8786 --nthreads 1` on each; dask-jobqueue, dask-kubernetes and
dask-cuda start the same on SLURM, Kubernetes and GPUs. The workers need mpsearch, the model's code and the data where this
process has them. A worker that is lost is Dask's to replace: its work is done again elsewhere.
"""

from __future__ import annotations

import threading
import uuid
from concurrent.futures import Future
from typing import Any

from mpsearch.allocation import Allocation
from mpsearch.errors import InputError
from mpsearch.evaluation import Score
from mpsearch.executors.base import Executor, Make, Scorer, made_in_worker
from mpsearch.progress import quiet

RETRIES = 3  # deaths of workers that one evaluation may see
PATIENCE = 10.0  # seconds for the scheduler to answer, and for a first worker to be there

_scorers: dict[str, Scorer] = {}  # in a worker process: of the run that it works for
_lock = threading.Lock()  # an engine scores one allocation at a time


class Dask(Executor):
    """The cluster whose scheduler answers at `address` ("tcp://head:8786")."""

    def __init__(self, address: str, threads: int | None = 1) -> None:
        super().__init__(threads)
        self.address = address
        self._client: Any = None
        self._futures: dict[Any, Future[Score]] = {}

    def start(self, engine: Scorer, make: Make) -> None:
        """Connect; `InputError` where no scheduler or no worker answers."""
        try:
            from distributed import Client
        except ImportError:
            raise InputError("executor=dask needs Dask's distributed: pip install 'mpsearch[dask]'.") from None
        try:
            self._client = Client(self.address, timeout=PATIENCE, set_as_default=False)
            self._client.wait_for_workers(1, timeout=PATIENCE)
        except (OSError, ValueError, TimeoutError) as error:
            raise InputError(
                f"No Dask cluster with a worker answers at '{self.address}' ({' '.join(str(error).split()) or 'time-out'}). "
                "Start one: dask scheduler; dask worker tcp://HOST:8786 --nthreads 1."
            ) from None
        self.workers = sum(self._client.nthreads().values())
        self._run = uuid.uuid4().hex
        self._make = self._client.scatter(make, broadcast=True, hash=False)

    def submit(self, allocation: Allocation) -> Future[Score]:
        """See `Executor`."""
        promised: Future[Score] = Future()
        running = self._client.submit(_score, self._run, self._make, self.threads, allocation, pure=False, retries=RETRIES)
        self._futures[running] = promised

        def done(future: Any) -> None:
            if self._futures.pop(future, None) is None or promised.done():
                return
            if future.status == "finished":
                promised.set_result(future.result())
            elif future.status == "error":
                promised.set_exception(future.exception())
            else:
                promised.set_exception(
                    InputError(f"The Dask cluster at '{self.address}' dropped an evaluation ({future.status}).")
                )

        running.add_done_callback(done)
        return promised

    def close(self) -> None:
        """Disconnect; the cluster goes on for others."""
        if self._client is None:
            return
        left = list(self._futures)
        self._futures.clear()
        self._client.cancel(left)
        self._client.close()


def _score(run: str, make: Make, threads: int | None, allocation: Allocation) -> Score:
    """In a worker: its engine, built for the first work of a run, scores."""
    with _lock, quiet():
        if run not in _scorers:
            _scorers.clear()
            _scorers[run] = made_in_worker(make, threads)
        return _scorers[run].score(allocation, "search")
