"""The laws that hold across modules: size has one definition, and what is searched is not what is reported."""

import functools
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mpsearch.allocation import ALPHABET
from mpsearch.costs.size import AverageBits, Bytes, Fraction
from mpsearch.exporters.base import Picked
from mpsearch.exporters.native import Native
from mpsearch.metrics.kl import KL
from mpsearch.pipeline.confirm import confirm
from mpsearch.pipeline.evaluators import ConfirmEvaluator, SearchEvaluator
from mpsearch.pipeline.search import search
from mpsearch.pipeline.sensitivity import measure_sensitivity
from mpsearch.quantizers.round_to_nearest import RoundToNearest
from mpsearch.runs.run import Run
from mpsearch.samplers.base import Problem, build_sampler
from mpsearch.schemes.codebook import Codebook
from mpsearch.schemes.floating import FORMATS, Float
from mpsearch.schemes.integer import Integer
from mpsearch.schemes.levels import LEVELS
from mpsearch.schemes.outliers import Outliers

EVERY_SCHEME = [
    *(
        Integer(bits, group_size, symmetric, scale_dtype)
        for bits in range(1, 9)
        for group_size in ("tensor", "channel", 1, 7, 16, 64)
        for symmetric in (True, False)
        for scale_dtype in ("float16", "float32")
    ),
    *(Float(format) for format in FORMATS),
    *(Codebook(levels, size, scale) for levels in LEVELS for size, scale in ((7, "float16"), (32, "e8m0"), (16, "e4m3"))),
    *(Outliers(dense, share) for dense in (Integer(3, 7), Codebook("nf4", 16)) for share in (1e-3, 0.01, 0.1)),
]


def some_seeds(n):
    """Seeds 0 to `n` - 1: the first fifth of them in every run of the tests, all in the full one."""
    return [pytest.param(seed, marks=[pytest.mark.slow] * (5 * seed >= n)) for seed in range(n)]


class Odd(nn.Module):
    """Layers of every kind and of sizes that fill no byte and no group: odd rows, odd columns, one weight, tied weights."""

    def __init__(self, rng):
        super().__init__()
        width, c = int(rng.integers(1, 12)), int(rng.integers(1, 6))
        self.embed = nn.Embedding(int(rng.integers(5, 12)), width)
        self.linear = nn.Linear(width, int(rng.integers(1, 40)), bias=bool(rng.integers(2)))
        self.one = nn.Conv1d(1, 2 * c, int(rng.integers(1, 6)), padding=4)
        self.grouped = nn.Conv1d(2 * c, 2 * c, 3, groups=2, padding=1, bias=False)
        self.up = nn.ConvTranspose1d(2 * c, 3, int(rng.integers(1, 5)), stride=2)
        self.norm = nn.BatchNorm1d(3)
        self.scalar, self.tied = nn.Linear(1, 1), nn.Linear(1, 1)
        self.tied.weight = self.scalar.weight
        self.head = nn.Linear(3, 5)

    def forward(self, x):
        x = self.linear(self.embed((x.abs() * 10).long() % 5)).flatten(1)[:, None]
        x = self.norm(self.up(self.grouped(self.one(x)))).mean(2, keepdim=True)
        return self.head(self.tied(self.scalar(x))[..., 0])


