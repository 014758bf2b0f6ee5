"""How well executors use their workers, with evaluations that only sleep 0.1 s: evaluations a second over the workers' ideal.

    python scripts/bench_executors.py [--json FILE]      # needs mpsearch[dask,ray]; both clusters, of 8 workers, are started here

160 evaluations, twice as many under way as there are workers, after a first few for each worker, which builds its engine. Written
to reports/bench_executors/.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import numpy as np
from pages import Row, machine, write

from mpsearch.allocation import Allocation
from mpsearch.evaluation import Score
from mpsearch.executors.base import Executor
from mpsearch.executors.dask import Dask
from mpsearch.executors.local import Local
from mpsearch.executors.ray import Ray

SECONDS = 0.1


class Sleeper:
    """Takes its time."""

    def score(self, allocation: Allocation, split: str = "search") -> Score:
        """A score of nothing after `SECONDS`."""
        time.sleep(SECONDS)
        return Score(0, 0, 0, 0, 0, 0, 1, np.zeros(0))


def efficiency(executor: Executor, n: int = 160) -> float:
    """Evaluations a second over `workers / SECONDS`."""
    with executor:
        executor.start(Sleeper(), functools.partial(Sleeper))
        for future in [executor.submit(Allocation({"g": f"first{i}"})) for i in range(6 * executor.workers)]:
            future.result()
        start, running = time.perf_counter(), deque[object]()
        for i in range(n):
            if len(running) == 2 * executor.workers:
                running.popleft().result()  # type: ignore[attr-defined]
            running.append(executor.submit(Allocation({"g": str(i)})))
        for future in running:
            future.result()  # type: ignore[attr-defined]
        return n * SECONDS / executor.workers / (time.perf_counter() - start)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    path = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0"]
    scheduler = subprocess.Popen([*command, "--no-dashboard"], stderr=subprocess.PIPE, text=True, env=path)
    assert scheduler.stderr is not None
    address = next(line.split()[-1] for line in scheduler.stderr if "Scheduler at:" in line)
    command = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--nthreads", "1", "--nworkers", "8"]
    workers = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=path)
    rows: list[Row] = []
    try:
        from distributed import Client

        with Client(address) as client:
            client.wait_for_workers(8, timeout=120)
        cases: list[tuple[str, float, Executor]] = [
            ("local, 2 workers", 0.95, Local(2)),
            ("Dask, 8 workers", 0.9, Dask(address)),
            ("Ray, 8 workers", 0.9, Ray(8)),
        ]
        for name, bar, executor in cases:
            rows.append({"what": "efficiency at 0.1 s", "case": name, "value": efficiency(executor), "bar": bar})
            print(rows[-1], flush=True)
    finally:
        for process in (workers, scheduler):
            process.terminate()
    rows.append(machine())
    table = ["| executor | share of the ideal | bar |", "| --- | ---: | ---: |"]
    table += [f"| {row['case']} | {row['value']:.3f} | {row['bar']} |" for row in rows[:-1]]
    page = ["# bench_executors: evaluations that sleep 0.1 s", "", *table, "", str(rows[-1]["case"])]
    write("bench_executors", page, rows, arguments.json)


if __name__ == "__main__":
    main()
