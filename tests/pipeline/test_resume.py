"""Killed at any moment and started again: the same trials go on, none lost, none paid twice. In real processes, really killed."""

import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest

# `python -m mpsearch`, also from a source tree that is not installed, where conf/ is not inside the package.
LAUNCH = """
import importlib.util, pathlib, sys, mpsearch
if importlib.util.find_spec("mpsearch.conf") is None:
    conf = pathlib.Path(mpsearch.__file__).parents[1] / "conf"
    spec = importlib.util.spec_from_file_location("mpsearch.conf", conf / "__init__.py", submodule_search_locations=[str(conf)])
    sys.modules["mpsearch.conf"] = mpsearch.conf = importlib.util.module_from_spec(spec)
from mpsearch.cli import main
sys.argv[0] = "mpsearch"
main()
"""
N_TRIALS = 60
SEARCH = (f"n_trials={N_TRIALS}", "n_seeds=12", "seed=3", "scheme=[w2,w3,w4,w8]", "budget.bits=4.5", "confirm.n_points=4")


def start(*words, cwd):
    """`mpsearch search` in a process of its own; one thread, so that two at a time do not fight for cores."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH, "search", *words],
        cwd=cwd,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """Wait for its end, which must be a good one; its stderr."""
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    return stderr


def rows(folder):
    """The whole rows of evaluations.csv so far."""
    file = folder / "evaluations.csv"
    return file.read_bytes().count(b"\n") - 1 if file.exists() else 0


def kill_at(process, folder, n_rows):
    """Kill the process, without a warning, once it has written `n_rows` rows; how many there were then."""
    deadline = time.monotonic() + 60
    while rows(folder) < n_rows:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "no rows"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return rows(folder)


def table(folder, name="evaluations"):
    """All of a table except the times, and the checksums that cover them."""
    rows = pd.read_csv(folder / f"{name}.csv", dtype=str, keep_default_na=False)
    return rows.drop(columns=["seconds", "measured_ms", "measured_ms_low", "measured_ms_high", "crc"], errors="ignore")


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["front", "nsga2", "tpe"])
def test_a_killed_run_goes_on_as_if_nothing_was(tmp_path, sampler):
    words = (*SEARCH, f"sampler={sampler}")
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    uninterrupted = start(*words, f"hydra.run.dir={whole}", cwd=tmp_path)
    process = start(*words, f"hydra.run.dir={killed}", cwd=tmp_path)
    n_rows = kill_at(process, killed, 25)
    assert n_rows < N_TRIALS, "killed in the middle"
    sensitivity = (killed / "sensitivity.csv").read_bytes()

    file = killed / "evaluations.csv"
    kept = file.read_bytes().splitlines(keepends=True)[: n_rows + 1]
    file.write_bytes(b"".join(kept)[:-9])  # as if the kill had come in the middle of a row
    finish(start(f"run={killed}", cwd=tmp_path))
    finish(uninterrupted)

    assert file.read_bytes().startswith(b"".join(kept[:-1])), "what was measured stays as it was"
    assert (killed / "sensitivity.csv").read_bytes() == sensitivity
    expected, found = table(whole), table(killed)
    asked = found[found.trial != ""]
    assert asked.trial.astype(int).tolist() == list(range(len(asked)))
    assert len(asked) == N_TRIALS
    pd.testing.assert_frame_equal(found, expected)
    for name in ("front", "uniform"):
        pd.testing.assert_frame_equal(table(killed, name), table(whole, name))
    for name in ("sensitivity.csv", "space.json"):
        assert (killed / name).read_text() == (whole / name).read_text(), name
    assert set(found.split) == {"search", "confirm"}

    if sampler == "front":  # once is enough: it takes seconds to start
        before = file.read_bytes()
        finish(start(f"run={killed}", cwd=tmp_path))
        assert file.read_bytes() == before, "a run that has ended measures nothing when it is started again"
