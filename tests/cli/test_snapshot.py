"""`report` and `export` beside a search that is at work: they read what is whole, and never wait."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from mpsearch.errors import InputError
from mpsearch.pipeline.result import redrawn
from mpsearch.reporting import report


@pytest.fixture
def stubbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A loader that returns how long `evaluations.csv` is, and a report that fails until the table has `enough` bytes."""
    told = SimpleNamespace(folder=tmp_path, enough=0, loaded=[])
    table = tmp_path / "evaluations.csv"

    def load() -> SimpleNamespace:
        told.loaded.append(table.stat().st_size if table.exists() else 0)
        return SimpleNamespace(run=told.loaded[-1])

    def write_report(result: int, folder: Path, picked: object, every_figure: bool = False) -> Path:
        if result < told.enough:
            with table.open("a") as stream:  # by the search, in this moment
                stream.write("row\n")
            raise InputError("confirm.csv has a row that was not measured")
        return folder / "report.md"

    told.load = load
    monkeypatch.setattr(report, "write_report", write_report)
    return told


def test_tables_that_grow_meanwhile_are_read_again(stubbed: SimpleNamespace) -> None:
    stubbed.enough = 8
    result, picked, page = redrawn(stubbed.folder, lambda run: "picked", stubbed.load)
    assert (result.run, picked, page.name) == (8, "picked", "report.md")
    assert stubbed.loaded == [0, 4, 8]


def test_damage_is_told_where_nothing_grows(stubbed: SimpleNamespace) -> None:
    def refuse(result: object) -> None:
        raise InputError("damaged")

    with pytest.raises(InputError, match="damaged"):
        redrawn(stubbed.folder, refuse, stubbed.load)
    assert stubbed.loaded == [0]
