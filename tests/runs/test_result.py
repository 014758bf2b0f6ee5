"""A run's folder: every row as it was, the torn one dropped, and anything else that is damaged named with file and line."""

import csv
import dataclasses
import hashlib
import io
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
from mpsearch.quality import Quality
from mpsearch.reporting.tables import evaluations_table
from mpsearch.runs.evaluation_rows import evaluation_columns, evaluation_row
from mpsearch.runs.run import SENSITIVITY_COLUMNS, Run, RunFolder
from mpsearch.runs.space_json import write_identity
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
    loss, cross_entropy, *qualities = map(float, rng.random(5))
    low, quality, high = sorted(qualities)
    numbers = {"loss": loss, "cross_entropy": cross_entropy, "quality": quality, "quality_low": low, "quality_high": high}
    bits = SPACE.size_bits(np.array(choice) if choice else None)
    sizes = {"size_bytes": (bits + 7) // 8, "average_bits": (bits - 96) / SPACE.numel, "fraction": bits / SPACE.size_bits()}
    fixed = {"feasible": True, "n_samples": 400, "seconds": 0.1 + 0.2}
    allocation = SPACE.allocation(choice) if choice else Allocation()
    return Evaluation(trial=trial, origin=origin, allocation=allocation, split=split, **{**numbers, **sizes, **fixed, **values})


EVALUATIONS = [
    evaluation((), None, origin="float", loss=0.0),
    evaluation((2, 2, 2), None, origin="uniform", feasible=False, loss=math.inf),
    evaluation((0, 0, 0), 0, origin="uniform", loss=5e-324),
    evaluation((0, 1, 0), 1, origin="knapsack", quality=0.1 + 0.7, quality_low=0.1, quality_high=1.1),
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
    assert run.read_evaluations(SPACE, Quality()) == EVALUATIONS


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
    assert np.array_equal(Run.load(run.path).sensitivity.effects, effects)
    run.write_effects(effects[:, :2])
    with pytest.raises(InputError, match=r"effects.npy is of another run: got float32 \[2, 2, 3\] for 3 groups and 3 schemes"):
        run.read_effects(SPACE)
    (run.path / "effects.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(InputError, match=r"effects.npy is damaged: .* Delete it, and it is measured again"):
        run.read_effects(SPACE)
    pickled = io.BytesIO()
    np.save(pickled, np.array([{}], dtype=object), allow_pickle=True)
    (run.path / "effects.npy").write_bytes(pickled.getvalue() + hashlib.sha256(pickled.getvalue()).digest())
    with pytest.raises(InputError, match=r"effects.npy is damaged: .*allow_pickle"):
        run.read_effects(SPACE)


def test_a_run_is_loaded_from_its_folder_alone(run):
    result = Run.load(run.path)
    assert result.space == SPACE
    assert list(result.evaluations) == EVALUATIONS
    assert result.budgets == {"bits": 3.5}
    assert result.sensitivity.unit == "nats"
    assert result.sensitivity.values[0].tolist() == [1.0, 1 / 3, 1 / 9]
    frame = evaluations_table(result)
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
    result = Run(SPACE, "accuracy", rows, SensitivityTable("kl", "nats", values, SPACE))
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
        "evaluations": lambda: run.read_evaluations(SPACE, Quality()),
        "sensitivity": lambda: run.read_sensitivity(SPACE, "kl"),
    }
    for cut in range(start, len(whole)):
        file.write_bytes(whole[:cut])
        assert len(read[table]()) == len(lines) - 2, "a reader drops it, too"
        run.drop_incomplete_row(table)
        assert file.read_bytes() == whole[:start]
        if table == "evaluations":
            run.append(table, evaluation_row(EVALUATIONS[-1], SPACE, "accuracy"))
            assert file.read_bytes() == whole


def test_a_torn_header_is_written_again(run):
    file = run.path / "evaluations.csv"
    file.write_bytes(b"trial,orig")
    run.drop_incomplete_row("evaluations")
    assert file.read_bytes() == b""
    assert run.read_evaluations(SPACE, Quality()) == []
    run.append("evaluations", evaluation_row(EVALUATIONS[0], SPACE, "accuracy"))
    assert run.read_evaluations(SPACE, Quality()) == EVALUATIONS[:1]


def test_a_tail_of_zeros_or_noise_is_a_torn_row(run):
    """As a file system leaves it where the power went."""
    file = run.path / "evaluations.csv"
    whole = file.read_bytes()
    for tail in (bytes(100), b"3,sampler,\xff\xfe\x00"):
        file.write_bytes(whole + tail)
        run.drop_incomplete_row("evaluations")
        assert file.read_bytes() == whole


def test_what_is_whole_is_not_touched(run):
    before = {path.name: path.read_bytes() for path in run.path.iterdir()}
    for table in ("evaluations", "sensitivity", "absent"):
        run.drop_incomplete_row(table)
    assert {path.name: path.read_bytes() for path in run.path.iterdir()} == before


@pytest.mark.parametrize(
    ("line", "column", "text", "sentence"),
    [
        (5, "allocation", "0100", "expected 3 characters, one of 3 schemes for each group"),
        (5, "allocation", "013", "expected 3 characters"),
        (2, "allocation", "000", "expected nothing, for the float model"),
        (2, "size_bytes", "3x0", "expected an integer from 0"),
        (2, "size_bytes", "1", "expected 300, which its allocation and the other rows give"),
        (3, "average_bits", "16.1", "expected 16.0"),
        (3, "fraction", "0.6", r"expected 0\.52"),
        (5, "origin", "knapsock", "expected one of float, uniform, knapsack, sampler"),
        (2, "split", "serch", "expected one of search, confirm"),
        (2, "feasible", "Falsch", "expected one of True, False"),
        (3, "feasible", " False", "expected one of True, False"),
        (5, "trial", "0", "expected a number that no earlier row has"),
        (5, "trial", "-1", "expected an integer from 0"),
        (5, "trial", "+1", "expected an integer from 0"),
        (5, "trial", "1_0", "expected an integer from 0"),
        (5, "accuracy", "3.5", "expected a finite number from 0 to 1"),
        (5, "accuracy_low", "1.2", "expected at least accuracy_low, 1.2"),
        (5, "loss", "nan", "expected a number from 0"),
        (5, "loss", "-0.5", "expected a number from 0"),
        (5, "cross_entropy", "nan", "expected a number"),
        (5, "seconds", "inf", "expected a finite number from 0"),
        (5, "measured_ms", "-1.0", "expected a finite number from 0"),
        (5, "measured_ms_low", "1.0", "expected nothing, as there is no measured_ms"),
        (5, "measured_on", "here", "expected nothing, as there is no measured_ms"),
        (5, "n_samples", "399", "expected 400, which its allocation and the other rows give"),
        (5, "n_samples", "0", "expected an integer from 1"),
        (5, "seconds", "9" * 1000, r"… \(1,000 characters\), expected a finite number"),
        (5, "seconds", "1\0", r"1\\x00', expected a finite number"),
    ],
)
def test_a_wrong_value_is_named_with_its_line_and_column(run, line, column, text, sentence):
    file = run.path / "evaluations.csv"
    rows = list(csv.reader(io.StringIO(file.read_text())))
    rows[line - 1][rows[0].index(column)] = text
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerows(rows)
    file.write_text(written.getvalue())
    column = "accuracy_high" if column == "accuracy_low" else column
    expected = rf"evaluations.csv is damaged: line {line}, column '{column}': got .*{sentence}.*\. Delete that line and"
    with pytest.raises(InputError, match=expected) as caught:
        run.read_evaluations(SPACE, Quality())
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=str(file)):
        Run.load(run.path)


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        (",300,", ",", "line 2: got 23 values for 24 columns"),
        (",300,", ",1,2,", "line 2: got 25 values for 24 columns"),
        ("trial,origin", "origin,trial", "line 1: expected the columns trial,origin,allocation"),
        ("trial,origin", "\ufefftrial,origin", "line 1: expected the columns"),
        (",knapsack,", ',"knapsack,', "line 5: unexpected end of data"),
        (",knapsack,", ',"knap"sack,', "line 5: ',' expected after '\"'"),
        (",knapsack,", f",{'k' * 200_000},", "line 5: field larger than field limit"),
        (",knapsack,", ",sampler,", "line 5: its values do not match its checksum"),
        ("\n1,knapsack", "\n\n1,knapsack", "line 5: got 0 values"),
    ],
)
def test_a_damaged_line_is_named(run, before, after, sentence):
    file = run.path / "evaluations.csv"
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after, 1))
    with pytest.raises(InputError, match=rf"evaluations.csv is damaged: {sentence}"):
        run.read_evaluations(SPACE, Quality())


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [*lines[:3], *lines[4:]],
        lambda lines: [*lines[:3], lines[4], lines[3], *lines[5:]],
        lambda lines: [*lines[:4], lines[3], *lines[4:]],
        lambda lines: [lines[0], *lines],
        lambda lines: lines[1:],
    ],
    ids=["removed", "swapped", "repeated", "second header", "no header"],
)
def test_lines_that_were_moved_are_found(run, change):
    for table, read in (
        ("evaluations", lambda: run.read_evaluations(SPACE, Quality())),
        ("sensitivity", lambda: run.read_sensitivity(SPACE, "kl")),
    ):
        file = run.path / f"{table}.csv"
        file.write_text("".join(change(file.read_text().splitlines(keepends=True))))
        with pytest.raises(InputError, match=rf"{table}.csv is damaged: line \d"):
            read()


