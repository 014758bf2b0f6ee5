"""Latency as a cost: the sum of what was measured, and every way in which a table may not be the right one."""

import dataclasses

import numpy as np
import pytest

from mpsearch.allocation import SearchSpace
from mpsearch.costs.latency import REST, Latency, LatencyMs, read_latency, write_latency
from mpsearch.errors import InputError
from mpsearch.layer import LayerSpec
from mpsearch.schemes.integer import Integer

LAYERS = [LayerSpec(name, "linear", (4, 4), 16, group, (name,)) for name, group in (("q", "qk"), ("k", "qk"), ("o", "o"))]
SPACE = SearchSpace.build(LAYERS, {"w2": Integer(2), "w8": Integer(8)}, ["o:w8"])
MS = {("q", "w2"): 1.0, ("k", "w2"): 2.0, ("q", "w8"): 4.0, ("k", "w8"): 8.0, ("o", "w8"): 16.0}
ROWS = [
    Latency(REST, "", "", REST, 3, 2, "avx2", 0.5),
    *(Latency(layer, "linear", "3x4", scheme, 3, 2, "avx2", ms) for (layer, scheme), ms in MS.items()),
]


def test_a_network_is_the_sum_of_its_layers_and_the_rest(tmp_path):
    path = tmp_path / "latency.csv"
    write_latency(path, ROWS)
    assert read_latency(path) == ROWS
    assert [file.name for file in tmp_path.iterdir()] == ["latency.csv"]
    table = LatencyMs(3, str(path)).table(SPACE)
    assert (table.name, table.column, table.constant) == ("latency_ms", "latency_ms", 0.5)
    assert table.cost_of([0, 1]) == 0.5 + 1 + 2 + 16
    assert table.cost_of([1, 1]) == 0.5 + 4 + 8 + 16
    assert np.isfinite(table.values).all()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda rows: rows[:-1], "has no latency of layer 'o' in scheme 'w8' for a batch of 3"),
        (lambda rows: rows[1:], "has no latency of layer 'qk' in scheme 'w2'"),
        (lambda rows: [dataclasses.replace(row, batch_size=1) for row in rows], "for a batch of 3. Measure this model"),
        (
            lambda rows: [dataclasses.replace(rows[0], milliseconds=-1.0), *rows[1:]],
            "line 2, column 'milliseconds': got '-1.0', expected a",
        ),
        (
            lambda rows: [dataclasses.replace(rows[0], threads="two"), *rows[1:]],
            "line 2, column 'threads': got 'two', expected an",
        ),
    ],
)
def test_a_table_that_does_not_fit(tmp_path, change, sentence):
    write_latency(tmp_path / "latency.csv", change(ROWS))
    with pytest.raises(InputError, match=sentence):
        LatencyMs(3, str(tmp_path / "latency.csv")).table(SPACE)


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ("16.0", "17.0", "line 7: its values do not match its checksum"),
        (
            "k,linear,3x4,w2,3,2,avx2,2.0,",
            "k,linear,3x4,w2,3,2,avx2,nan,",
            "line 4, column 'milliseconds': got 'nan'",
        ),
        (
            "q,linear,3x4,w8",
            "q,linear,3x4,w2",
            "line 5, column 'scheme': got 'w2'",
        ),
    ],
)
def test_a_damaged_table_is_named(tmp_path, before, after, sentence):
    path = tmp_path / "latency.csv"
    write_latency(path, ROWS)
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))
    with pytest.raises(InputError, match=f"latency.csv is damaged: {sentence}"):
        read_latency(path)
    for cut in (text[:-1], text[: text[:-1].rindex("\n") + 1], text.replace(",crc", "", 1), ""):
        path.write_text(cut)
        with pytest.raises(InputError, match=r"latency.csv is damaged: line \d"):
            read_latency(path)


def test_a_table_made_by_hand_needs_no_checksum(tmp_path):
    path = tmp_path / "latency.csv"
    write_latency(path, ROWS)
    path.write_text("".join(line.rpartition(",")[0] + "\n" for line in path.read_text().splitlines()))
    assert read_latency(path) == ROWS


def test_no_table(tmp_path):
    with pytest.raises(InputError, match=r"There is no latency table .*Measure one: mpsearch hardware"):
        LatencyMs(1, str(tmp_path / "none.csv")).table(SPACE)
    with pytest.raises(InputError, match="has no table to read"):
        LatencyMs().table(SPACE)
    with pytest.raises(InputError, match=r"batch_size must be an integer of at least 1; got 0"):
        LatencyMs(0)
    (tmp_path / "front.csv").write_text("size_bytes,loss\n3,0.5\n")
    with pytest.raises(
        InputError,
        match=r"front.csv is damaged: line 1: expected the columns layer,op,shape,",
    ):
        LatencyMs(1, str(tmp_path / "front.csv")).table(SPACE)
