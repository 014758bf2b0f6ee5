"""Wherever trials are measured, in this process, in a pool or on a Dask or Ray cluster, the same seed gives the same trials."""

import functools
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import wait

import conftest
import numpy as np
import pytest

from mpsearch.allocation import Allocation
from mpsearch.errors import InputError
from mpsearch.evaluation import EvaluationLog, Score
from mpsearch.executors.dask import Dask
from mpsearch.executors.in_process import InProcess
from mpsearch.executors.local import Local
from mpsearch.executors.ray import Ray
from mpsearch.metrics.kl import KL
from mpsearch.pipeline.evaluators import SearchEvaluator
from mpsearch.pipeline.search import search
from mpsearch.pipeline.sensitivity import measure_sensitivity
from mpsearch.samplers.base import Problem
from mpsearch.samplers.front import Front

FOLDER = os.path.dirname(conftest.__file__)
PATH = f"{FOLDER}{os.pathsep}{os.path.dirname(__file__)}"  # of workers
CLUSTERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("dask", "ray")]


def tiny_engine():
    sys.path.insert(0, FOLDER)  # in a worker
    return conftest.make_engine(conftest.tiny_net(), conftest.tiny_task(n=48, batch_size=6))


class Sleeper:
    """Takes its time, and notes in a folder each allocation that it has scored."""

    def __init__(self, folder, seconds=0.05):
        self.folder, self.seconds = folder, seconds

    def score(self, allocation, split="search"):
        time.sleep(self.seconds)
        name = "-".join(allocation.values())
        with open(os.path.join(self.folder, f"{name}.{os.getpid()}.{time.monotonic_ns()}"), "x"):
            pass
        return Score(float(name or 0), 0, 0, 0, 0, 0, 1, np.zeros(0))


@pytest.fixture(scope="module")
def cluster():
    """A Dask scheduler and two workers with a nanny on loopback: processes, as on hosts of their own."""
    path = {**os.environ, "PYTHONPATH": PATH, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard"]
    scheduler = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=path)
    address = None
    for line in scheduler.stderr:
        if "Scheduler at:" in line:
            address = line.split()[-1]
            break
    reader = threading.Thread(target=scheduler.stderr.read, daemon=True)  # else its pipe fills
    reader.start()
    command = [
        sys.executable,
        "-m",
        "distributed.cli.dask_worker",
        address,
        "--nthreads",
        "1",
        "--nworkers",
        "2",
        "--no-dashboard",
    ]
    workers = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=path)
    yield address
    for process in (workers, scheduler):
        process.terminate()
        process.wait()
    reader.join()
    scheduler.stderr.close()


@pytest.fixture(scope="module")
def ray_cluster():
    """The address of a Ray cluster of two nodes with a CPU each: processes on loopback, as on hosts of their own."""
    pytest.importorskip("ray.cluster_utils", reason="Ray is not installed")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PATH)
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        yield cluster.address
        cluster.shutdown()


@pytest.fixture
def executor(request):
    """By its name: a cluster is started for who asks for it."""
    if request.param == "dask":
        return Dask(request.getfixturevalue("cluster"))
    if request.param == "ray":
        return Ray(2, request.getfixturevalue("ray_cluster"))
    return {"in_process": InProcess(threads=1), "local": Local(2)}[request.param]


def trials(engine, executor, known=(), n_trials=24, record=lambda e: None, in_flight=4):
    with executor:
        executor.start(engine, tiny_engine)
        table = measure_sensitivity(engine, KL(), executor=executor)
        evaluate = SearchEvaluator(engine, EvaluationLog(known, record), executor=executor)
        search(evaluate, Front(Problem(table, seed=7)), n_trials=n_trials, n_seeds=4, in_flight=in_flight)
    found = sorted((e for e in evaluate.log if e.trial is not None), key=lambda e: e.trial)
    return [(e.trial, e.origin, dict(e.allocation), e.loss, e.n_samples) for e in found]


@pytest.fixture(scope="module")
def engine():
    return tiny_engine()


@pytest.fixture(scope="module")
def expected(engine):
    return trials(engine, InProcess(threads=1))


def test_no_allocation_is_tried_twice(expected):
    assert [trial for trial, *_ in expected] == list(range(24))
    assert len({tuple(allocation.items()) for _, _, allocation, *_ in expected}) == 24


@pytest.mark.parametrize("executor", ["in_process", "local", *CLUSTERS], indirect=True)
def test_the_same_trials_wherever_they_are_measured(engine, expected, executor):
    assert trials(engine, executor) == expected


