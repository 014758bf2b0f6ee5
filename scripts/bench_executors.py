"""How well executors use their workers."""

import functools
import importlib.util
import time
from collections import deque
from collections.abc import Iterator

import numpy as np
from harness import Row, UnavailableError, benchmark

from mpsearch.allocation import Allocation
from mpsearch.evaluation import Score
from mpsearch.executors.base import Executor
from mpsearch.executors.dask import Dask
from mpsearch.executors.local import Local
from mpsearch.executors.ray import Ray


class Sleeper:
    """Stands for an engine whose evaluations take `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def score(self, allocation: Allocation, split: str = "search") -> Score:
        """A score of nothing, after sleeping."""
        time.sleep(self.seconds)
        return Score(0, 0, 0, 0, 0, 0, 1, np.zeros(0))


def efficiency(executor: Executor, seconds: float, n: int) -> float:
    """Evaluations a second over `workers / seconds`, twice as many in flight as there are workers."""
    with executor:
        executor.start(Sleeper(seconds), functools.partial(Sleeper, seconds))
        for future in [executor.submit(Allocation({"g": f"first{i}"})) for i in range(6 * executor.workers)]:
            future.result()  # each worker has built its engine
        start, running = time.perf_counter(), deque()
        for i in range(n):
            if len(running) == 2 * executor.workers:
                running.popleft().result()
            running.append(executor.submit(Allocation({"g": str(i)})))
        for future in running:
            future.result()
        return n * seconds / executor.workers / (time.perf_counter() - start)


@benchmark(
    "executors",
    executor=("local", "dask", "ray"),
    seconds=(0.1,),
    evaluations=(160,),
    quick={"executor": ("local",), "seconds": (0.01,), "evaluations": (8,)},
)
def executors(executor: str, seconds: float, evaluations: int) -> Iterator[Row]:
    """Evaluations that only sleep, on 2 local processes, and on 8 workers of Dask and of Ray that are started here."""
    if importlib.util.find_spec({"dask": "distributed", "ray": "ray"}.get(executor, "sys")) is None:
        raise UnavailableError(f"pip install -e '.[{executor}]'")
    if executor == "dask":
        from distributed import LocalCluster

        with LocalCluster(n_workers=8, threads_per_worker=1, dashboard_address=None) as cluster:
            value = efficiency(Dask(cluster.scheduler_address), seconds, evaluations)
    else:
        value = efficiency(Ray(8) if executor == "ray" else Local(2), seconds, evaluations)
    yield {"value": value, "unit": "share of the ideal"}
