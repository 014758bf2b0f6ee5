"""Ray: one actor a worker, on a cluster that is there already or on this machine; actors that die are started again.

On hosts: `ray start --head` on one, `ray start --address=head:6379` on each; KubeRay starts the same on Kubernetes. The workers
need mpsearch, the model's code and the data where this process has them.
"""

from __future__ import annotations

import logging
import socket
import threading
from concurrent.futures import Future
from typing import Any

from mpsearch.allocation import Allocation
from mpsearch.errors import InputError, check_integer
from mpsearch.evaluation import Score
from mpsearch.executors.base import Executor, Make, Scorer, made_in_worker
from mpsearch.progress import quiet

RETRIES = 3  # deaths of its actor that one evaluation may see
PATIENCE = 10.0  # seconds for the cluster's port to answer


class Ray(Executor):
    """`workers` actors on the cluster at `address` ("head:6379"; "auto": the one of this host; `None`: one started here)."""

    def __init__(self, workers: int = 2, address: str | None = None, threads: int | None = 1) -> None:
        super().__init__(threads)
        check_integer("executor.workers", workers)
        self.workers, self.address = workers, address
        self._ray: Any = None
        self._lock = threading.Lock()

    def start(self, engine: Scorer, make: Make) -> None:
        """Connect and start the actors; `InputError` where no cluster answers, or one with too few CPUs for them."""
        try:
            import ray
        except ImportError:
            raise InputError("executor=ray needs Ray: pip install 'mpsearch[ray]'.") from None
        cpus = self.threads or 1
        # The size of a running cluster is given.
        size = {"num_cpus": cpus * self.workers, "include_dashboard": False} if self.address is None else {}
        try:
            _knock(self.address)
            ray.init(address=self.address or "local", log_to_driver=False, logging_level=logging.ERROR, **size)
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(
                f"No Ray cluster answers at '{self.address}' ({' '.join(str(error).split())[:200]}). "
                "Start one: ray start --head; ray start --address=HOST:6379."
            ) from None
        self._ray = ray
        most = int(ray.cluster_resources().get("CPU", 0)) // cpus
        if most < self.workers:
            raise InputError(f"The Ray cluster has CPUs for {most} workers of {cpus} each; got executor.workers={self.workers}.")
        actor = ray.remote(num_cpus=cpus, max_restarts=-1, max_task_retries=RETRIES)(_Worker)
        self._actors = [actor.remote(make, self.threads) for _ in range(self.workers)]
        self._busy = [0] * self.workers

    def submit(self, allocation: Allocation) -> Future[Score]:
        """See `Executor`; goes to the actor that has least to do."""
        promised: Future[Score] = Future()
        with self._lock:
            worker = self._busy.index(min(self._busy))
            self._busy[worker] += 1
        running = self._actors[worker].score.remote(allocation)

        def done(future: Future[Score]) -> None:
            with self._lock:
                self._busy[worker] -= 1
            error = future.exception()
            if error is None:
                promised.set_result(future.result())
            elif isinstance(error, self._ray.exceptions.RayTaskError):
                promised.set_exception(error.cause)  # without Ray's traceback
            else:
                promised.set_exception(
                    InputError(
                        f"An evaluation saw {RETRIES + 1} Ray workers die (too little memory for {self.workers} of them?). "
                        "Take a smaller executor.workers, or executor=in_process; its messages say more."
                    )
                )

        running.future().add_done_callback(done)
        return promised

    def close(self) -> None:
        """Ends the actors; a cluster that was there goes on."""
        if self._ray is not None:
            self._ray.shutdown()


def _knock(address: str | None) -> None:
    """`OSError` where nobody is at "host:port": Ray itself would try for minutes."""
    host, _, port = (address or "").rpartition("/")[2].rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), PATIENCE).close()


class _Worker:
    """In an actor: an engine, built for its first work, so that an error there comes back as any other."""

    def __init__(self, make: Make, threads: int | None) -> None:
        self._make, self._threads = make, threads
        self._scorer: Scorer | None = None

    def score(self, allocation: Allocation) -> Score:
        """The allocation's score on the search split."""
        if self._scorer is None:
            self._scorer = made_in_worker(self._make, self._threads)
        with quiet():
            return self._scorer.score(allocation, "search")
