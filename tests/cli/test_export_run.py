"""`mpsearch export`: what was written is scored again, fits the budget, and replaces an earlier export only as a whole."""

import io
import json
import os
import shutil
import sys
from contextlib import redirect_stdout, suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import without_figures

from mpsearch import cli
from mpsearch.engine.weight_files import WeightFiles
from mpsearch.errors import InputError
from mpsearch.exporters.allocation_file import load_allocation
from mpsearch.exporters.base import Picked, publish
from mpsearch.exporters.native import Native
from mpsearch.exporters.packed import Packed
from mpsearch.layer import weights_sha256
from mpsearch.packed.agreement import CODE_SHARE, LOGIT_DISTANCE, losses_agree
from mpsearch.pipeline.evaluators import SearchEvaluator
from mpsearch.runs.run import Run
from mpsearch.schemes.integer import Integer
from mpsearch.tasks.digits import Digits

WORDS = ["scheme=[w2,w4,w8]", "quantizer=round_to_nearest", "metric=weight_mse", "n_trials=20", "budget.bytes=4500"]
WORDS += ["task=arrays", "task.path=data.npz", "n_seeds=8", "refiner=null"]


@pytest.fixture(scope="module")
def run_once(tmp_path_factory):
    """A folder with data and the folder of a finished run under a budget."""
    before, folder = os.getcwd(), tmp_path_factory.mktemp("runs")
    os.chdir(folder)
    inputs, targets = Digits().batches("search")[0]
    np.savez("data.npz", x=inputs.numpy(), y=targets.numpy())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])
        without_figures(patch)
        patch.setattr(sys, "argv", ["mpsearch", "search", *WORDS, "hydra.run.dir=run"])
        cli.main()
    os.chdir(before)
    return folder


@pytest.fixture
def run(run_once, tmp_path, monkeypatch):
    """A copy of it; the path of the run. An export draws no figures there: they take longer than all else."""
    redrawn = lambda folder, choose, load: (load(), None, None)  # noqa: E731
    monkeypatch.setattr("mpsearch.cli.commands.redrawn", redrawn)
    shutil.copytree(run_once, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"


def content(folder):
    return {file.name: file.read_bytes() for pattern in ("allocation*", "packed*") for file in folder.glob(pattern)}


def test_an_export_is_scored_again_and_a_damaged_bank_is_quantized_again(run, mpsearch, capsys):
    smallest = Run.load(run).front[0]
    words = ("export", "run=run", f"pick.bits={smallest.average_bits}", "pick.max_bytes=1MB")
    assert mpsearch(*words)[0] == 0
    first = content(run)
    assert first.keys() == {"allocation.json", json.loads(first["allocation.json"])["tensors"]["file"]}
    layer, scheme = next(iter(smallest.allocation.items()))
    file = run / "bank" / f"{layer}.{scheme}.safetensors"
    whole = file.read_bytes()

    # A flipped bit: found, quantized again, exported as before.
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 64]))
    with pytest.warns(UserWarning, match=r"is damaged .* It is quantized again"):
        assert mpsearch(*words)[0] == 0
    assert content(run) == first
    assert file.read_bytes() == whole

    # Wrong weights under a right digest: the loss tells, and the earlier export stays.
    result = Run.load(run)
    wrong = object.__new__(WeightFiles)
    wrong.__dict__.update(folder=run / "bank", identity=_identity(file), keeps_floats=False, _writes=True, _warned=False)
    right = wrong.read(layer, scheme, result.space.schemes[scheme], ())
    wrong.write(layer, scheme, replace(right, tensors={**right.tensors, "codes": ~right.tensors["codes"]}))
    code, said = mpsearch(*words)
    assert code == 2
    assert said.count("\n") == said.strip().count("\n") + 1
    assert f"but the run recorded {smallest.loss:.6g} for this point, so nothing was exported" in said.splitlines()[-1]
    assert content(run) == first
    assert not (run / ".export").exists()


def _identity(file):
    from safetensors import safe_open

    with safe_open(file, "pt") as stored:
        return json.loads(stored.metadata()["mpsearch-weight"])["identity"]


def test_without_the_data_digests_are_checked(run, mpsearch, capsys):
    """The same files from the bank alone, said in one line; a weight that the bank lacks cannot be made up."""
    picked = Run.load(run).front[0]
    words = ("export", "run=run", f"pick.bits={picked.average_bits}", "pick.max_bytes=1MB")
    assert mpsearch(*words)[0] == 0
    first = content(run)
    (run.parent / "data.npz").unlink()
    with capsys.disabled(), redirect_stdout(io.StringIO()) as said:
        assert mpsearch(*words)[0] == 0
    assert content(run) == first
    line = "task.path=data.npz does not exist: the digests of what was written were checked, its loss was not measured again"
    assert said.getvalue().splitlines().count(line) == 1
    layer, scheme = next(iter(picked.allocation.items()))
    for name, what in ((f"{layer}.{scheme}", "weight of"), (f"{layer}.{scheme}.biases", "corrected bias of")):
        file = run / "bank" / f"{name}.safetensors"
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.warns(UserWarning, match="is damaged"):
            code, err = mpsearch(*words)
        file.write_bytes(data)
        assert code == 2
        assert f"has no intact entry for the {what} '{layer}' in {scheme}, and the task's data are absent" in err
    code, err = mpsearch(*words, "finetuned=true")
    assert code == 2
    assert content(run) == first