@pytest.mark.parametrize("in_flight", [1, 4])
def test_a_run_that_was_cut_anywhere_goes_on_the_same(engine, in_flight):
    whole = []
    first = trials(engine, InProcess(), record=whole.append, in_flight=in_flight)
    rng = np.random.default_rng(0)
    for k in (1, 9, 14, 20, len(whole)):
        known = [whole[i] for i in sorted(rng.permutation(len(whole))[:k])]  # a pool's rows come in any order
        added = []
        assert trials(engine, InProcess(), known, record=added.append, in_flight=in_flight) == first
        assert len(added) == len(whole) - k


def names(folder):
    return sorted(name.split(".")[0] for name in os.listdir(folder))


@pytest.mark.parametrize("executor", ["local", *CLUSTERS], indirect=True)
@pytest.mark.slow
def test_a_worker_that_is_killed_loses_nothing(tmp_path, executor):
    sleeper = Sleeper(str(tmp_path), 0.2)
    with executor:
        executor.start(sleeper, functools.partial(Sleeper, str(tmp_path), 0.2))
        futures = [executor.submit(Allocation({"g": str(i)})) for i in range(12)]
        wait(futures[:3])
        pid = int(next(iter(os.listdir(tmp_path))).split(".")[1])
        os.kill(pid, signal.SIGKILL)
        assert [future.result(timeout=60).loss for future in futures] == list(range(12))
    again = [n for n in set(names(tmp_path)) if names(tmp_path).count(n) > 1]
    assert len(again) <= 2, "what was done is not done again, but for what was under way"


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["local", CLUSTERS[1]], indirect=True)
def test_work_that_kills_its_worker_is_given_up(executor):
    with executor:
        executor.start(None, functools.partial(Killer))
        with pytest.raises(InputError, match=r"The workers died 4 times in a row|An evaluation saw 4 Ray workers die"):
            executor.submit(Allocation()).result(timeout=60)


class Killer:
    def score(self, allocation, split="search"):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_the_workers_end_with_a_coordinator_that_is_killed(tmp_path):
    program = f"""
import functools, os, sys, time
sys.path[:0] = [{FOLDER!r}, {os.path.dirname(__file__)!r}]
from test_executors import Sleeper
from mpsearch.allocation import Allocation
from mpsearch.executors.local import Local
from mpsearch.executors.ray import Ray
if __name__ == "__main__":
    executor = Local(2)
    executor.start(None, functools.partial(Sleeper, {str(tmp_path)!r}, 0.05))
    [executor.submit(Allocation({{"g": str(i)}})) for i in range(10_000)]
    time.sleep(600)
"""
    (tmp_path / "main").mkdir()
    script = tmp_path / "main" / "main.py"
    script.write_text(program)
    process = subprocess.Popen([sys.executable, str(script)])
    deadline = time.monotonic() + 60
    while len(os.listdir(tmp_path)) < 8 and time.monotonic() < deadline:
        time.sleep(0.05)
    pids = {int(name.split(".")[1]) for name in os.listdir(tmp_path) if "." in name}
    process.kill()
    process.wait()
    while time.monotonic() < deadline and any(os.path.exists(f"/proc/{pid}") for pid in pids):
        time.sleep(0.05)
    assert pids
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


@pytest.mark.parametrize("executor", ["in_process", "local", *CLUSTERS], indirect=True)
def test_an_error_of_a_worker_comes_back(executor):
    with executor:
        executor.start(Refuser(), functools.partial(Refuser))
        with pytest.raises(InputError, match=r"^Layer 'x' has no scale\.$"):
            executor.submit(Allocation()).result(timeout=60)


class Refuser:
    def score(self, allocation, split="search"):
        raise InputError("Layer 'x' has no scale.")


def test_bad_settings_are_sentences():
    for wrong in (0, "two", 1.5, True):
        with pytest.raises(InputError, match=r"executor\.workers must be an integer of at least 1; got"):
            Local(wrong)
    with pytest.raises(InputError, match=r"executor\.threads must be an integer of at least 1; got 0"):
        InProcess(threads=0)
    with pytest.raises(InputError, match="No Dask cluster with a worker answers at 'nowhere'"), Dask("nowhere") as executor:
        executor.start(None, None)


def test_a_ray_cluster_that_is_not_there_or_too_small_is_a_sentence(request):
    pytest.importorskip("ray.cluster_utils", reason="Ray is not installed")
    with pytest.raises(InputError, match=r"No Ray cluster answers at '127\.0\.0\.1:1'"), Ray(2, "127.0.0.1:1") as executor:
        executor.start(None, None)
    address = request.getfixturevalue("ray_cluster")
    with pytest.raises(InputError, match=r"has CPUs for 2 workers .* got executor\.workers=3"), Ray(3, address) as executor:
        executor.start(None, None)


def test_what_travels_is_small():
    allocation = Allocation({f"layer{i}": "w4" for i in range(20)})
    assert len(pickle.dumps((allocation, ((1, 0.5), (2, 0.25))))) < 600