def test_a_row_follows_the_last_one_only(run):
    file = run.path / "sensitivity.csv"
    file.write_text(file.read_text()[:-3] + "\n")
    with pytest.raises(InputError, match=r"sensitivity.csv is damaged: it does not end with a whole row"):
        run.append("sensitivity", dict.fromkeys(SENSITIVITY_COLUMNS, 0))


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        ("a,w2,", "z,w2,", "line 2, column 'group': got 'z', expected one of a, b, quoted \"c\", ü"),
        ("a,w4g3,kl", "a,w4g3,fisher", "line 3, column 'metric': got 'fisher', expected one of kl"),
        ("a,w2,kl,1.0", "a,w2,kl,one", "line 2, column 'value': got 'one', expected a number"),
        ("a,w4g3,", "a,w2,", "line 3, column 'scheme': got 'w2', expected a group and scheme that no earlier row has"),
        ("group,scheme", "group;scheme", "line 1: expected the columns group,scheme,metric,value,size_bits"),
    ],
)
def test_damaged_sensitivities_are_named_with_their_line(run, before, after, sentence):
    file = run.path / "sensitivity.csv"
    file.write_text(file.read_text().replace(before, after, 1))
    with pytest.raises(InputError, match=f"sensitivity.csv is damaged: {sentence}"):
        run.read_sensitivity(SPACE, "kl")


