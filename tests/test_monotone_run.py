"""A run whose bits never fall along the blocks, with a pin and a budget beside: searched, gone on with, solved, exported."""

import json

import pandas as pd
import pytest

from mpsearch.exporters.native import load_allocation
from mpsearch.result import SearchResult

BLOCKS = [f"block{i}.{name}" for i in (1, 2, 3) for name in ("conv1", "conv2", "shortcut.0") if (i, name) != (1, "shortcut.0")]
FAST = ("quantizer=clip_search", "n_seeds=6", "hydra.run.dir=run")
WORDS = ("scheme=[w2,w3,w4,w8]", 'monotone=["block*:rising"]', 'pin=["block2.conv1:w3|w8"]', "budget.bits=4.5")


def in_order(row, space):
    """Whether the schemes of a row of evaluations.csv never fall along the blocks."""
    codes = {value["code"]: int(name[1:]) for name, value in space["schemes"].items()}
    bits = dict(zip((group["name"] for group in space["groups"]), (codes[c] for c in row), strict=True))
    assert bits["block2.conv1"] in (3, 8)
    along = [bits[name] for name in BLOCKS]
    return along == sorted(along)


def test_a_monotone_run(mpsearch, tmp_path):
    assert mpsearch("search", *WORDS, *FAST, "n_trials=14")[0] == 0
    folder = tmp_path / "run"
    space = json.loads((folder / "space.json").read_text())["space"]
    assert space["monotone"] == [BLOCKS]
    assert "Bits never fall along 8 layers, from `block1.conv1` to `block3.shortcut.0`" in (folder / "report.md").read_text()
    before = pd.read_csv(folder / "evaluations.csv", dtype=str, keep_default_na=False)

    assert mpsearch("search", "run=run", "n_trials=20")[0] == 0
    for name in ("pin", "monotone"):
        code, said = mpsearch("search", "run=run", f"{name}=[]")
        assert code == 2
        assert f"'{name}' cannot change when a run goes on" in said
    assert mpsearch("solve", "run=run", "budget.bits=3.6")[0] == 0
    rows = pd.read_csv(folder / "evaluations.csv", dtype=str, keep_default_na=False)
    assert (rows.allocation[: len(before)] == before.allocation).all()
    trials = rows[rows.trial != ""]
    assert len(trials) == 20
    assert all(in_order(row, space) for row in trials.allocation)
    assert all(in_order(row, space) for row in rows.allocation[rows.feasible == "True"] if row)

    result = SearchResult.load(folder)
    assert all(result.space.order.holds(result.space.choice(e.allocation)) and e.average_bits <= 4.5 for e in result.front)
    assert mpsearch("export", "run=run", "pick.bits=3.6")[0] == 0
    exported = load_allocation(folder / "allocation.json")
    bits = [int(exported.schemes[name][1:]) for name in BLOCKS]
    assert bits == sorted(bits)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (['monotone=["blok*:rising"]'], "monotone 'blok*:rising' matches no layer."),
        (['monotone=["linear:falling"]'], "monotone 'linear:falling' matches 'linear' alone; it takes two"),
        (['monotone=["block*:up"]'], "A line of monotone reads 'pattern:rising' or 'pattern:falling'; 'block*:up' came."),
        (['monotone=["*:rising","stem:rising"]'], "monotone 'stem:rising' matches 'stem' alone"),
        (
            ['monotone=["*:rising","block1*:rising"]'],
            "'block1.conv1' is in two lines of monotone, '*:rising' and 'block1*:rising'",
        ),
        (
            ['monotone=["*:rising"]', 'pin=["stem:w8","linear:w2"]'],
            "no more bits in 'stem' than in 'linear', but w8 is the least",
        ),
        (
            ['monotone=["*:rising"]', 'pin=["stem:w8"]', "budget.bits=4"],
            "Raise the budget, add a smaller scheme, or loosen a pin or m",
        ),
    ],
)
def test_what_cannot_be_is_said_at_the_door(mpsearch, tmp_path, words, sentence):
    code, said = mpsearch("search", *words, *FAST, "n_trials=5")
    assert code == 2
    assert sentence in said
    assert not (tmp_path / "run").exists(), "nothing was measured"
