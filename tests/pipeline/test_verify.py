"""`mpsearch verify`: the exported file is opened in its runtime and measured on the confirm split; the table is checked."""

import pytest
import torch
from conftest import without_figures
from torch import nn

import mpsearch
from mpsearch.errors import InputError
from mpsearch.exporters.native import Native
from mpsearch.pipeline.verify import greedy_tokens
from mpsearch.runs.run import Run
from mpsearch.runs.verified import read_verified
from mpsearch.tasks.language import Language

OPTIONS = {"schemes": ["w2", "w4", "w8"], "quantizer": "round_to_nearest", "metric": "weight_mse", "n_trials": 6, "n_seeds": 3}


@pytest.fixture(scope="module")
def result(tiny, tmp_path_factory):
    """A run that was verified at its end."""
    with pytest.MonkeyPatch.context() as patch:
        without_figures(patch)
        return mpsearch.search(tiny.net(), tiny.task(), verify=True, folder=tmp_path_factory.mktemp("run"), **OPTIONS)


def test_a_verified_point_is_measured_in_its_runtime(result, undrawn):
    (at_end,) = result.verified
    picked = result.pick()
    confirmed = result.run.on("confirm")[picked.allocation]
    assert (at_end.exporter, at_end.runtime, at_end.point, at_end.trained) == ("native", "mpsearch", picked.id, False)
    assert (at_end.quality, at_end.n_samples) == (confirmed.quality, confirmed.n_samples)
    assert at_end.loss == at_end.packed_loss == pytest.approx(confirmed.loss, rel=1e-5)
    assert at_end.quality_low <= at_end.quality <= at_end.quality_high
    assert 0 < at_end.ms_low <= at_end.ms <= at_end.ms_high
    assert min(at_end.float_ms, at_end.packed_ms) > 0
    again = mpsearch.verify(result, exporter="packed", bits=9)
    assert again.exporter == "packed"
    assert again.file_bytes == (result.folder / "packed.safetensors").stat().st_size > picked.evaluation.size_bytes
    assert result.pick(bits=9).verify("packed").loss == again.loss
    assert len(result.verified) == 3
    page = result.report().read_text()
    assert f"| mpsearch | packed | {again.point} | {again.file_bytes:,} |" in page


def test_what_the_runtime_computes_is_what_is_recorded(result, monkeypatch):
    """A runtime that doubles the logits has another loss; ours stays."""

    class Doubled(Native):
        runtime = "doubled"

        def open(self, path, model):
            model = super().open(path, model)
            model.register_forward_hook(lambda module, args, output: 2 * output)
            return model

    verified = mpsearch.verify(result, exporter=Doubled())
    assert verified.runtime == "doubled"
    assert verified.loss > 2 * verified.packed_loss
    assert result.verified[-1] == verified


def test_a_runtime_that_is_not_installed_is_said_before_any_work(tiny, result, tmp_path, monkeypatch):
    def missing(self):
        raise InputError("exporter=native needs x: pip install x.")

    monkeypatch.setattr(Native, "check_installed", missing)
    n = len(result.verified)
    with pytest.raises(InputError, match="pip install x"):
        mpsearch.verify(result)
    assert len(result.verified) == n
    with pytest.raises(InputError, match="pip install x"):
        mpsearch.search(tiny.net(), tiny.task(), verify=True, folder=tmp_path / "run", **OPTIONS)
    assert not (tmp_path / "run").exists()


def test_a_changed_table_is_an_error(result):
    file = result.folder / "verified.csv"
    whole = file.read_bytes()
    quality = Run.load(result.folder).quality
    damages = ((b"False", b"Falsch", "column 'trained'"), (b"native", b"other", "checksum"), (b"loss", b"lass", "columns"))
    for old, new, said in damages:
        file.write_bytes(whole.replace(old, new, 1))
        with pytest.raises(InputError, match=said):
            read_verified(result.folder, quality)
    file.write_bytes(whole[:-5])
    assert len(read_verified(result.folder, quality)) == whole.count(b"\n") - 2, "the last row was cut"
    file.write_bytes(whole)


class Next(nn.Module):
    """A causal model whose most likely next token is the current one plus `step`."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def forward(self, ids):
        return torch.nn.functional.one_hot((ids + self.step) % 50, 50).float()


@pytest.mark.parametrize(("window", "n"), [(40, 20), (80, 32)])
def test_greedy_tokens_follow_the_model(window, n):
    task = Language([torch.arange(300).numpy() % 50] * 3, 1, 1, None, window=window)
    inputs = task.batches("confirm")[0][0]
    tokens = greedy_tokens(Next(3), task, inputs)
    first = int(inputs[0, window - n - 1])
    assert tokens == [(first + 3 * (i + 1)) % 50 for i in range(n)]


def test_the_command(mpsearch, undrawn, capsys, tmp_path):
    words = ["scheme=[w2,w8]", "quantizer=round_to_nearest", "metric=weight_mse", "n_trials=4", "n_seeds=2", "refiner=null"]
    assert mpsearch("search", *words, "verify=true", "confirm.n_points=1", "hydra.run.dir=run")[0] == 0
    assert mpsearch("verify", "run=run", "exporter=packed", "pick.bits=3")[0] == 0
    first, second = read_verified(tmp_path / "run", Run.load(tmp_path / "run").quality)
    assert (first.exporter, second.exporter) == ("native", "packed")
    assert "## In the runtime" in (tmp_path / "run" / "report.md").read_text()
    code, said = mpsearch("verify", "run=run", "pick.bits=1")
    assert code == 2
    assert said.count("\n") == 1