def test_bytes_that_are_no_text_are_named(run):
    file = run.path / "evaluations.csv"
    file.write_bytes(file.read_bytes().replace(b"sampler", b"s\xffmpler"))
    with pytest.raises(InputError, match=r"evaluations.csv is damaged: line 6: it is not UTF-8 text"):
        run.read_evaluations(SPACE, Quality())


def changed(**values):
    """`space.json` with other values, and the digest of those."""
    return lambda text: {**json.loads(text), **values}


def first_layer(**values):
    data = json.loads(json.dumps(IDENTITY))
    data["space"]["groups"][0]["layers"][0].update(values)
    return lambda text: data


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda text: text[: len(text) // 2], ".*"),
        (lambda text: "", "Expecting value.*"),
        (lambda text: "[1, 2]", r"the file must be a JSON object, got \[1, 2\]"),
        (lambda text: "\x00", "Expecting value.*"),
        (lambda text: "[" * 100_000, "its JSON is nested too deeply"),
        (lambda text: text.replace("{", '{"metric": 1, ', 1), "the key 'metric' appears twice"),
        (lambda text: text.replace('"bits": 3.5', '"bits": Infinity'), "the number Infinity is not finite"),
        (lambda text: text.replace('"bits": 3.5', '"bits": 3.25'), "its contents do not match their sha256"),
        (lambda text: text.replace('"sha256"', '"sha255"'), "'sha256' is missing"),
        (lambda text: text.replace('"space"', '"spice"', 1), "'space' is missing"),
        (changed(metric=3), "metric must be a JSON object, got 3"),
        (changed(metric={"name": "kl"}), "'metric.unit' is missing"),
        (changed(quality_name=None), "'quality_name' must be a string, got null"),
        (changed(budgets={"bits": "3"}), "'budgets.bits' must be a finite number, got \"3\""),
        (changed(space=[]), r"space must be a JSON object, got \[\]"),
        (changed(space={"schemes": {}, "groups": [{}], "other_bits": 0}), r"'space.groups\[0\].name' is missing"),
        (changed(space={**SPACE.to_dict(), "other_bits": True}), "'space.other_bits' must be an integer, 0 or more, got true"),
        (first_layer(shape=[4, -6]), r"'space.groups\[0\].layers\[0\].shape' must be a list of integers, 0 or more, got .*"),
        (first_layer(shape=[4, 0]), r"'space.groups\[0\].layers\[0\].shape' must be of 1 to [0-9,]+ weights, got \[4, 0\]"),
        (first_layer(shape=[2**40]), r"'space.groups\[0\].layers\[0\].shape' must be of 1 to [0-9,]+ weights, got .*"),
        (first_layer(modules="a"), r"'space.groups\[0\].layers\[0\].modules' must be a list of strings, got \"a\""),
        (first_layer(name="\ud800"), r"'space.groups\[0\].layers\[0\].name' must be a string of Unicode characters, got .*"),
    ],
)
def test_a_damaged_identity_is_named(run, damage, sentence):
    file = run.path / "space.json"
    new = damage(file.read_text())
    if isinstance(new, str):
        file.write_text(new)
    else:
        write_identity(file, {key: value for key, value in new.items() if key != "sha256"})
    with pytest.raises(InputError, match=rf"space.json is damaged or was edited: {sentence}\. Restore it, or start a new run\."):
        Run.load(run.path)


