"""How well executors use their workers."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

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


@contextlib.contextmanager
def cluster(n_workers: int) -> Iterator[str]:
    """The address of a Dask scheduler with so many workers, while the block runs."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
    scheduler = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    address = next(line.split()[-1] for line in scheduler.stderr or () if "Scheduler at:" in line)
    command = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--nthreads", "1", "--nworkers", str(n_workers)]
    workers = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment)
    try:
        from distributed import Client

        with Client(address) as client:
            client.wait_for_workers(n_workers, timeout=120)
        yield address
    finally:
        for process in (workers, scheduler):
            process.terminate()
            process.wait()


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
    with cluster(8) if executor == "dask" else contextlib.nullcontext("") as address:
        made = {"local": lambda: Local(2), "dask": lambda: Dask(address), "ray": lambda: Ray(8)}[executor]()
        yield {"value": efficiency(made, seconds, evaluations), "unit": "share of the ideal"}
