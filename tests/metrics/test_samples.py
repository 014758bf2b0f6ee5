"""Gauss-Newton features need all positions that reach a sample's logits, wherever a network keeps them."""

import gc
import itertools
import re
import weakref
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from mpsearch.divergence import SoftmaxKL
from mpsearch.files.scratch import joined
from mpsearch.metrics.fisher import Call, Recording, record_calls
from mpsearch.metrics.gauss_newton import GaussNewton
from mpsearch.metrics.kl import KL
from mpsearch.metrics.samples import Layout, find_layouts, layouts, probe_signs
from mpsearch.quantizers.round_to_nearest import RoundToNearest
from mpsearch.runs.deadline import Deadline
from mpsearch.schemes.input import IntegerInput
from mpsearch.schemes.integer import Integer
from mpsearch.tasks.makers import classification


class SequenceFirst(nn.Module):
    """Tokens `[n, tokens]` -> logits `[n, 5]`, or of each token; its encoder sees `[tokens, n, width]`."""

    def __init__(self, per_token=False):
        super().__init__()
        torch.manual_seed(0)
        self.per_token = per_token
        self.embed = nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=False)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 5)

    def forward(self, x):
        hidden = self.encoder(self.embed(x).transpose(0, 1))
        return self.head(hidden.transpose(0, 1) if self.per_token else hidden.mean(0)) * 2


class Pairs(nn.Module):
    """Pairs `[n, 2, 8]` -> the similarities of each first with all second ones `[n, n]`, both encoded at once."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        encoded = self.two(self.one(torch.cat([x[:, 0], x[:, 1]])).relu())
        first, second = nn.functional.normalize(encoded, dim=1).chunk(2)
        return first @ second.T / 0.2


def data(n=48, batch_size=16, per_token=False, pairs=False):
    generator = torch.Generator().manual_seed(0)

    def split():
        if pairs:
            return torch.randn(n, 2, 8, generator=generator), torch.arange(n) % batch_size
        tokens = torch.randint(20, (n, 12), generator=generator)
        return tokens, tokens % 5 if per_token else tokens[:, 0] % 5

    return classification(calibration=split(), search=split(), confirm=split(), batch_size=batch_size, per_token=per_token)


@pytest.mark.parametrize(
    ("net", "options"),
    [
        (SequenceFirst, {}),
        (partial(SequenceFirst, per_token=True), {"per_token": True}),
        (Pairs, {"pairs": True, "batch_size": 8}),
    ],
    ids=["sequence first", "tokens", "pair similarity"],
)
def test_predicts_the_measured_loss_where_logits_depend_on_several_positions(tiny, net, options):
    schemes = {f"w{bits}": Integer(bits) for bits in (3, 4, 5, 6)}
    engine = tiny.engine(net().eval(), data(**options), schemes, quantizer=RoundToNearest())
    pairs = list(itertools.product(engine.space.names, schemes))
    measured, predicted = (np.array(list(metric.measure(engine, pairs))) for metric in (KL(), GaussNewton()))
    counted = (measured > 1e-5) & (measured < 0.05)
    ratios = (predicted / measured)[counted]
    assert counted.sum() >= 6
    assert np.mean((ratios > 0.8) & (ratios < 1.25)) >= 0.9
    assert 0.9 < np.median(ratios) < 1.1


class Stack(nn.Module):
    """Tokens `[n, tokens]` -> logits `[n * tokens, 5]`; the linear layers in the middle are called on `[n, tokens, width]`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix = nn.Embedding(20, 16), nn.Linear(16, 24)
        self.down, self.head = nn.Linear(24, 16, bias=False), nn.Linear(16, 5)

    def forward(self, x):
        hidden = self.embed(x)
        hidden = hidden + self.down(self.mix(hidden).cumsum(1).tanh())
        return self.head(hidden.relu()).flatten(0, 1)


@pytest.mark.parametrize(("correct", "max_bytes"), [(False, 2**25), (True, 2**25), (True, 0)])
def test_gradients_of_weights_give_the_features_that_changes_of_outputs_do(tiny, monkeypatch, correct, max_bytes):
    schemes = {"w3": Integer(3), "w4": Integer(4), "w4a8": Integer(4, input=IntegerInput(8))}
    task = data(n=8, batch_size=4, per_token=True)
    engine = tiny.engine(Stack().eval(), task, schemes, quantizer=RoundToNearest(), bias_correction=correct)
    pairs = list(itertools.product(engine.space.names, schemes))
    expected, products = GaussNewton().measure_joint(engine, pairs)
    monkeypatch.setattr("mpsearch.metrics.gauss_newton.FEWEST_POSITIONS", 2)
    monkeypatch.setattr("mpsearch.metrics.gauss_newton.GRADIENT_BYTES", 4 * 24 * 16 * 4)
    calls = []
    monkeypatch.setattr("mpsearch.metrics.gauss_newton.WEIGHT_BYTES", max_bytes)
    monkeypatch.setattr("mpsearch.metrics.gauss_newton.joined", lambda *args: calls.append(0) or joined(*args))
    values, others = GaussNewton().measure_joint(engine, pairs)
    assert calls
    assert values == pytest.approx(expected, rel=1e-4)
    assert others.T @ others == pytest.approx(products.T @ products, rel=1e-3, abs=1e-5 * float(np.square(products).sum(0).max()))