def test_a_scheme_with_other_fields_is_named(run):
    space = SPACE.to_dict()
    space["schemes"]["w2"]["wits"] = space["schemes"]["w2"].pop("bits")
    write_identity(run.path / "space.json", {**IDENTITY, "space": space})
    with pytest.raises(InputError, match=r"'space.schemes.w2' must have the fields of a scheme \(TypeError: "):
        Run.load(run.path)


def test_a_setting_that_json_does_not_have_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"cannot be written to .*space.json: Out of range float .*\. Give finite numbers"):
        RunFolder(tmp_path).identify({**IDENTITY, "bias": math.inf})
    assert list(tmp_path.iterdir()) == []


def test_schemes_that_are_not_ours_must_be_given(run):
    space = SPACE.to_dict()
    space["schemes"]["bf16"]["class"] = "Posit"
    write_identity(run.path / "space.json", {**IDENTITY, "space": space})
    with pytest.raises(InputError, match="'Posit' is no known scheme"):
        Run.load(run.path)
    assert Run.load(run.path, SPACE.schemes).space == SPACE


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(InputError, match=r"is not a run folder: it has no space.json"):
        Run.load(tmp_path)


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


@pytest.mark.slow
def test_one_process_at_a_time(run):
    """A second process is turned away while this one writes."""
    code = f"""
        from mpsearch.errors import InputError
        from mpsearch.runs.run import RunFolder
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
