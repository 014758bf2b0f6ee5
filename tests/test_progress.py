"""One line per phase in a file, a live bar on a terminal, nothing in a worker."""

import contextlib
import io
import itertools
import json
import time

import pytest
from rich.console import Console

from mpsearch import memory, progress
from mpsearch.files import locked


@pytest.fixture
def written(monkeypatch):
    """The text that goes to stderr, which is no terminal."""
    stream = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=stream))
    return stream


def test_a_phase_is_one_line_in_a_file(written):
    with progress.phase("search", 3) as advance:
        for note in ("a", "b", "c"):
            advance(note)
            assert written.getvalue() == ""
    (line,) = written.getvalue().splitlines()
    assert line.startswith("search: 3/3 in ")
    assert line.endswith(" s c")


def test_a_long_phase_says_how_long_it_will_still_take(written, monkeypatch):
    clock = iter([0.0, 61.0, 61.0, 61.0, 90.0, 130.0, 130.0, 130.0, 131.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.phase("search", 12, done=8) as advance:
        for _ in range(3):
            advance()
    assert written.getvalue().splitlines() == [
        "search: 9/12 in 61.0 s, 183 s left",
        "search: 11/12 in 130.0 s, 43 s left",
        "search: 11/12 in 131.0 s",
    ]


def test_a_resumed_phase_without_steps_ends_at_once(written):
    with progress.phase("search", 4, done=4):
        pass
    assert written.getvalue().startswith("search: 4/4 in 0.0 s")


def test_a_terminal_has_a_bar_from_the_first_second(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=stream, force_terminal=True, width=120))
    with progress.phase("quantize", 2) as advance:
        advance("conv1")
    assert "quantize" in stream.getvalue()
    assert "1/2" in stream.getvalue()
    assert "conv1" in stream.getvalue()


def test_a_phase_inside_another_is_a_row_of_the_same_display(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(progress, "console", Console(file=stream, force_terminal=True, width=120))
    with progress.phase("quantize", 2) as outer:
        with progress.phase("hessians", 1) as inner:
            inner("batch")
        outer("conv1")
    assert all(word in stream.getvalue() for word in ("quantize", "hessians", "1/1", "1/2"))


def test_a_worker_shows_nothing(written):
    with progress.quiet(), progress.phase("search", 1) as advance:
        advance("note")
    assert written.getvalue() == ""


def test_the_time_left_follows_the_work_of_each_step(written, monkeypatch):
    clock = iter([0.0, 61.0, 61.0, 61.0, 70.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.phase("quantize", 3, work=[6.0, 2.0, 4.0]) as advance:
        advance()
    assert written.getvalue().splitlines()[0] == "quantize: 1/3 in 61.0 s, 61 s left"


def test_a_sentence_is_said_once(written):
    for _ in range(2):
        progress.say_once("A sentence of test_progress.")
    assert written.getvalue() == "A sentence of test_progress.\n"


def test_phases_are_recorded_for_the_page_and_for_watchers(written, tmp_path):
    with locked(tmp_path), progress.recorded(tmp_path):
        with progress.phase("calibrate", 2) as advance:
            advance()
            advance("done")
        with progress.phase("search", 10, done=4) as advance:
            assert not progress.read_phases(tmp_path)[-1].finished
            advance("3 bits")
            with progress.quiet(), progress.phase("worker", 1):
                pass
    first, second = progress.read_phases(tmp_path)
    assert (first.what, first.done, first.total, first.finished, first.note) == ("calibrate", 2, 2, True, "done")
    assert (second.what, second.done, second.total, second.finished) == ("search", 5, 10, True)
    assert first.peak_bytes is None or 10**7 < first.peak_bytes < 10**11
    with progress.recorded(tmp_path), progress.phase("search", 10, done=5):
        pass
    assert [each.what for each in progress.read_phases(tmp_path)] == ["calibrate", "search", "search"]
    with contextlib.suppress(KeyboardInterrupt), progress.recorded(tmp_path), progress.phase("confirm", 3):
        raise KeyboardInterrupt
    last = progress.read_phases(tmp_path).pop()
    assert (last.what, last.done, last.total, last.finished) == ("confirm", 0, 3, True), "nobody is at work any more"
    with progress.phase("export", 1):
        pass
    assert len(progress.read_phases(tmp_path)) == 4, "outside of a run nothing is recorded"


TEXT_AS_BYTES = json.dumps([vars(progress.Phase("search", 1)) | {"peak_bytes": "1"}])


def test_a_phase_knows_the_most_memory_that_the_process_held(written, tmp_path, monkeypatch):
    held = itertools.cycle([3, 5, 4])
    monkeypatch.setattr(memory, "WATCH_EVERY_SECONDS", 0.001)
    monkeypatch.setattr(memory, "anonymous_bytes", lambda: next(held))
    with progress.recorded(tmp_path), progress.phase("search", 1):
        time.sleep(0.2)
    assert progress.read_phases(tmp_path)[0].peak_bytes == 5


def test_memory_is_known_where_the_system_says(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "STATUS", tmp_path / "status")
    assert memory.anonymous_bytes() is None
    (tmp_path / "status").write_text("VmHWM:\t 9 kB\nRssAnon:\t  2048 kB\nRssFile: 1 kB\n")
    assert memory.anonymous_bytes() == 2**21


def test_a_record_without_memory_is_read(tmp_path):
    old = vars(progress.Phase("search", 1))
    del old["peak_bytes"]
    (tmp_path / progress.FILE).write_text(json.dumps([old]))
    assert progress.read_phases(tmp_path)[0].peak_bytes is None


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '[{"what": 3}]', '[{"what": "a", "total": "x", "done": 0}]', "[null]", TEXT_AS_BYTES]
)
def test_a_damaged_record_of_progress_is_none(tmp_path, text):
    (tmp_path / progress.FILE).write_text(text)
    assert progress.read_phases(tmp_path) == []