def n_bytes(folder):
    return sum(len(data) for name, data in content(folder).items() if not name.endswith(".json"))


@pytest.mark.parametrize(("exporter", "named"), [("native", "allocation.json"), ("packed", "packed.safetensors")])
def test_the_budget_limits_the_files_as_a_whole(run, mpsearch, exporter, named):
    front = Run.load(run).front
    words = ("export", "run=run", f"exporter={exporter}")
    largest = front[-1].size_bytes
    code, said = mpsearch(*words, f"pick.bits={front[-1].average_bits}")
    assert code == 2
    assert f"The point of {largest:,} bytes takes " in said
    assert "in files, headers included: above budget.bytes=4500. Give that limit as pick.max_bytes" in said
    assert not content(run)

    assert mpsearch(*words, "pick.max_bytes=30kB")[0] == 0, "a limit of its own"
    overhead = n_bytes(run) - largest
    limit = front[1].size_bytes + overhead + 60
    assert limit < largest + overhead
    assert mpsearch(*words, f"pick.max_bytes={limit}")[0] == 0
    files = content(run)
    assert named in files
    assert n_bytes(run) <= limit
    code, said = mpsearch(*words, f"pick.max_bytes={front[0].size_bytes}")
    assert code == 2
    assert "It is the smallest of the front. Raise the limit" in said
    assert content(run) == files


@pytest.mark.parametrize("loss", [1e-6, 0.01, 1.0])
def test_the_tolerance_is_that_of_rounding(loss):
    """Logits off by 1e-3 in the worst direction stay within it; a loss twice as high does not."""
    p = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    step = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)

    def divergence(shift):
        q = (p.log() + shift * step).log_softmax(-1)
        return float((p * (p.log() - q)).sum())

    low, high = 0.0, 50.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if divergence(middle) > loss else (middle, high)
    assert losses_agree(divergence(low + 1e-3), loss, distance=LOGIT_DISTANCE)
    assert loss > 5e-6 or not losses_agree(4 * loss, loss, distance=LOGIT_DISTANCE)
    assert loss < 5e-6 or not losses_agree(1.2 * loss, loss, distance=LOGIT_DISTANCE, share=CODE_SHARE)


@pytest.fixture
def pair(tiny, tmp_path):
    """(how to export an allocation of a tiny network, the folder of an earlier export)."""
    engine = tiny.engine(tiny.net(), tiny.task(), {"w2": Integer(2), "w8": Integer(8)})
    evaluate = SearchEvaluator(engine)

    def picked(scheme):
        e = evaluate(engine.space.uniform(scheme), "uniform")
        return Picked(e, {"search": e}, {}, "accuracy", weights_sha256(engine.model), ())

    Native().export(picked("w2"), engine, tmp_path / "run")
    return lambda exporter, folder: exporter.export(picked("w8"), engine, folder), tmp_path / "run"


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
@pytest.mark.parametrize("at", range(4))
def test_a_disk_that_fails_at_any_moment_leaves_the_earlier_export(pair, monkeypatch, call, at):
    """With no space left from the call number `at` on: directly, and where an export is moved into its place."""
    export, folder = pair
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    staged = export(Native(), folder.parent / "staged")

    def fails(do):
        calls = 0
        original = getattr(os, call)

        def full(*args):
            nonlocal calls
            calls += 1
            if calls > at:
                raise OSError(28, "No space left on device")
            return original(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            with suppress(InputError):
                do()
                return False
        return True

    for do in (lambda: export(Native(), folder), lambda: publish(staged, folder)):
        if fails(do):
            after = {file.name: file.read_bytes() for file in folder.iterdir()}
            assert after["allocation.json"] == before["allocation.json"] or load_allocation(folder / "allocation.json")
            assert before.items() <= after.items() or load_allocation(folder / "allocation.json").schemes["first"] == "w8"
            assert set(load_allocation(folder / "allocation.json").schemes.values()) <= {"w2", "w8"}
        assert not list(folder.glob(".*")), "no temporaries"
    export(Native(), folder)
    assert len(list(folder.iterdir())) == 2, "what failed leaves nothing for good"


def test_files_have_the_mode_of_any_other(pair, tmp_path):
    export, _ = pair
    before = os.umask(0o027)
    try:
        for exporter in (Native(), Packed()):
            export(exporter, tmp_path / "modes")
        assert {oct(file.stat().st_mode & 0o777) for file in (tmp_path / "modes").iterdir()} == {"0o640"}
    finally:
        os.umask(before)
