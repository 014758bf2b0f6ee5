"""Tasks and models of the user's own on the command line: the loss that is chosen, and what is refused before it is measured."""

import dataclasses
import json
import re
import shutil
import sys
import textwrap
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch

from mpsearch import cli
from mpsearch.errors import InputError
from mpsearch.graph.trace import first_samples
from mpsearch.quantizers.clip_search import ClipSearch
from mpsearch.quantizers.round_to_nearest import RoundToNearest
from mpsearch.tree import arrays_to_tensors, map_tensors, tensors_in

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
def run(tmp_path, monkeypatch, capsys, undrawn):
    """`run(code, *words)`: exit code, stdout and stderr of `mpsearch *words` where `own.py` is the module above and `code`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def call(code, *words, model=("model._target_=own.net",)):
        (tmp_path / "own.py").write_text(textwrap.dedent(MODULE) + textwrap.dedent(code))
        monkeypatch.delitem(sys.modules, "own", raising=False)
        if words[1:2] == ("run=r",):
            rest = [] if words[0] == "report" else ["trust=true"]
        else:
            rest = ["task=custom", "task._target_=own.Task", "model=custom", *model]
            rest += [] if "hydra.run.dir=other" in words else ["hydra.run.dir=r"]
        monkeypatch.setattr(sys, "argv", ["mpsearch", *words, *rest])
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


def test_changed_code_with_equal_weights_is_noticed_when_a_run_is_resumed(run, tmp_path):
    assert run("", *SEARCH)[0] == 0
    recorded = pd.read_csv(tmp_path / "r" / "evaluations.csv")
    code, _, err = run(
        """
        def net(columns=1):
            torch.manual_seed(1)
            return nn.Sequential(nn.Linear(6, 16), nn.ELU(), nn.Linear(16, int(columns)))
        """,
        "search",
        "run=r",
        "n_trials=6",
    )
    assert code == 2
    assert "Was the code of the model or the task changed?" in err
    assert f"recorded is {recorded.cross_entropy[0]:.8g}" in err
    assert pd.read_csv(tmp_path / "r" / "evaluations.csv").equals(recorded)


def test_another_environment_warns_and_scores_one_trial_again(run, tmp_path, monkeypatch):
    assert run("", *SEARCH)[0] == 0
    file = tmp_path / "r" / "environment.json"
    environment = json.loads(file.read_text())
    assert environment["torch"] == torch.__version__
    assert environment["threads"] == str(torch.get_num_threads())
    assert {"mpsearch", "numpy", "optuna"} <= set(environment)
    file.write_text(json.dumps({**environment, "torch": "2.0.0"}))
    changes = f"torch 2.0.0 -> {re.escape(torch.__version__)}"
    with pytest.warns(UserWarning, match=rf"another environment \({changes}\); one trial is scored again"):
        code, _, err = run("", "search", "run=r", "n_trials=6")
    assert code == 0, err
    monkeypatch.setattr(ClipSearch, "codes", RoundToNearest.codes)
    shutil.rmtree(tmp_path / "r" / "bank")
    with pytest.warns(UserWarning, match="another environment"):
        code, _, err = run("", "search", "run=r", "n_trials=8")
    assert code == 2
    assert "which is more than rounding. What differs: torch 2.0.0" in err


class Point(NamedTuple):
    x: torch.Tensor
    scale: float


@dataclasses.dataclass
class Record:
    x: torch.Tensor
    rest: dict


def test_nested_tensors_keep_their_containers():
    x = torch.arange(6.0).view(3, 2)
    given = [Point(x, 2.0), (x + 1, None), {"a": [x + 2]}, Record(x + 3, {"b": x + 4})]
    doubled = map_tensors(lambda tensor: 2 * tensor, given)
    assert [type(part) for part in doubled] == [type(part) for part in given]
    assert doubled[0].scale == 2.0
    assert all(torch.equal(a, 2 * b) for a, b in zip(tensors_in(doubled), tensors_in(given), strict=True))
    assert len(list(tensors_in(given))) == 5
    assert [len(part) for part in tensors_in(first_samples(given, 2))] == [2] * 5


def test_arrays_become_tensors():
    backwards = np.arange(6.0)[::-1]
    backwards.flags.writeable = False
    found = arrays_to_tensors({"x": backwards, "y": (np.arange(3), np.float32(2))})
    assert found["x"].dtype == torch.float32
    assert found["x"].tolist() == [5, 4, 3, 2, 1, 0]
    assert found["y"][0].dtype == torch.int64
    with pytest.raises(InputError, match=r"<U1 \[1\]"):
        arrays_to_tensors(np.array(["a"]))


SUPPORTED = {
    "numpy": "Task.batches = lambda self, split, of=Task.batches: [(x.double().numpy(), y.numpy()) for x, y in of(self, split)]",
    "named tuples": """
        import collections
        Inputs = collections.namedtuple("Inputs", "left right")
        class Task(Task):
            def batches(self, split):
                return [(Inputs(x[:, :3], x[:, 3:]), y) for x, y in super().batches(split)]
            def forward(self, model, inputs):
                return model(torch.cat([inputs.left, inputs.right], 1))
    """,
    "integer parameters": """
        def net(columns=1, of=net):
            model = of()
            model.steps = nn.Parameter(torch.arange(3), requires_grad=False)
            return model
    """,
    "a data loader": """
        class Task(Task):
            def batches(self, split):
                pairs = [pair for x, y in super().batches(split) for pair in zip(x, y)]
                return torch.utils.data.DataLoader(pairs, batch_size=32)
    """,
}


@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.thin(2)
def test_batches_and_parameters_of_other_kinds_are_searched(run, tmp_path, name):
    plain = run("", *SEARCH, "hydra.run.dir=other")
    code, _, err = run(SUPPORTED[name], *SEARCH)
    assert (plain[0], code) == (0, 0), err
    tables = [pd.read_csv(tmp_path / folder / "evaluations.csv").loss for folder in ("r", "other")]
    assert tables[0].equals(tables[1]), "the same data and weights"


LAYER = "nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))"
REFUSED = {
    "dropout": (
        "class Net(nn.Sequential):\n"
        "    def forward(self, x):\n"
        "        return nn.functional.dropout(super().forward(x), 0.1, training=True)\n"
        "net = lambda: Net(nn.Linear(6, 1))",
        "The model is not deterministic",
    ),
    "writes into its input": (
        "class Net(nn.Sequential):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x.mul_(2))\n"
        "net = lambda: Net(nn.Linear(6, 1))",
        "The model writes into its input",
    ),
    "shuffled": (
        "Task.batches = lambda self, split, of=Task.batches: [(x[torch.randperm(32)], y) for x, y in of(self, split)]",
        "The task's data are not the same twice: two calls of batches('calibration')",
    ),
    "augmented": (
        "Task.batches = lambda self, split, of=Task.batches: [(x + 0.01 * torch.randn(32, 6), y) for x, y in of(self, split)]",
        "The task's data are not the same twice",
    ),
    "three parts": (
        "Task.batches = lambda self, split, of=Task.batches: [(x, x, y) for x, y in of(self, split)]",
        "A batch of the calibration split must be a pair (inputs, targets); got 3 parts.",
    ),
    "a mapping": (
        "Task.batches = lambda self, split, of=Task.batches: [{'ids': x, 'labels': y} for x, y in of(self, split)]",
        "got a dict with ids, labels.",
    ),
    "half": (f"net = lambda: {LAYER}.half()", "Parameter '0.weight' is torch.float16"),
    "bfloat16": (f"net = lambda: {LAYER}.bfloat16()", "Parameter '0.weight' is torch.bfloat16"),
    "double": (f"net = lambda: {LAYER}.double()", "Parameter '0.weight' is torch.float64"),
    "compiled": (f"net = lambda: torch.compile({LAYER})", "The model is compiled (torch.compile)"),
    "compiled in place": (f"def net():\n    m = {LAYER}\n    m[1].compile()\n    return m", "Module '1' is compiled"),
    "scripted": (f"net = lambda: torch.jit.script({LAYER})", "The model is scripted or traced (torch.jit)"),
    "meta": (f"net = lambda: {LAYER}.to('meta')", "'0.weight' is on the meta device"),
    "lazy": ("net = lambda: nn.Sequential(nn.LazyLinear(1))", "'0.weight' has no shape yet (a lazy module)"),
    "exported": (
        f"net = lambda: torch.export.export({LAYER}, (torch.zeros(32, 6),))",
        "it must be (a function that returns) a torch.nn.Module. Give the module that was exported.",
    ),
    "an exported graph": (
        f"net = lambda: torch.export.export({LAYER}, (torch.zeros(32, 6),)).module()",
        "is a graph of operators (torch.export)",
    ),
    "quantized": (
        f"net = lambda: torch.ao.quantization.quantize_dynamic({LAYER}, {{nn.Linear}})",
        "Module '0' is quantized already (Linear)",
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.thin(2)
def test_what_cannot_be_searched_is_one_sentence_that_names_the_cause(run, tmp_path, name):
    code, message = REFUSED[name]
    (tmp_path / "case.py").write_text(code)
    status, _, err = run('import pathlib; exec(pathlib.Path("case.py").read_text())', "sensitivity", "metric=weight_mse")
    assert status == 2, err
    assert message in err
    assert len(err.strip().splitlines()) == 1