def random_engine(tiny, seed):
    """An engine of an odd network, with as many random schemes as fit into one space."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    picked = rng.choice(len(EVERY_SCHEME), len(ALPHABET), replace=False)
    schemes = {f"s{i}": EVERY_SCHEME[i] for i in picked}
    engine = tiny.engine(Odd(rng).eval(), tiny.task(n=3, shape=(2,)), schemes, quantizer=RoundToNearest())
    return rng, engine


def test_all_schemes_have_their_turn():
    drawn = {int(i) for seed in range(20) for i in np.random.default_rng(seed).choice(len(EVERY_SCHEME), 62, replace=False)}
    assert len(EVERY_SCHEME) == 195 + 24 + 6
    assert len(drawn) > 210


@pytest.mark.parametrize("seed", some_seeds(20))
def test_size_has_one_definition(tiny, seed):
    """50 random allocations each: what is counted, what is budgeted, what is reported, and what the packed tensors weigh."""
    rng, engine = random_engine(tiny, seed)
    space = engine.space
    parameters = {id(t): t.nbytes for t in (*engine.model.parameters(), *engine.model.buffers())}
    searched = {layer.name: engine.model.get_submodule(layer.name).weight for layer in space.layers}
    others = sum(parameters.values()) - sum(weight.nbytes for weight in searched.values())
    assert len(space.groups) == 7, "tied weights are one layer"
    tables = [cost.table(space) for cost in (Bytes(), AverageBits(), Fraction())]
    evaluate = SearchEvaluator(engine)
    engine.score = lambda allocation, split: SCORE
    for _ in range(50):
        choice = rng.integers(0, len(space.schemes), len(space.groups))
        allocation = space.allocation(choice)
        packed = 0
        for group, (name, scheme) in zip(space.groups, allocation.items(), strict=True):
            for layer in group.layers:
                stored = engine.quantized(layer.name, scheme)
                assert 8 * stored.nbytes == space.schemes[scheme].storage_bits(layer.shape)
                space.schemes[scheme].check(stored.tensors, layer.shape)
                assert stored.nbytes == sum(t.numel() * t.element_size() for t in stored.tensors.values())
                packed += stored.nbytes
            assert name == group.name
        e = evaluate(allocation, "sampler")
        assert e.size_bytes == packed + others == tables[0].cost_of(choice)
        assert e.average_bits == pytest.approx(8 * packed / sum(w.numel() for w in searched.values()), rel=1e-12)
        assert e.fraction == pytest.approx(e.size_bytes / sum(parameters.values()), rel=1e-12)
        assert [table.cost_of(choice) for table in tables[1:]] == pytest.approx([e.average_bits, e.fraction], rel=1e-9)


class SCORE:  # what a stored size does not depend on
    loss = cross_entropy = quality = quality_low = quality_high = 0.0
    n_samples, verified = 0, True
    proposal_loss, losses = None, np.empty(0)


@pytest.mark.parametrize("seed", some_seeds(5))
def test_the_exported_file_weighs_what_was_counted(tiny, tmp_path, seed):
    """To the byte, but for corrected biases, which are those of the model and counted there."""
    rng, engine = random_engine(tiny, seed)
    evaluate = SearchEvaluator(engine)
    for _ in range(4):
        allocation = engine.space.allocation(rng.integers(0, len(engine.space.schemes), len(engine.space.groups)))
        e = evaluate(allocation, "sampler")
        path = Native().export(Picked(e, {"search": e}, {}, "accuracy", "0" * 64, ()), engine, tmp_path)
        said = json.loads(path.read_text())
        file = tmp_path / said["tensors"]["file"]
        assert {file.name for file in tmp_path.iterdir()} == {path.name, file.name}, "earlier tensors are removed"
        tensors = load_file(file)
        biases = {f"{name}.bias" for group, s in allocation.items() for name in engine.biases(group, s)}
        weights = sum(tensor.nbytes for name, tensor in tensors.items() if name not in biases)
        assert 8 * weights + engine.space.other_bits == 8 * e.size_bytes
        header = int.from_bytes(file.read_bytes()[:8], "little")
        in_biases = sum(tensors[name].nbytes for name in biases)
        assert file.stat().st_size == 8 + header + weights + in_biases
        assert said["size_bytes"] == e.size_bytes
        assert sum(layer["size_bytes"] for layer in said["layers"].values()) == weights


def test_what_is_searched_is_not_what_is_reported(tiny):
    """The search asks for no confirmation data, confirmation for nothing else."""
    import optuna

    task = tiny.task()
    engine = tiny.engine(tiny.net(), task)
    batches, asked = task.batches, []
    task.batches = lambda split: asked.append(split) or batches(split)
    table = measure_sensitivity(engine, KL())
    evaluate = SearchEvaluator(engine)
    make = functools.partial(optuna.samplers.NSGAIISampler, population_size=4)
    search(evaluate, build_sampler(make, Problem(table)), n_trials=8, n_seeds=3)
    assert set(asked) == {"search"}
    asked.clear()
    confirm(ConfirmEvaluator(engine, evaluate.log), Run(engine.space, "accuracy", evaluate.log, table))
    assert set(asked) == {"confirm"}
