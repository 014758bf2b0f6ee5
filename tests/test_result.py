"""A run's folder: every row as it was, the torn one dropped, and anything else that is damaged named with file and line."""

import dataclasses
import json
import math
import subprocess
import sys
import textwrap
import zlib

import numpy as np
import pytest

from mpsearch.allocation import Allocation, SearchSpace
from mpsearch.errors import InputError
from mpsearch.evaluation import Evaluation, SensitivityTable
from mpsearch.layer import LayerSpec
from mpsearch.result import SENSITIVITY_COLUMNS, RunFolder, SearchResult, evaluation_columns, evaluation_row
from mpsearch.schemes.floating import Float
from mpsearch.schemes.integer import Integer

SPACE = SearchSpace.build(
    [LayerSpec(name, "linear", (4, 6), 24, name, (name,)) for name in ("a", 'b, quoted "c"', "ü")],
    {"w2": Integer(2), "w4g3": Integer(4, 3, symmetric=False), "bf16": Float("bfloat16")},
    other_bits=96,
)
IDENTITY = {
    "space": SPACE.to_dict(),
    "quality_name": "accuracy",
    "metric": {"name": "kl", "unit": "nats"},
    "model_sha256": "ab" * 32,
    "budgets": {"bits": 3.5},
}


def evaluation(choice=(0, 1, 2), trial=0, split="search", origin="sampler", **values):
    rng = np.random.default_rng(zlib.crc32(repr((choice, trial)).encode()))  # hash(None) differs from run to run
    numbers = dict(
        zip(("loss", "cross_entropy", "quality", "quality_low", "quality_high", "fraction"), rng.random(6), strict=True)
    )
    numbers = {key: float(value) for key, value in numbers.items()}
    allocation = SPACE.allocation(choice) if choice else Allocation()
    size = (SPACE.size_bits(np.array(choice) if choice else None) + 7) // 8
    fixed = {"size_bytes": size, "average_bits": 10 / 3, "feasible": True, "n_samples": 400, "seconds": 0.1 + 0.2}
    return Evaluation(trial=trial, origin=origin, allocation=allocation, split=split, **{**numbers, **fixed, **values})


EVALUATIONS = [
    evaluation((), None, origin="float", loss=0.0),
    evaluation((2, 2, 2), None, origin="uniform", feasible=False, loss=math.inf),
    evaluation((0, 0, 0), 0, origin="uniform", loss=5e-324, fraction=1e300),
    evaluation((0, 1, 0), 1, origin="knapsack", quality=0.1 + 0.7),
    evaluation((0, 1, 0), 2),
    evaluation((0, 1, 0), None, split="confirm", packed=True),
]


@pytest.fixture
def run(tmp_path):
    """A whole folder: identity, sensitivity, evaluations."""
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.identify(IDENTITY)
    for i, group in enumerate(SPACE.names):
        for j, scheme in enumerate(SPACE.scheme_names):
            row = (group, scheme, "kl", (i + 1) / 3**j, int(SPACE.storage_bits[i, j]))
            folder.append("sensitivity", dict(zip(SENSITIVITY_COLUMNS, row, strict=True)))
    for e in EVALUATIONS:
        folder.append("evaluations", evaluation_row(e, SPACE, "accuracy"))
    return folder


def test_evaluations_come_back_exactly(run):
    assert run.read_evaluations(SPACE, "accuracy") == EVALUATIONS


def test_sensitivities_come_back_exactly(run):
    known = run.read_sensitivity(SPACE, "kl")
    assert len(known) == 9
    assert known["ü", "w4g3"] == 1.0
    assert known['b, quoted "c"', "bf16"] == 2 / 9


