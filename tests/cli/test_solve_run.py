"""`mpsearch solve`: its answer is dominated by nothing within the budgets, and the command that it prints exports it."""

import json
import re
import shlex
import sys

import pytest
from conftest import without_figures

from mpsearch.cli import main
from mpsearch.runs.run import Run


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    """A quick run of the digits within 40 kB, and what runs a command in its place: `command(*words)` -> what it printed."""
    place = tmp_path_factory.mktemp("solve")

    def command(capsys, monkeypatch, *words):
        monkeypatch.chdir(place)
        monkeypatch.setattr(sys, "argv", ["mpsearch", *words])
        capsys.readouterr()
        without_figures(monkeypatch)
        main()
        return capsys.readouterr().out

    return place, command


@pytest.mark.parametrize(
    ("asked", "column", "limit"),
    [
        (["budget.bytes=30kB"], "size_bytes", 30_000),
        (["budget.bytes=70kB"], "size_bytes", 70_000),  # more than the run was searched within
        (["budget.bit_operations=6e7"], "bit_operations", 6e7),
        (["max_drop=0.02"], None, None),
    ],
    ids=lambda words: words[0] if isinstance(words, list) else None,
)
@pytest.mark.thin(4)
def test_the_answer_is_exported_by_the_command_that_is_printed(solved, asked, column, limit, capsys, monkeypatch):
    place, command = solved
    if not (place / "run").exists():
        quick = ["scheme=[w2a8,w4a8,w8a8]", "quantizer=round_to_nearest", "metric=weight_mse", "cost=[bytes,bits,bit_operations]"]
        quick += ["refiner=null", "n_trials=12"]  # refined points may dominate the answer, which is solved without refinement
        command(capsys, monkeypatch, "search", *quick, "budget.bytes=40kB", "hydra.run.dir=run")
    said = command(capsys, monkeypatch, "solve", "run=run", *asked)
    printed = shlex.split(re.search(r"export a point: (mpsearch export .*)", said)[1])
    command(capsys, monkeypatch, *printed[1:])
    exported = json.loads((place / "run/allocation.json").read_text())
    result = Run.load(place / "run")
    schemes = {name: layer["scheme"]["name"] for name, layer in exported["layers"].items()}
    (answer,) = (e for e in result.on("search").values() if dict(e.allocation) == schemes)
    assert printed[-1] == f"pick.point={answer.allocation.id}"
    assert exported["scores"]["confirm"]["loss"] == result.on("confirm")[answer.allocation].loss
    within = [
        e
        for e in result.on("search").values()
        if (column == "size_bytes" or e.size_bytes <= 40_000) and (column is None or e.cost(column) <= limit)
    ]
    assert answer in within
    dominating = [e for e in within if e.size_bytes <= answer.size_bytes and e.loss < answer.loss]
    assert not dominating
    if column:
        assert answer.loss == min(e.loss for e in within)
    else:
        front = [e for e in within if not any(o.size_bytes <= e.size_bytes and o.loss < e.loss for o in within)]
        floating = result.baseline().quality
        assert answer.size_bytes == min(e.size_bytes for e in front if floating - e.quality <= 0.02)
