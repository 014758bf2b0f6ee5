"""What every exporter must do, of every scheme that a runtime which names it runs: a file in conf/exporter/ is tested at once.

Weights are decoded by the runtime's own reader as the search scored them, the file weighs what the budget counted, and the model
in the runtime has our loss. An exporter of models of one kind names its network in `NETWORKS`.
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mpsearch
from mpsearch.allocation import Allocation
from mpsearch.errors import InputError
from mpsearch.exporters.base import ModelCall, Picked
from mpsearch.graph.shared_copy import shared_copy
from mpsearch.graph.trace import first_samples
from mpsearch.pipeline.evaluators import SearchEvaluator
from mpsearch.pipeline.prepare import prepare
from mpsearch.registry import names, resolve

HEADER = 40_000  # bytes of a file that describe its tensors and its graph
PER_LAYER = 512  # bytes by which descriptions of a layer and its padding may differ


class Net(nn.Module):
    """Images [n, 4, 8, 8] -> logits [n, 5]: convolutions (one depthwise), batch norms, tied weights, rows of 256."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(4, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.depthwise, self.other_norm = nn.Conv2d(32, 32, 3, stride=2, padding=1, groups=32, bias=False), nn.BatchNorm2d(32)
        self.pointwise = nn.Conv2d(32, 256, 1)
        self.one, self.two = nn.Linear(256, 256), nn.Linear(256, 256)
        self.two.weight = self.one.weight
        self.head = nn.Linear(256, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.other_norm(self.depthwise(x)))
        x = F.relu(self.pointwise(x)).mean((2, 3))
        return self.head(F.gelu(self.two(F.relu(self.one(x)))))


def images(tmp_path):
    torch.manual_seed(0)
    net = Net().eval()
    for norm in (net.norm, net.other_norm):
        for tensor in (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data):
            tensor.uniform_(0.2, 1.5)
    net.head.weight.data.mul_(8)
    splits = {split: [torch.randn(24, 4, 8, 8)] for split in ("calibration", "search", "confirm")}
    return net, mpsearch.fidelity_task(**splits)


def language_model(tmp_path):
    from mpsearch.models.huggingface import huggingface
    from tests.exporters.test_compressed_tensors import source, task

    return huggingface(source(tmp_path, "llama")), task("llama")


def rows_of_256(tmp_path):
    from mpsearch.models.huggingface import huggingface
    from tests.exporters import test_gguf

    sizes = {"hidden_size": 256, "intermediate_size": 512}
    return huggingface(test_gguf.saved(tmp_path, test_gguf.model_of("llama", gain=1, **sizes))), test_gguf.task()


# Exporter -> a function that returns the float model and its task.
NETWORKS: dict[str, Callable[..., Any]] = {
    "compressed_tensors": language_model,
    "gguf": rows_of_256,
    "torchao": language_model,
}
# Exporters whose runtime keeps a code of any width in a byte.
UNPACKED = {"torchao"}
# Exporters that do not write all yet that the profile of their runtime names.
INCOMPLETE: set[str] = set()


def runtimes(exporter):
    """The runtimes whose files it writes; `packed` is one more form of those that mpsearch runs."""
    named = [name for name in names("runtime") if resolve("runtime", name).exporter == exporter]
    return [name for name in named if name == "mpsearch" or exporter != "native"] or ["mpsearch"]


def cases():
    return [
        (exporter, runtime)
        for exporter in names("exporter")
        if resolve("exporter", exporter).holds_weights
        for runtime in runtimes(exporter)
    ]


@functools.cache
def opened(exporter, runtime, folder):
    """An engine with every scheme that the runtime runs on some layer, and the exporter."""
    made = resolve("exporter", exporter)
    try:
        made.check_installed()
    except InputError as error:
        pytest.skip(str(error))
    model, task = NETWORKS.get(exporter, images)(folder / "source")
    schemes = {name: resolve("scheme", name) for name in names("scheme")}
    prepared = prepare(model, task, schemes=schemes, quantizer="round_to_nearest", runtime=runtime)
    engine = prepared.engine(folder / "bank")
    call = ModelCall.record(engine.model, task.forward, first_samples(prepared.calibration[0][0], 2)) if made.needs_call else None
    parts = {"exporter": made, "prepared": prepared, "engine": engine, "evaluate": SearchEvaluator(engine), "call": call}
    return SimpleNamespace(name=exporter, **parts, sizes={})


