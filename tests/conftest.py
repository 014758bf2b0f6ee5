"""What all tests share: where the real models and data sets are, and networks small enough to quantize a thousand times."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read when NumPy is imported; pytest has a process per core

import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mpsearch import cli
from mpsearch.allocation import SearchSpace
from mpsearch.engine.calibrate import calibrate
from mpsearch.engine.engine import QuantEngine
from mpsearch.engine.scoring import load_batches
from mpsearch.graph.fold import fold_batch_norms
from mpsearch.graph.trace import trace_layers
from mpsearch.graph.unsearched import other_bits
from mpsearch.models.digits import digits
from mpsearch.quantizers.clip_search import ClipSearch
from mpsearch.schemes.integer import Integer
from mpsearch.schemes.rotated import Rotated
from mpsearch.tasks.classification import Classification
from mpsearch.tasks.digits import Digits

ROOT = Path(__file__).parents[1]

torch.set_num_threads(1)  # tensors here are tiny: on a busy machine threads that wait for one another take ten times as long


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Run the whole suite in a process per core, where pytest-xdist is installed; what is named on the command line in one."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and "PYTEST_XDIST_WORKER" not in os.environ
    if whole and getattr(config.option, "numprocesses", 0) is None:
        config.option.numprocesses = min(len(os.sched_getaffinity(0)), 8)
        config.option.dist = "loadfile"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Of a test that is marked `thin(n)`, all cases but every n-th are slow."""
    seen = Counter()
    for item in items:
        if (thin := item.get_closest_marker("thin")) is not None:
            name = item.nodeid.partition("[")[0]
            if seen[name] % thin.args[0]:
                item.add_marker("slow")
            seen[name] += 1


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real models and data sets; a test that asks for it is skipped where there is none."""
    folder = Path(os.environ.get("MPSEARCH_DATA", ROOT / ".." / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real models and data sets at {folder}; set MPSEARCH_DATA to where they are")
    return folder


class TinyNet(nn.Module):
    """Images [n, 2, 6, 6] -> logits [n, 5]: three layers, one of them without a bias, and a batch norm that is not searched."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 6, 3, stride=2, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.last = nn.Linear(6, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.second(F.relu(self.first(x)))))
        return self.last(x.mean((2, 3)))


def tiny_net(seed=0):
    torch.manual_seed(seed)
    net = TinyNet().eval()
    with torch.no_grad():
        net.norm.running_var.mul_(0.05)
        net.last.weight.mul_(8)
    return net


def tiny_task(n=30, seed=0, batch_size=16, shape=(2, 6, 6)):
    """Three different splits of noise with a mean, `n` samples each in batches of unequal size, random labels."""
    generator = torch.Generator().manual_seed(seed)

    def split():
        return torch.randn(n, *shape, generator=generator) + 0.5, torch.randint(5, (n,), generator=generator)

    return Classification(split(), split(), split(), n_classes=5, batch_size=batch_size)


def make_engine(model, task, schemes=None, *, pin=(), quantizer=None, **options):
    """An engine as the search sets it up; `schemes` default to 2, 4 and 8 bits."""
    schemes = schemes or {f"w{bits}": Integer(bits) for bits in (2, 4, 8)}
    layers = trace_layers(model, task.forward, task.batches("calibration")[0][0])
    space = SearchSpace.build(layers, schemes, pin, other_bits(model, layers))
    rotated = any(isinstance(scheme, Rotated) for scheme in schemes.values())
    moments = calibrate(model, task, layers, load_batches(task, "calibration", "cpu"), rotated=rotated)
    return QuantEngine(model, task, space, dict.fromkeys(schemes, quantizer or ClipSearch(20)), moments, **options)


def digits_engine(schemes=None, **options):
    """The embedded network on the digits, batch norms folded."""
    model, task = digits(), Digits()
    fold_batch_norms(model, task.forward, task.batches("calibration")[0][0])
    model.requires_grad_(True)
    return make_engine(model, task, schemes, **options)


def state(model):
    """Everything of a model that must be as it was: names, values, flags, gradients."""
    return {
        name: (tensor.clone(), tensor.data_ptr(), tensor.requires_grad, tensor.grad)
        for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    }


def assert_same_state(model, before):
    after = state(model)
    assert after.keys() == before.keys()
    for name, (value, address, requires_grad, grad) in before.items():
        assert torch.equal(after[name][0].flatten().view(torch.uint8), value.flatten().view(torch.uint8)), name
        assert after[name][1:] == (address, requires_grad, grad), name


@pytest.fixture(scope="session")
def tiny():
    """How to make the small things: `tiny.net()`, `tiny.task()`, `tiny.engine(net, task)`; and what shows one unchanged."""
    return SimpleNamespace(
        net=tiny_net, task=tiny_task, engine=make_engine, digits=digits_engine, state=state, assert_same_state=assert_same_state
    )


@pytest.fixture(scope="session")
def trained():
    """One engine of the trained digits network for all tests that only ask it for scores."""
    return digits_engine({f"w{bits}": Integer(bits) for bits in (2, 3, 4, 8)})


def without_figures(patch):
    """From now on reports are written without their figures, which take as long as a small search."""
    for name in ("pareto", "layers", "sensitivity", "interactions", "search"):
        patch.setattr(f"mpsearch.reporting.report.draw_{name}", lambda *args, **kwargs: [])


@pytest.fixture
def undrawn(monkeypatch):
    """For tests that look at no figure; `tests/reporting` does, and the runs of the digits and of the README draw theirs."""
    without_figures(monkeypatch)


@pytest.fixture
def mpsearch(tmp_path, monkeypatch, capsys):
    """`mpsearch("search", "n_trials=5")` in this process, in a folder of its own: (exit code, what went to stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name, module in list(sys.modules.items()):  # of the user in another test
        if (getattr(module, "__file__", None) or "").startswith(str(tmp_path.parent)):
            monkeypatch.delitem(sys.modules, name)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["mpsearch", *words])
        code: object = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        return code or 0, capsys.readouterr().err

    return run
