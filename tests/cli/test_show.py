"""The last screen of a command holds at most 25 lines, whatever there is to say."""

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from mpsearch.cli import show
from mpsearch.reporting.summary import Summary

HEADER = ("", "bits", "bits of all", "bytes", "loss\nsearch", "accuracy %\nsearch", "accuracy %\nconfirm")
HEADER += ("drop, points\nconfirm (95 %)", "ms")
CELLS = ("14.24", "14.65", "7,340,032,000", "1.234e-05", "57.75", "60.00", "39.25 (34.19 to 44.15)", "1,234.5")
FOLDER = "/home/a.user/experiments/reports/search-a_model-2026-11-29_22-41-39/run of a long name"
STEPS = tuple(f"{what}: mpsearch export run='{FOLDER}' pick.point=7a49de84b8f3" for what in ("export", "train", "another size"))
TRAINED = (
    "epoch 17 of 20 is kept: loss on search 0.1234 -> 0.01234",
    "accuracy % on confirm: 57.75 -> 60.00, a gain of " + "1 " * 40,
)
PATHS = tuple(f"{FOLDER}/{name}" for name in ("report.md", "pareto.png", "front.csv"))


def screen(monkeypatch, width, n_rows, sentences, said=PATHS):
    """What is printed, as a terminal of that width shows it."""
    rows = [(f"uniform w{i}g128_a_long_name", *CELLS) for i in range(n_rows - 2)]
    about = Summary(
        "164 points on the Pareto front", HEADER, (("float", *CELLS), *rows, ("picked, trained", *CELLS)), sentences, STEPS
    )
    out = io.StringIO()
    monkeypatch.setattr(show, "summary", lambda *_: about)
    monkeypatch.setattr(show, "stdout", lambda: Console(file=out, width=width))
    monkeypatch.setattr("sys.stdout", out)
    show.print_summary(None, None, said=said)
    return out.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 100, 120, 200])
@pytest.mark.parametrize("sentences", [("Picked: " + "w " * 60, *("An answer " * 45, "Times are " * 30, "warning: " * 40))])
@pytest.mark.parametrize("said", [PATHS, (*TRAINED, *PATHS[:2]), ()], ids=["paths", "trained", "alone"])
def test_the_last_screen_has_25_lines(monkeypatch, width, sentences, said):
    lines = screen(monkeypatch, width, 8, sentences, said)
    assert sum(max(1, -(-cell_len(line) // width)) for line in lines) <= 25
    assert tuple(lines[: len(said)]) == said
    assert tuple(lines[-3:]) == STEPS, "commands are whole"
    table = [line for line in lines if line[:1] in "│┃"]
    assert all("… " not in line for line in table)
    for name in ("float", "uniform w0", "uniform w5", "picked, trained"):
        assert sum(name in line for line in table) == 1
    assert sum(CELLS[2] in line for line in table) in (0, len([line for line in table if "│" in line])), "a row is one line"
    assert any(line.startswith("Picked: ") for line in lines)


def test_what_fits_is_shown_whole(monkeypatch):
    lines = screen(monkeypatch, 200, 8, ("Picked: one.", "An answer."))
    assert lines[-5:] == ["Picked: one.", "An answer.", *STEPS]
    assert sum("uniform" in line for line in lines) == 6
    assert "bits of all" in "".join(lines)