@pytest.fixture
def case(request, tmp_path_factory):
    """The parts of a case; folders are made once."""
    exporter, runtime = request.param
    known = request.config.stash.setdefault(FOLDERS, {})
    folder = known.setdefault((exporter, runtime), tmp_path_factory.mktemp(f"{exporter}-{runtime}"))
    return opened(exporter, runtime, folder)


FOLDERS = pytest.StashKey[dict]()


def uniform(space, scheme):
    """The scheme where the runtime runs it, else the largest one."""
    most = lambda choices: max(choices, key=lambda name: space.schemes[name].weight_bits)  # noqa: E731
    choices = zip(space.groups, space.choices, strict=True)
    return Allocation({group.name: scheme if scheme in allowed else most(allowed) for group, allowed in choices})


def exported(case, allocation, folder):
    e = case.evaluate(allocation, "user")
    plan = case.prepared.plan
    picked = Picked(e, {"search": e}, {}, "agreement", plan.model_sha256, plan.folds, plan.equalization, case.call)
    try:
        return e, case.exporter.export(picked, case.engine, folder)
    except InputError as error:
        if case.name in INCOMPLETE:
            pytest.xfail(str(error))
        raise


def copied(case):
    return shared_copy(case.prepared.original)


@pytest.mark.parametrize("scheme", names("scheme"))
@pytest.mark.parametrize("case", cases(), indirect=True, ids="-".join)
@pytest.mark.thin(4)
@pytest.mark.filterwarnings("ignore")
def test_the_runtime_has_what_was_scored(case, scheme, tmp_path):
    engine = case.engine
    if not any(scheme in allowed for allowed in engine.space.choices):
        pytest.skip("the runtime runs no layer in it")
    allocation = uniform(engine.space, scheme)
    e, path = exported(case, allocation, tmp_path / "out")
    decoded = case.exporter.decode(path, copied(case))
    for group in engine.space.groups:
        for layer in group.layers:
            expected = engine.quantized(layer.name, allocation[group.name]).dequantize()
            assert torch.equal(decoded[layer.name].reshape(expected.shape), expected), layer.name
    ours = engine.score(allocation, "confirm").loss
    theirs = engine.score_of(case.exporter.open(path, copied(case)), "confirm").loss
    assert theirs <= 1.1 * ours + 1e-4

    if case.name in UNPACKED:
        return
    written = sum(file.stat().st_size for file in case.exporter.files(path) if file.suffix not in (".json", ".xml"))
    assert e.size_bytes - PER_LAYER * len(engine.space.layers) <= written <= e.size_bytes + HEADER
    case.sizes[scheme] = written - e.size_bytes
    spread = max(case.sizes.values()) - min(case.sizes.values())
    assert spread <= PER_LAYER * len(engine.space.layers), "what is not counted does not grow with the bits"


@pytest.mark.parametrize("case", cases(), indirect=True, ids="-".join)
@pytest.mark.filterwarnings("ignore")
def test_the_runtimes_exporter_writes_all_that_it_runs_in_one_file(case, tmp_path):
    """Every scheme in turn."""
    space = case.engine.space
    turn = {
        group.name: allowed[i % len(allowed)] for i, (group, allowed) in enumerate(zip(space.groups, space.choices, strict=True))
    }
    allocation = Allocation(turn)
    _, path = exported(case, allocation, tmp_path)
    ours = case.engine.score(allocation, "confirm").loss
    assert case.engine.score_of(case.exporter.open(path, copied(case)), "confirm").loss <= 1.1 * ours + 1e-4
    assert set(case.exporter.files(path)) <= set(tmp_path.rglob("*"))
