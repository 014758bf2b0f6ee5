"""`max_seconds` bounds the whole run: what there is no time for is left out and said, what a run needs never is."""

import dataclasses
import types
from concurrent.futures import Future

import optuna
import pytest

import mpsearch
from mpsearch.executors.in_process import InProcess
from mpsearch.metrics.kl import KL
from mpsearch.pipeline.confirm import confirm
from mpsearch.pipeline.evaluators import ConfirmEvaluator, SearchEvaluator
from mpsearch.pipeline.refine import RefiningEvaluator
from mpsearch.pipeline.search import search
from mpsearch.pipeline.sensitivity import measure_sensitivity
from mpsearch.runs.deadline import Deadline
from mpsearch.runs.left_out import read_left_out, write_left_out
from mpsearch.runs.run import Run
from mpsearch.samplers.base import Problem, build_sampler

SECONDS = 10.0  # of an evaluation


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Slow(InProcess):
    """Each evaluation takes `SECONDS` by the clock."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def submit(self, allocation):
        score = super().submit(allocation).result()
        self.clock.now += SECONDS
        future = Future()
        future.set_result(dataclasses.replace(score, seconds=SECONDS))
        return future


class SlowConfirm(ConfirmEvaluator):
    def __init__(self, *args, clock):
        super().__init__(*args)
        self.clock = clock

    def run_packed(self, allocation):
        self.clock.now += SECONDS
        return super().run_packed(allocation)


@pytest.fixture(scope="module")
def engine(tiny):
    return tiny.engine(tiny.net(), tiny.task())


@pytest.fixture(scope="module")
def table(engine):
    return measure_sensitivity(engine, KL())


def searched(engine, table, clock, deadline, n_trials=27):
    executor = Slow(clock)
    executor.start(engine)
    evaluate = SearchEvaluator(engine, executor=executor)
    search(
        evaluate,
        build_sampler(optuna.samplers.RandomSampler, Problem(table, (), [])),
        n_trials=n_trials,
        n_seeds=4,
        deadline=deadline,
    )
    return evaluate


def test_an_end_and_its_parts():
    clock = Clock()
    deadline = Deadline(100, clock)
    part = deadline.part(0.4)
    assert (deadline.left, part.left) == (100, pytest.approx(40))
    clock.now += 50
    assert (deadline.left, part.left) == (50, pytest.approx(-10))
    assert deadline.affordable(9, 20) == 2
    assert part.affordable(9, 1) == 0
    assert part.part(0.5).left == pytest.approx(-10), "what is late stays late"
    part.leave_out("3 of 4 trials")
    deadline.leave_out("refinement")
    assert deadline.sentence() == "To end within max_seconds=100, the run left out 3 of 4 trials, refinement."
    endless = Deadline(None, clock)
    assert endless.part(0.5).affordable(10**6, 10**6) == 10**6
    assert endless.sentence() == ""


@pytest.mark.parametrize("seconds", [120, 160, 200])
def test_trials_and_references_end_in_time(engine, table, seconds):
    clock = Clock()
    deadline = Deadline(seconds, clock)
    evaluate = searched(engine, table, clock, deadline)
    assert clock.now - 1000 <= 1.1 * seconds
    trials = evaluate.log.trials()
    assert 0 < len(trials) < 27
    assert f"{27 - len(trials)} of 27 trials" in deadline.sentence()
    assert {engine.space.uniform(s) for s in engine.space.scheme_names} <= {e.allocation for e in evaluate.log}


def test_however_late_it_is_there_is_a_front(engine, table):
    clock = Clock()
    evaluate = searched(engine, table, clock, Deadline(1e-3, clock))
    assert not evaluate.log.trials()
    measured = {e.allocation for e in evaluate.log}
    assert {engine.space.uniform(s) for s in engine.space.scheme_names} <= measured
    assert Run(engine.space, "accuracy", evaluate.log, table).front


class Halves:
    """A refinement that takes `SECONDS` and leaves the weights as they are."""

    def __init__(self, clock):
        self.clock = clock

    def start(self, engine):
        def refine(allocation, files):
            self.clock.now += SECONDS
            return engine

        return refine


def confirmed(engine, table, monkeypatch, tmp_path, seconds, refine_seconds=None):
    clock = Clock()
    log = searched(engine, table, Clock(), None).log
    monkeypatch.setattr("mpsearch.pipeline.evaluators.time", types.SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr("mpsearch.pipeline.refine.time", types.SimpleNamespace(perf_counter=clock))
    evaluate = SlowConfirm(engine, log, clock=clock)
    if refine_seconds is not None:
        evaluate = RefiningEvaluator(evaluate, Halves(clock), tmp_path)
    run, deadline = Run(engine.space, "accuracy", log, table), Deadline(seconds, clock)
    points = confirm(evaluate, run, None, deadline=deadline, refine_seconds=refine_seconds or 0.0)
    return run, points, deadline, clock.now - 1000


@pytest.mark.parametrize("seconds", [60, 75, 1000])
def test_as_many_points_are_confirmed_as_time_allows(engine, table, monkeypatch, tmp_path, seconds):
    run, points, deadline, taken = confirmed(engine, table, monkeypatch, tmp_path, seconds)
    assert taken <= 1.1 * seconds
    assert [p.scheme for p in points if p.scheme] == list(engine.space.scheme_names)
    n = sum(p.scheme is None for p in points)
    assert 1 <= n <= len(run.front)
    assert (n == len(run.front)) == (seconds == 1000)
    assert (deadline.sentence() == "") == (n == len(run.front))


def test_refinement_is_left_out_where_what_is_always_confirmed_would_end_too_late(engine, table, monkeypatch, tmp_path):
    _, points, deadline, _ = confirmed(engine, table, monkeypatch, tmp_path, 100, refine_seconds=SECONDS)
    assert "refinement" in deadline.sentence()
    assert len(points) >= 4
    _, _, deadline, _ = confirmed(engine, table, monkeypatch, tmp_path, 10000, refine_seconds=SECONDS)
    assert deadline.sentence() == ""


def test_what_was_left_out_is_said_and_in_the_report_until_a_resumed_run_does_it(tiny, tmp_path, capsys):
    def run(max_seconds):
        return mpsearch.search(
            tiny.net(), tiny.task(), schemes=["w2", "w4", "w8"], n_trials=8, folder=tmp_path, max_seconds=max_seconds
        )

    result = run(1e-3)
    sentence = "To end within max_seconds=0.001, the run left out 8 of 8 trials, refinement"
    assert sentence in capsys.readouterr().err
    assert read_left_out(tmp_path)[0].startswith(sentence)
    result.report()
    assert all(sentence in (tmp_path / page).read_text() for page in ("index.html", "report.md"))
    assert result.confirmed is not None
    resumed = run(None)
    assert sum(e.trial is not None for e in resumed.run.evaluations) == 8
    assert read_left_out(tmp_path) == []


def test_an_empty_sentence_is_no_file(tmp_path):
    write_left_out(tmp_path, "")
    assert not list(tmp_path.iterdir())
