"""What a watcher sees of a run in progress."""

import re
import threading

import pytest

from mpsearch import progress
from mpsearch.cli.show import progress_lines, progress_table
from mpsearch.errors import InputError
from mpsearch.files import locked
from mpsearch.pipeline.watch import look, watched


def test_a_watcher_sees_the_phase_and_ends_with_the_run(tmp_path):
    with pytest.raises(InputError, match="is not a run folder"):
        look(tmp_path)
    with locked(tmp_path), progress.recorded(tmp_path), progress.phase("search", 4) as advance:
        advance("3.00 bits")
        now = look(tmp_path)
        assert (now.phases[-1].what, now.phases[-1].total, now.finished) == ("search", 4, False)
        assert now.front == ()
        seen = []
        thread = threading.Thread(target=lambda: seen.extend(watched(tmp_path, 0.01)))
        thread.start()
    thread.join(30)
    assert not thread.is_alive()
    assert seen[-1].finished
    assert seen[-1].phases[-1].done == 1


def test_the_command_watches_a_finished_run(mpsearch, undrawn, capsys, tmp_path):
    code, errors = mpsearch(
        "search", "n_trials=6", "scheme=[w2,w4]", "quantizer=round_to_nearest", "metric=weight_mse", "refiner=null"
    )
    assert code == 0, errors
    (folder,) = (tmp_path / "reports").iterdir()
    now = look(folder)
    assert now.finished
    assert now.n_evaluations > 6
    assert {phase.what for phase in now.phases} >= {"calibrate", "search", "confirm"}
    capsys.readouterr()
    code, errors = mpsearch("watch", f"run={folder}", "every_seconds=0.01")
    assert code == 0, errors
    text = "\n".join(progress_lines(now))
    assert re.search(r"confirm: (\d+) of \1 in \d+ s; latest: \d\.\d\d bits", text)
    assert "the run is finished" in text
    columns = [str(column.header) for column in progress_table(now).columns]
    assert columns == ["bits per weight", "bytes", "loss: softmax KL (nats)", "accuracy %"]
    code, errors = mpsearch("watch", f"run={folder}", "every_seconds=0")
    assert code == 2
    assert "every_seconds must be a number above 0" in errors