def test_a_near_end_leaves_out_passes_and_says_so(tiny):
    task = data(n=96, batch_size=4, per_token=True)
    engine = tiny.engine(Stack().eval(), task, {"w3": Integer(3)}, quantizer=RoundToNearest())
    pairs = [(name, "w3") for name in engine.space.names]
    ample, near = Deadline(1e6), Deadline(1e-3)
    exact, _ = GaussNewton().measure_joint(engine, pairs, ample)
    assert not ample.sentence()
    values, effects = GaussNewton().measure_joint(engine, pairs, near)
    assert re.search(r"the run left out \d+ of \d+ backward passes for the sensitivities\.$", near.sentence())
    assert len(effects) == len(pairs)
    assert 0.5 < values.sum() / exact.sum() < 2, "still an estimate of the same"


@pytest.mark.parametrize("per_token", [False, True])
def test_the_graph_of_a_batch_is_let_go_of_before_the_next(tiny, monkeypatch, per_token):
    net, logits = SequenceFirst(per_token).eval(), []

    @contextmanager
    def recorded(*args):
        assert [each() for each in logits] == [None] * len(logits)
        with record_calls(*args) as recording:
            logits.append(weakref.ref(recording.logits))
            yield recording

    engine = tiny.engine(net, data(per_token=per_token), {"w3": Integer(3)}, quantizer=RoundToNearest())
    monkeypatch.setattr("mpsearch.metrics.gauss_newton.record_calls", recorded)
    gc.disable()
    try:
        GaussNewton().measure_joint(engine, [(name, "w3") for name in engine.space.names])
    finally:
        gc.enable()
    assert len(logits) == 3


def layout_of(make, n=6, counts=None):
    """The layout found of `hidden`, where `make(x)`, x `[n, 4, 3]`, is (hidden, logits); the gradients are checked."""
    x = torch.randn(n, 4, 3, generator=torch.Generator().manual_seed(1), requires_grad=True)
    hidden, logits = make(x)
    recording = Recording(nn.Module())
    recording.calls.append(("layer", Call((), {}, hidden.shape)))
    hidden.register_hook(lambda gradient: recording.consume(0, gradient))
    recording.logits = logits
    (layout,), counting = find_layouts(recording, SoftmaxKL(), probe_signs(logits, 0, 0), counts or [n])
    size = layout.by_sample(torch.autograd.grad(SoftmaxKL().probe(logits, probe_signs(logits, 0, 0)), hidden)[0]).square().sum(1)
    assert counting == pytest.approx((size.sum().square() / size.square().sum()).item(), rel=1e-4)
    return layout


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda x: (h := x * 1, h.sum(1)), Layout(6)),
        (lambda x: (h := x.transpose(0, 1) * 1, h.sum(0)), Layout(6, 1)),
        (lambda x: (h := x.flatten(0, 1) * 1, h.unflatten(0, (6, 4)).sum(1)), Layout(6)),
        (lambda x: (h := x.transpose(0, 1).flatten(0, 1) * 1, h.unflatten(0, (4, 6)).sum(0)), Layout(6, 0, in_turn=True)),
        (lambda x: (h := x * 1, h.cumsum(1).flatten(0, 1)), Layout(6)),
        (lambda x: (h := x * 1, h.cumsum(1).transpose(0, 1).flatten(0, 1)), Layout(6)),
        (lambda x: (h := x * 1, h.sum(1).cumsum(0)), Layout(1)),
        (lambda x: (h := x[torch.tensor([3, 1, 0, 2, 5, 4])] * 1, h[torch.tensor([2, 1, 3, 0, 5, 4])].sum(1)), Layout(1)),
        (lambda x: (h := x.mean(0, keepdim=True) * 1, x.sum(1) + h.sum(1)), Layout(1)),
    ],
    ids=["first", "second axis", "joined", "in turn", "tokens", "tokens in turn", "mixed", "routed", "shared"],
)
def test_finds_which_positions_reach_which_sample(make, expected):
    assert layout_of(make) == expected


def test_the_number_of_samples_is_one_of_those_that_are_possible():
    assert layout_of(lambda x: (h := x.transpose(0, 1) * 1, h.sum(0)), counts=[4, 6]) == Layout(6, 1)
    assert layout_of(lambda x: (h := x * 1, h.sum(1)), counts=[5, 1]) == Layout(1)


def test_layouts_divide_a_tensor_among_samples():
    x = torch.arange(24).reshape(2, 6, 2)
    for layout in layouts(x.shape, 2):
        assert layout.by_sample(x).shape == (2, 12)
        assert layout.by_sample(x).flatten().sort().values.equal(x.flatten())
    assert [(layout.axis, layout.in_turn) for layout in layouts((2, 6, 3), 2)] == [(0, False), (1, False), (1, True)]
    assert Layout(2, 1, in_turn=True).by_sample(x)[0].tolist() == [0, 1, 12, 13, 4, 5, 16, 17, 8, 9, 20, 21]


def test_as_many_probes_as_directions_leave_out_none():
    like = torch.empty(5, 6)
    signs = torch.stack([probe_signs(like, 3, index) for index in range(8)])
    assert signs.abs().eq(1).all()
    for row in signs.unbind(1):  # [probes, columns]
        assert torch.equal(row.T @ row, 8 * torch.eye(6))
    assert not torch.equal(signs[0], probe_signs(like, 4, 0))
    assert torch.equal(signs[0, 0], probe_signs(like, 3, 0)[0])
