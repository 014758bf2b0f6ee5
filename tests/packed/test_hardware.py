"""What the hardware command says: the self-test can fail, and the latencies are of what runs."""

import io
import json
import sys
import time

import pandas as pd
import pytest
import torch
from torch import nn

from mpsearch import kernels
from mpsearch.allocation import SearchSpace
from mpsearch.costs.latency import FLOAT, REST, read_latency
from mpsearch.graph.trace import trace_layers
from mpsearch.packed import hardware
from mpsearch.packed.hardware import facts, measure_latency, model_latency, self_test
from mpsearch.quantizers.round_to_nearest import RoundToNearest
from mpsearch.schemes.codebook import Codebook
from mpsearch.schemes.floating import Float
from mpsearch.schemes.integer import Integer
from mpsearch.schemes.level_input import LevelInput
from mpsearch.schemes.rotated import Rotated


def test_facts(monkeypatch):
    monkeypatch.setattr(hardware, "READ_BYTES", 2**22)
    found = facts()
    assert kernels.active_backend() + " (used)" in found["kernels"]
    assert "GB/s with 1 threads" in found["read bandwidth"]
    assert "cores" in found["processor"]
    assert found.get("GPU") == "none answers" or "compute capability" in found["cuda:0"]


def test_every_backend_passes_the_self_test():
    assert self_test() == [(backend, 16, 0) for backend in kernels.available_backends()[1:]]


def test_the_self_test_finds_a_wrong_kernel(monkeypatch):
    if len(kernels.available_backends()) == 1:
        pytest.skip("there are no compiled kernels here")
    right = kernels.linear_a8

    def wrong(x, weight):
        return right(x, weight) + (kernels.active_backend() != "reference" and weight.format.bits == 5)

    monkeypatch.setattr(kernels, "linear_a8", wrong)
    assert {n_wrong for _, _, n_wrong in self_test()} == {2}


class Slow(nn.Module):
    def forward(self, x):
        time.sleep(0.02)
        return x


class Net(nn.Module):
    """A layer called twice, one with a slow rest, one that no kernel runs, and tied weights."""

    def __init__(self):
        super().__init__()
        self.twice, self.big = nn.Linear(8, 8), nn.Linear(8, 8)
        self.up, self.slow = nn.ConvTranspose1d(1, 1, 3), Slow()
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.big.weight

    def forward(self, x, scale):
        x = self.twice(torch.relu(self.twice(x))) * scale
        x = self.slow(self.tied(self.big(x)))
        return self.up(x[:, None])[:, 0, :5]


SCHEMES = {"w4": Integer(4), "w4a8": Integer(4, input={"bits": 8}), "fp16": Float("float16")}


def test_the_latency_of_each_layer_and_of_the_rest(tiny):
    net, inputs = Net().eval(), (torch.randn(3, 8), torch.tensor(2.0))

    def forward(model, batch):
        return model(*batch)

    space = SearchSpace.build(trace_layers(net, forward, inputs), SCHEMES, ["up:fp16|w4"])
    before = tiny.state(net)
    rows = measure_latency(net, forward, space, dict.fromkeys(SCHEMES, RoundToNearest()), inputs, seconds=0.3)
    tiny.assert_same_state(net, before)
    assert "forward" not in vars(net.twice)
    found = {(row.layer, row.scheme): row for row in rows}
    assert len(found) == len(rows) == 1 + 3 + 3 * 3 - 1
    assert found[REST, REST].milliseconds > 20
    assert all(0 < row.milliseconds < 20 for row in rows[1:])
    assert {(row.batch_size, row.threads, row.backend) for row in rows} == {
        (3, torch.get_num_threads(), kernels.active_backend())
    }
    assert [found["twice", s].op for s in (FLOAT, "w4", "w4a8", "fp16")] == ["linear", "linear", "linear_a8", "dequantize"]
    assert found["up", "w4"].op == "dequantize"
    assert ("up", "w4a8") not in found
    assert found["twice", "w4"].shape == "3x8 3x8", "called twice"
    whole = model_latency({"float": net}, forward, inputs, 0.3)["float"].median
    predicted = sum(row.milliseconds for row in rows if row.scheme in (FLOAT, REST))
    assert predicted == pytest.approx(whole, rel=0.25)