def test_effects_come_back_exactly_and_what_is_damaged_is_refused(run):
    assert run.read_effects(SPACE) is None
    effects = np.arange(18, dtype=np.float32).reshape(2, 3, 3)
    run.write_effects(effects)
    assert np.array_equal(run.read_effects(SPACE), effects)
    assert np.array_equal(SearchResult.load(run.path).sensitivity.effects, effects)
    run.write_effects(effects[:, :2])
    with pytest.raises(InputError, match=r"effects.npy is of another run: float32 \[2, 2, 3\] for 3 groups and 3 schemes"):
        run.read_effects(SPACE)
    (run.path / "effects.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(InputError, match=r"effects.npy is damaged .* Delete it, and it is measured again"):
        run.read_effects(SPACE)
    np.save(run.path / "effects.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match=r"damaged"):
        run.read_effects(SPACE)


def test_a_run_is_loaded_from_its_folder_alone(run):
    result = SearchResult.load(run.path)
    assert result.space == SPACE
    assert result.evaluations == EVALUATIONS
    assert result.budgets == {"bits": 3.5}
    assert result.sensitivity.unit == "nats"
    assert result.sensitivity.values[0].tolist() == [1.0, 1 / 3, 1 / 9]
    frame = result.to_frame()
    assert tuple(frame.columns) == evaluation_columns("accuracy")
    assert len(frame) == len(EVALUATIONS)
    assert frame.allocation.tolist() == ["", "222", "000", "010", "010", "010"]


def test_the_quality_has_its_own_name():
    columns = evaluation_columns("perplexity")
    assert columns[:3] == ("trial", "origin", "allocation")
    assert {"perplexity", "perplexity_low", "perplexity_high"} <= set(columns)
    assert not any("quality" in column for column in columns)


def test_what_a_result_says():
    values = np.ones((3, 3))
    rows = [
        evaluation((), None, origin="float"),
        evaluation((0, 0, 0), 0, size_bytes=10, loss=3.0),
        evaluation((1, 1, 1), 1, size_bytes=20, loss=1.0),
        evaluation((0, 1, 1), 2, size_bytes=15, loss=3.5),
        evaluation((1, 0, 1), 3, size_bytes=12, loss=2.0, feasible=False),
        evaluation((2, 2, 2), None, size_bytes=30, loss=0.5, feasible=False),
        evaluation((1, 1, 0), 4, size_bytes=18, loss=math.inf),
        evaluation((1, 1, 0), 5, size_bytes=18, loss=1.5),
        evaluation((0, 0, 1), 6, size_bytes=5, loss=0.1, split="confirm"),
    ]
    result = SearchResult(SPACE, "accuracy", rows, SensitivityTable("kl", "nats", values, SPACE))
    assert [e.size_bytes for e in result.front] == [10, 20], "feasible, finite, of the search split, the first of a repeat"
    assert [(s, e.size_bytes) for s, e in result.uniform] == [("w2", 10), ("w4g3", 20), ("bf16", 30)]
    assert result.baseline() is rows[0]
    assert result.baseline("confirm") is None
    assert result.on("confirm") == {rows[-1].allocation: rows[-1]}
    assert Allocation() not in result.on("search")


@pytest.mark.parametrize("table", ["evaluations", "sensitivity"])
def test_a_torn_last_row_is_dropped(run, table):
    """Cut at every place in the last row, as a kill may: all other rows are there, and the next one follows them."""
    file = run.path / f"{table}.csv"
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    start = len(whole) - len(lines[-1])
    read = {
        "evaluations": lambda: run.read_evaluations(SPACE, "accuracy"),
        "sensitivity": lambda: run.read_sensitivity(SPACE, "kl"),
    }
    for cut in range(start, len(whole)):
        file.write_bytes(whole[:cut])
        assert len(read[table]()) == len(lines) - 2, "a reader drops it, too"
        run.mend(table)
        assert file.read_bytes() == whole[:start]
        if table == "evaluations":
            run.append(table, evaluation_row(EVALUATIONS[-1], SPACE, "accuracy"))
            assert file.read_bytes() == whole


def test_a_torn_header_is_written_again(run):
    file = run.path / "evaluations.csv"
    file.write_bytes(b"trial,orig")
    run.mend("evaluations")
    assert file.read_bytes() == b""
    assert run.read_evaluations(SPACE, "accuracy") == []
    run.append("evaluations", evaluation_row(EVALUATIONS[0], SPACE, "accuracy"))
    assert run.read_evaluations(SPACE, "accuracy") == EVALUATIONS[:1]


def test_a_tail_of_zeros_or_noise_is_a_torn_row(run):
    """As a file system leaves it where the power went."""
    file = run.path / "evaluations.csv"
    whole = file.read_bytes()
    for tail in (bytes(100), b"3,sampler,\xff\xfe\x00"):
        file.write_bytes(whole + tail)
        run.mend("evaluations")
        assert file.read_bytes() == whole


def test_what_is_whole_is_not_touched(run):
    before = {path.name: path.read_bytes() for path in run.path.iterdir()}
    for table in ("evaluations", "sensitivity", "absent"):
        run.mend(table)
    assert {path.name: path.read_bytes() for path in run.path.iterdir()} == before


DAMAGE = {
    "allocation": (",010,", ",0100,", r"line 5: '0100' is no allocation of 3 groups and 3 schemes"),
    "scheme": (",010,", ",013,", r"line 5: '013' is no allocation"),
    "number": (",300,", ",3x0,", r"line 2: invalid literal for int\(\) with base 10: '3x0'"),
    "origin": ("knapsack", "knapsock", r"line 5: 'knapsock' is none of float, uniform, knapsack, sampler"),
    "split": ("search", "serch", r"line 2: 'serch' is none of search, confirm"),
    "truth": ("False", "Falsch", r"line 2: 'Falsch' is none of True, False"),
    "size": (",300,", ",1,", r"line 2: size_bytes is 1, but its allocation weighs 300"),
    "twice": ("\n1,knapsack", "\n0,knapsack", r"line 5: trial 0 stands there twice"),
    "too few": (",300,", ",", r"line 2: 17 values for 18 columns"),
    "too many": (",300,", ",1,2,", r"line 2: 19 values for 18 columns"),
    "header": ("trial,origin", "origin,trial", r"its first line is not trial,origin,allocation"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_evaluations_are_named_with_their_line(run, what):
    before, after, sentence = DAMAGE[what]
    file = run.path / "evaluations.csv"
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after, 1))
    with pytest.raises(
        InputError, match=rf"evaluations.csv is damaged: {sentence}.*(Delete that line|Restore it).* start a new run"
    ):
        run.read_evaluations(SPACE, "accuracy")
    with pytest.raises(InputError, match=str(file)):
        SearchResult.load(run.path)


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ("a,w2,", "z,w2,", "line 2: no kl of a group and scheme of this run"),
        ("a,w4g3,kl", "a,w4g3,fisher", "line 3: no kl of a group"),
        ("a,w2,kl,1.0", "a,w2,kl,one", "line 2: 'one' is no number"),
        ("group,scheme", "group;scheme", "first line is not group,scheme,metric,value,size_bits"),
    ],
)
def test_damaged_sensitivities_are_named_with_their_line(run, before, after, sentence):
    file = run.path / "sensitivity.csv"
    file.write_text(file.read_text().replace(before, after, 1))
    with pytest.raises(InputError, match=f"sensitivity.csv is damaged: .*{sentence}"):
        run.read_sensitivity(SPACE, "kl")


