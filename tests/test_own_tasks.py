"""Tasks and models of the user's own on the command line: the loss that is chosen, and what is refused before it is measured."""

import json
import sys
import textwrap

import pandas as pd
import pytest

from mpsearch import cli

MODULE = """
    import torch, mpsearch
    from torch import nn

    def net(columns=1):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, int(columns)))

    class Task(mpsearch.Task):
        def targets(self, x):
            return (x[:, 0] > 0).float()

        def batches(self, split):
            generator = torch.Generator().manual_seed(["calibration", "search", "confirm"].index(split))
            x = torch.randn(64, 6, generator=generator)
            return [(x[i : i + 32], self.targets(x[i : i + 32])) for i in (0, 32)]
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """`run(code, *words)`: exit code, stdout and stderr of `mpsearch *words` where `own.py` is the module above and `code`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def call(code, *words, model=("model._target_=own.net",)):
        (tmp_path / "own.py").write_text(textwrap.dedent(MODULE) + textwrap.dedent(code))
        monkeypatch.delitem(sys.modules, "own", raising=False)
        task = ["task=custom", "task._target_=own.Task", "model=custom", *model] if words[1:2] != ("run=r",) else []
        folder = [] if words[1:2] == ("run=r",) or "hydra.run.dir=other" in words else ["hydra.run.dir=r"]
        monkeypatch.setattr(sys, "argv", ["mpsearch", *words, *task, *folder])
        try:
            status = cli.main()
        except SystemExit as end:
            status = end.code
        captured = capsys.readouterr()
        return status or 0, captured.out, captured.err

    return call


SEARCH = ("search", "n_trials=4", "scheme=[w2,w4,w8]", "quantizer=clip_search")


def test_a_binary_head_gets_a_loss_that_tells_allocations_apart(run, tmp_path):
    code, out, err = run("", *SEARCH)
    assert code == 0, err
    assert "loss: sigmoid KL (a binary target)" in out
    rows = pd.read_csv(tmp_path / "r" / "evaluations.csv").query("split == 'search' and origin == 'uniform'")
    losses = rows.sort_values("size_bytes").loss
    assert (losses > 0).all()
    assert losses.is_monotonic_decreasing
    identity = json.loads((tmp_path / "r" / "space.json").read_text())
    assert identity["divergence"] == {"name": "sigmoid_kl", "label": "sigmoid KL", "unit": "nats"}
    assert run("", "search", "run=r", "n_trials=5")[0] == 0
    assert run("", "report", "run=r")[0] == 0


def test_the_loss_can_be_set_where_the_task_is(run, tmp_path):
    code, out, err = run("", "sensitivity", "+task.divergence=relative_mse", "metric=kl", "scheme=[w4,w8]")
    assert code == 0, err
    assert "loss: relative MSE (set by the task)" in out
    assert json.loads((tmp_path / "r" / "space.json").read_text())["metric"]["unit"] == "share of the outputs' variance"
    code, _, err = run("", "sensitivity", "+task.divergence=mse", "hydra.run.dir=other")
    assert code == 2
    assert "no divergence 'mse'" in err


def test_a_quality_may_be_better_where_it_is_lower(run, tmp_path):
    code, out, err = run(
        """
        class Task(Task):
            quality_name, quality_kind = "mae", "error"
            def targets(self, x):
                return x.sum(-1)
            def quality(self, outputs, targets):
                return (outputs[:, 0] - targets).abs()
        """,
        *SEARCH,
    )
    assert code == 0, err
    assert "loss: relative MSE (regression: targets are numbers)" in out
    assert json.loads((tmp_path / "r" / "space.json").read_text())["quality_kind"] == "error"


@pytest.mark.parametrize("name", ["loss", "seconds", "size_bytes", "scheme", "crc"])
def test_a_quality_takes_no_column_of_another(run, name):
    code, _, err = run(f"Task.quality_name = {name!r}", *SEARCH)
    assert code == 2
    assert f"The quality cannot be named '{name}'" in err


def test_a_regression_without_a_quality_of_its_own_is_told_what_to_write(run):
    code, _, err = run("Task.targets = lambda self, x: x.sum(-1)", *SEARCH)
    assert code == 2
    assert "Override the task's quality, and set its quality_name and quality_kind" in err


def test_more_dimensions_are_refused_with_what_to_write(run):
    code, _, err = run(
        """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.fc = nn.Linear(1, 5)
            def forward(self, x):
                return self.fc(x[..., None])
        """,
        *SEARCH,
        model=("model._target_=own.Net",),
    )
    assert code == 2
    assert "got the shape (32, 6, 5)" in err
    assert "flatten(0, 1)" in err
