"""What was scored is what is deployed: an exported allocation makes of the float model the very same network, to the last bit."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mpsearch
from mpsearch.exporters.base import Picked
from mpsearch.exporters.native import Native
from mpsearch.graph.fold import fold_batch_norms
from mpsearch.layer import weights_sha256
from mpsearch.models.digits import digits
from mpsearch.pipeline.evaluators import SearchEvaluator
from mpsearch.schemes.floating import Float
from mpsearch.schemes.integer import Integer
from mpsearch.tasks.digits import Digits

SCHEMES = {
    "w1": Integer(1),
    "w2": Integer(2),
    "w3g7": Integer(3, 7, symmetric=False, scale_dtype="float32"),
    "w5": Integer(5, "tensor", symmetric=False),
    "w8": Integer(8, 64),
    "bf16": Float("bfloat16"),
    "fp32": Float("float32"),
}


class Mixed(nn.Module):
    """Tied weights, a transposed convolution, an embedding, batch norms that fold and one that does not."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.one.weight
        self.conv, self.fold = nn.Conv1d(4, 6, 3, bias=False, padding=1), nn.BatchNorm1d(6)
        self.up, self.keep = nn.ConvTranspose1d(6, 4, 3, stride=2, groups=2), nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = self.other(F.relu(self.one(self.embed((x.abs() * 3).long() % 6)))).transpose(1, 2)
        x = F.relu(self.fold(self.conv(x)))
        return self.head(self.keep(F.relu(self.up(x))).mean(2))


def mixed():
    torch.manual_seed(7)
    model = Mixed()
    for norm in (model.fold, model.keep):
        for tensor in (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data):
            tensor.uniform_(0.2, 2.0)
    return model.eval()


@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("name", ["digits", "mixed"])
def test_the_exported_model_is_the_one_that_was_scored(tiny, tmp_path, name, bias_correction):
    build, task = (digits, Digits()) if name == "digits" else (mixed, tiny.task(shape=(9,)))
    model = build()
    sha256 = weights_sha256(model)
    folds = fold_batch_norms(model, task.forward, task.batches("calibration")[0][0])
    assert len(folds) == {"digits": 9, "mixed": 1}[name]
    engine = tiny.engine(model, task, SCHEMES, bias_correction=bias_correction)
    evaluate = SearchEvaluator(engine)
    rng = np.random.default_rng(3)
    for _ in range(3):
        e = evaluate(engine.space.allocation(rng.integers(0, len(SCHEMES), len(engine.space.groups))), "sampler")
        path = Native().export(Picked(e, {"search": e}, {}, "accuracy", sha256, folds), engine, tmp_path)
        deployed = mpsearch.load_allocation(path).apply(build().train())
        with torch.no_grad():
            for inputs, _ in task.batches("confirm"):
                with engine.applied(e.allocation) as scored:
                    expected = task.forward(scored, inputs)
                assert torch.equal(task.forward(deployed, inputs), expected)
        assert not deployed.training


def test_tied_weights_stay_tied(tiny, tmp_path):
    model = mixed()
    engine = tiny.engine(model, tiny.task(shape=(9,)), SCHEMES)
    e = SearchEvaluator(engine)(engine.space.uniform("w2"), "uniform")
    path = Native().export(Picked(e, {}, {}, "accuracy", weights_sha256(model), ()), engine, tmp_path)
    deployed = mpsearch.load_allocation(path).apply(mixed())
    assert deployed.one.weight is deployed.other.weight
    assert not torch.equal(deployed.one.bias, model.one.bias)
    assert not torch.equal(deployed.other.bias, model.other.bias)