def test_bytes_that_are_no_text_are_named(run):
    file = run.path / "evaluations.csv"
    file.write_bytes(file.read_bytes().replace(b"sampler", b"s\xffmpler"))
    with pytest.raises(InputError, match=r"evaluations.csv is damaged: 'utf-8' codec"):
        run.read_evaluations(SPACE, "accuracy")


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[1, 2]",
        lambda text: "\x00",
        lambda text: json.dumps({key: value for key, value in json.loads(text).items() if key != "space"}),
        lambda text: json.dumps({key: value for key, value in json.loads(text).items() if key != "metric"}),
        lambda text: json.dumps({**json.loads(text), "space": []}),
        lambda text: json.dumps({**json.loads(text), "space": {"schemes": {}, "groups": [{}], "other_bits": 0}}),
        lambda text: text.replace('"bits": 2', '"wits": 2', 1),
        lambda text: text.replace('"kind"', '"kinds"', 1),
    ],
)
def test_a_damaged_identity_is_named(run, damage):
    file = run.path / "space.json"
    file.write_text(damage(file.read_text()))
    with pytest.raises(InputError, match=r"space.json is damaged \(.*\). Restore it, or start a new run"):
        SearchResult.load(run.path)


def test_schemes_that_are_not_ours_must_be_given(run):
    file = run.path / "space.json"
    file.write_text(file.read_text().replace('"class": "Float"', '"class": "Posit"'))
    with pytest.raises(InputError, match="'Posit' is no known scheme"):
        SearchResult.load(run.path)
    assert SearchResult.load(run.path, SPACE.schemes).space == SPACE


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(InputError, match=r"is no run folder: it holds no space.json"):
        SearchResult.load(tmp_path)


def test_the_same_identity_is_let_in(run):
    run.identify(IDENTITY)
    run.identify({"model_sha256": "ab" * 32})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_sha256": "cd" * 32}, r"it has another model sha256 \(abababababab… there, cdcdcdcdcdcd… here\)"),
        ({"budgets": {"bits": 3.0}}, "it has another budgets in bits"),
        ({"budgets": {"bits": 3.5, "bytes": 10}}, "it has another budgets in bytes"),
        ({"quality_name": "perplexity"}, r"it has another quality name \(accuracy there, perplexity here\)"),
        ({"space": {**SPACE.to_dict(), "other_bits": 0}}, "it has another space in other_bits"),
        ({"bias_correction": True}, r"it has another bias correction \(None there, True here\)"),
    ],
)
def test_another_identity_is_refused(run, change, sentence):
    before = (run.path / "space.json").read_bytes()
    with pytest.raises(InputError, match=f"belongs to another run: {sentence}. Start a new run"):
        run.identify({**IDENTITY, **change})
    assert (run.path / "space.json").read_bytes() == before


def test_a_scheme_of_the_same_name_with_other_fields_is_another_run(run):
    other = dataclasses.replace(SPACE, schemes={**SPACE.schemes, "w4g3": Integer(4, 6, symmetric=False)})
    with pytest.raises(InputError, match="it has another space in schemes"):
        run.identify({"space": other.to_dict()})


def test_one_process_at_a_time(run):
    """A second process is turned away while this one writes."""
    code = f"""
        from mpsearch.errors import InputError
        from mpsearch.result import RunFolder
        try:
            with RunFolder({str(run.path)!r}).locked():
                print("let in")
        except InputError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with run.locked():
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"Another process is at work in {run.path}. Wait for it" in said
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "let in\n"