def test_rotations_and_inputs_are_timed_too(monkeypatch):
    calls = {"rotate": 0, "input": 0}
    rotate, fake_quantize = kernels.rotate, LevelInput.fake_quantize

    def counted_rotate(x, **how):
        calls["rotate"] += 1
        return rotate(x, **how)

    def counted_input(self, *how):
        calls["input"] += 1
        return fake_quantize(self, *how)

    monkeypatch.setattr(kernels, "rotate", counted_rotate)
    monkeypatch.setattr(LevelInput, "fake_quantize", counted_input)
    net, inputs = nn.Sequential(nn.Linear(8, 5)).eval(), torch.randn(3, 8)
    schemes = {"w4r": Rotated(Integer(4)), "w4a8r": Rotated(Integer(4, input={"bits": 8})), "fp8a8": Codebook("e4m3", input=FP8)}
    space = SearchSpace.build(trace_layers(net, nn.Module.__call__, inputs), schemes)
    rows = measure_latency(net, nn.Module.__call__, space, dict.fromkeys(schemes, RoundToNearest()), inputs, seconds=0.05)
    assert [row.op for row in rows if row.layer == "0"] == ["linear", "linear", "linear_a8", "dequantize"]
    assert calls["rotate"] > 2 * 2 * hardware.LEAST_ROUNDS, "of two layers and two networks, beside the two weights"
    assert calls["input"] > 2 * hardware.LEAST_ROUNDS


FP8 = {"levels": "e4m3"}


def test_the_command_and_a_search_under_its_table(tmp_path, mpsearch, undrawn, monkeypatch):
    """`mpsearch hardware` measures, `cost=latency_ms` reads: predictions are sums of the table, and the front is one of time."""

    def run(*words):
        said = io.StringIO()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", said)
            code, err = mpsearch(*words)
        assert code == 0, err
        return said.getvalue()

    schemes = "scheme=[w2a8,w4a8,w8a8]"
    said = run("hardware", schemes, "seconds=0.1", "hydra.run.dir=hw")
    assert "16 of 16 cases agree" in said
    assert "conv_a8" in said
    assert {path.name for path in (tmp_path / "hw").iterdir()} >= {"latency.csv", "latency.png"}
    rows = read_latency(tmp_path / "hw" / "latency.csv")
    uniform = {s: sum(row.milliseconds for row in rows if row.scheme in (s, REST)) for s in ("w2a8", "w4a8", "w8a8")}
    limit = 1.001 * max(uniform.values())
    costs = ["cost=[bytes,bits,fraction,latency_ms]", "cost.latency_ms.path=hw/latency.csv", f"budget.latency_ms={limit}"]
    run("search", schemes, *costs, "objective=latency_ms", "n_trials=8", "n_seeds=4", "hydra.run.dir=run")
    table = pd.read_csv(tmp_path / "run" / "evaluations.csv", dtype={"allocation": str})
    for i, ms in enumerate(uniform.values()):
        measured = table[table.allocation == str(i) * len(str(table.allocation.iloc[1]))]
        assert measured.latency_ms.to_list() == pytest.approx([ms] * len(measured))
        assert measured[measured.split == "confirm"].measured_ms.gt(0).all()
    front = pd.read_csv(tmp_path / "run" / "front.csv")
    chosen = front[front.split == "search"]
    assert chosen.latency_ms.is_monotonic_increasing
    assert chosen.loss.is_monotonic_decreasing
    confirmed = front[front.split == "confirm"]
    assert "packed weights" in (tmp_path / "run" / "report.md").read_text()
    path = run("export", "run=run", f"pick.max_ms={confirmed.measured_ms.max()}").splitlines()[-1]
    assert json.loads((tmp_path / path).read_text())["layers"]
