"""Every trial that was told is in the mirror once, whatever becomes of the database on the way."""

import getpass
import json
import os
import socket
import subprocess
import threading
from pathlib import Path
from wsgiref.util import setup_testing_defaults

import optuna
import pytest

from mpsearch.errors import InputError
from mpsearch.evaluation import EvaluationLog
from mpsearch.metrics.kl import KL
from mpsearch.pipeline.evaluators import SearchEvaluator
from mpsearch.pipeline.mirror import Mirror
from mpsearch.pipeline.search import search
from mpsearch.pipeline.sensitivity import measure_sensitivity
from mpsearch.samplers.base import Problem
from mpsearch.samplers.front import Front
from mpsearch.schemes.integer import Integer

PINNED = "last"


@pytest.fixture
def sqlite(tmp_path):
    return f"sqlite:///{tmp_path}/trials.db"


@pytest.fixture
def postgresql(tmp_path_factory):
    """A private PostgreSQL server on loopback; it refuses to run as root, which lends its folder to `nobody`."""
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not programs:
        pytest.skip("no PostgreSQL server is installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = Path(subprocess.run(["mktemp", "-d"], check=True, capture_output=True, text=True).stdout.strip())
    user = []
    if getpass.getuser() == "root":
        user = ["runuser", "-u", "nobody", "--"]
        subprocess.run(["chown", "nobody", folder], check=True)

    def run(program, *words):
        subprocess.run([*user, programs[-1] / program, "-D", folder / "data", *words], check=True, stdout=subprocess.DEVNULL)

    run("initdb", "--auth=trust", "--username=mirror", "--no-sync")
    run("pg_ctl", "-w", "-l", folder / "log", "-o", f"-p {port} -h 127.0.0.1 -k {folder}", "start")
    yield f"postgresql://mirror@127.0.0.1:{port}/postgres"
    run("pg_ctl", "-w", "-m", "immediate", "stop")
    subprocess.run(["rm", "-r", folder], check=True)


@pytest.fixture(scope="module")
def engine(tiny):
    return tiny.engine(tiny.net(), tiny.task(), {f"w{n}": Integer(n) for n in (2, 3, 4, 6, 8)}, pin=[f"{PINNED}:w4"])


def searched(engine, mirror, n_trials, known=()):
    sampler = Front(Problem(measure_sensitivity(engine, KL()), seed=7))
    return search(SearchEvaluator(engine, EvaluationLog(known)), sampler, n_trials=n_trials, n_seeds=4, finished=mirror)


def assert_mirrors(url, evaluations, space):
    expected = sorted((e for e in evaluations if e.trial is not None), key=lambda e: e.trial)
    storage = optuna.storages.RDBStorage(url)
    study = optuna.load_study(study_name="run", storage=storage)
    assert study.metric_names == ["log10 loss", "size_bytes"]
    assert [t.user_attrs["allocation"] for t in study.trials] == [space.encode(e.allocation) for e in expected]
    for trial, e in zip(study.trials, expected, strict=True):
        assert trial.params == {group: scheme for group, scheme in e.allocation.items() if group != PINNED}
        assert trial.values[1] == e.size_bytes
    front = [trial.number for trial in study.best_trials]
    storage.engine.dispose()
    return front


@pytest.mark.parametrize("storage", ["sqlite", "postgresql"])
def test_a_run_and_what_is_added_to_it_is_mirrored_once(storage, request, engine):
    url = request.getfixturevalue(storage)
    with Mirror(url, "run", engine.space, ["size_bytes"]) as mirror:
        first = searched(engine, mirror, 12)
    assert_mirrors(url, first, engine.space)
    with Mirror(url, "run", engine.space, ["size_bytes"]) as mirror:
        more = searched(engine, mirror, 16, first)
    assert assert_mirrors(url, more, engine.space), "a front"
    assert len({e.allocation for e in more if e.trial is not None}) == 16


def test_the_mirror_opens_in_optuna_dashboard(sqlite, engine):
    """Through its WSGI application, as a server would call it."""
    dashboard = pytest.importorskip("optuna_dashboard", reason="optuna-dashboard is not installed")
    with Mirror(sqlite, "run", engine.space, ["size_bytes"]) as mirror:
        log = searched(engine, mirror, 8)
    storage = optuna.storages.RDBStorage(sqlite)
    app = dashboard.wsgi(storage)

    def get(path):
        environ = {}
        setup_testing_defaults(environ)
        answers = []
        body = app(environ | {"PATH_INFO": path}, lambda status, headers, exc_info=None: answers.append(status))
        content = b"".join(body)
        assert answers == ["200 OK"]
        return json.loads(content)

    (study,) = get("/api/studies")["study_summaries"]
    assert study["study_name"] == "run"
    shown = get(f"/api/studies/{study['study_id']}")
    assert len(shown["trials"]) == sum(e.trial is not None for e in log)
    assert {trial["state"] for trial in shown["trials"]} == {"Complete"}
    storage.engine.dispose()


def test_a_database_that_goes_away_costs_a_warning_and_no_trial(sqlite, engine, monkeypatch):
    mirror = Mirror(sqlite, "run", engine.space, ["size_bytes"])
    add_trial = mirror._study.add_trial
    refused = threading.Event()

    def gone(trial):
        refused.set()
        raise OSError("no route to host")

    def goes_away(evaluation):
        if evaluation.trial == 3:
            monkeypatch.setattr(mirror._study, "add_trial", gone)
        mirror(evaluation)
        if evaluation.trial == 3:
            assert refused.wait(10)

    with pytest.warns(UserWarning, match="mirror") as warned, mirror:
        first = searched(engine, goes_away, 12)
    assert ["the search goes on" in str(w.message) for w in warned] == [True, False]
    assert "in the mirror (OSError: no route to host); resume with study.mirror= for the rest" in str(warned[1].message)

    mirror = Mirror(sqlite, "run", engine.space, ["size_bytes"])
    monkeypatch.setattr(mirror._study, "add_trial", gone)
    refused.clear()

    def comes_back(evaluation):
        mirror(evaluation)
        if evaluation.trial == 13:
            assert refused.wait(10)
            monkeypatch.setattr(mirror._study, "add_trial", add_trial)

    with pytest.warns(UserWarning, match="the search goes on"), mirror:
        more = searched(engine, comes_back, 16, first)
    assert_mirrors(sqlite, more, engine.space)


def test_a_study_of_another_run_is_not_written_to(sqlite, engine):
    with Mirror(sqlite, "run", engine.space, ["size_bytes"]) as mirror:
        first = searched(engine, mirror, 12)
    with (
        Mirror(sqlite, "run", engine.space, ["size_bytes"]) as mirror,
        pytest.raises(InputError, match=r"'run' .* of another run"),
    ):
        searched(engine, lambda evaluation: mirror(first[-1]), 12)
    assert_mirrors(sqlite, first, engine.space)


def test_what_cannot_be_opened_is_a_sentence(engine, tmp_path):
    for url in (f"sqlite:///{tmp_path}/no/such/folder.db", "nothing", f"nothing://{os.sep}"):
        with pytest.raises(InputError, match=r"study\.mirror=.* cannot be opened \(.+\)\. Give the address of a database"):
            Mirror(url, "run", engine.space, ["size_bytes"])
