"""The loss of every kind of task: exact however small, with the Hessian that the metrics use, chosen by outputs and targets."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mpsearch.divergence import LOSS_FLOOR, RelativeMSE, SigmoidKL, SoftmaxKL, choose
from mpsearch.errors import InputError
from mpsearch.metrics.fisher import Fisher
from mpsearch.metrics.gauss_newton import GaussNewton
from mpsearch.metrics.hawq import HAWQ
from mpsearch.metrics.kl import KL
from mpsearch.schemes.floating import Float
from mpsearch.tasks.base import SPLITS, Task

KINDS = (SoftmaxKL(), SigmoidKL(), RelativeMSE(2.0))


def as_probabilities(kind, z):
    return z.softmax(-1) if isinstance(kind, SoftmaxKL) else z.sigmoid()


@pytest.mark.parametrize("size", [1e-7, 1e-5, 1e-3, 0.1, 3.0])
@pytest.mark.parametrize("columns", [2, 10, 50_000])
def test_softmax_kl_is_exact_however_small(size, columns):
    """To second order KL = Var_p[dz] / 2, computed here apart; the sum of p (log p - log q) in float32 gives 0 or noise."""
    generator = torch.Generator().manual_seed(columns)
    z0 = 3 * torch.randn(7, columns, generator=generator)
    z = z0 + size * torch.randn(7, columns, generator=generator)
    change, p = (z.double() - z0.double()), z0.double().softmax(-1)
    found = SoftmaxKL().rows(z, z0)
    if size < 1e-2:
        mean = (p * change).sum(-1, keepdim=True)
        second, third = ((p * (change - mean) ** k).sum(-1) for k in (2, 3))
        assert torch.allclose(found, second / 2 + third / 6, rtol=1e-3, atol=0)
    else:
        direct = (p * (z0.double().log_softmax(-1) - z.double().log_softmax(-1))).sum(-1)
        assert torch.allclose(found, direct, rtol=1e-9, atol=0)
    assert (found >= 0).all()
    assert found.mean() > 0
    assert not SoftmaxKL().rows(z0, z0).any()


def test_a_small_loss_is_not_zero_and_memory_is_bounded(monkeypatch):
    """2.2e-8, which float32 reported as 0, and no more than CHUNK elements at once."""
    generator = torch.Generator().manual_seed(0)
    z0 = torch.randn(300, 1000, generator=generator)
    z = z0 + 2.1e-4 * torch.randn(300, 1000, generator=generator)
    whole, sizes = SoftmaxKL().rows(z, z0), []
    assert 2.0e-8 < whole.mean().item() < 2.4e-8
    monkeypatch.setattr("mpsearch.batches.CHUNK", 7000)
    plain = SoftmaxKL._rows
    monkeypatch.setattr(SoftmaxKL, "_rows", lambda self, y, y0: sizes.append(y.numel()) or plain(self, y, y0))
    assert torch.equal(SoftmaxKL().rows(z, z0), whole)
    assert max(sizes) == 7000


@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.floats(1e-6, 30))
def test_divergences_are_those_of_the_textbook(seed, kind, size):
    generator = torch.Generator().manual_seed(seed)
    y0 = torch.randn(5, 3, generator=generator).mul(4)
    y = y0 + size * torch.randn(5, 3, generator=generator)
    a, b = y0.double(), y.double()
    if isinstance(kind, SoftmaxKL):
        expected = (a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1)
    elif isinstance(kind, SigmoidKL):
        one, zero = F.logsigmoid(a) - F.logsigmoid(b), F.logsigmoid(-a) - F.logsigmoid(-b)
        expected = (a.sigmoid() * one + (-a).sigmoid() * zero).sum(-1)
    else:
        expected = (b - a).square().sum(-1) / 2.0
    found = kind.rows(y, y0)
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-14)
    assert (found >= 0).all()
    assert kind.distillation(b, a).item() == pytest.approx(expected.mean().item(), rel=1e-6, abs=1e-14)
    if not isinstance(kind, RelativeMSE):
        same = type(kind)(probabilities=True)
        near = same.rows(as_probabilities(kind, b), as_probabilities(kind, a))
        inside = (a.abs() < 15).all(-1) & (b.abs() < 15).all(-1)  # a probability nearer to 1 than float32 knows is cut
        assert torch.allclose(near[inside], expected[inside], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_broken_outputs_have_an_infinite_loss(kind):
    y0 = torch.randn(4, 3)
    for value in (float("nan"), float("inf"), -float("inf")):
        y = y0.clone()
        y[1, 1] = value
        assert kind.mean(y, y0) == math.inf


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("probabilities", [False, True])
def test_probes_and_drawn_losses_have_the_hessian_of_the_divergence(kind, probabilities):
    """E[g g^T] of both is the Hessian at the float outputs, here from autograd."""
    y = torch.tensor([[0.3, -1.2, 0.8]])
    if probabilities:
        if isinstance(kind, RelativeMSE):
            pytest.skip("has none")
        kind, y = type(kind)(probabilities=True), as_probabilities(kind, y)
    wide = y.double()
    hessian = torch.autograd.functional.hessian(lambda x: kind._rows(x, wide).sum(), wide).view(3, 3)
    generator = torch.Generator().manual_seed(0)
    n = 40_000
    signs = torch.randint(0, 2, (n, 3), generator=generator) * 2.0 - 1
    for loss in (lambda x: kind.probe(x, signs), lambda x: kind.drawn_loss(x, generator)):
        x = y.repeat(n, 1).requires_grad_()
        (g,) = torch.autograd.grad(loss(x), x)
        assert torch.allclose((g.T @ g).double() / n, hessian, atol=0.02 * hessian.abs().max().item()), loss


@pytest.mark.parametrize("kind", [SoftmaxKL(), SigmoidKL()])
def test_the_temperature_lets_many_rows_count(kind):
    """Where one row in a hundred is predicted without confidence, it decides alone at 1."""
    confident = torch.full((100, 5), -8.0)
    confident[:, 0] = 8.0
    undecided = torch.cat([torch.zeros(1, 5), confident[1:]])
    for outputs in (undecided, undecided.repeat(30, 1)):
        temperature = kind.temperature(outputs)
        assert temperature == kind.temperature(outputs.double()) > 1
    even = torch.zeros(7, 5)
    assert kind.temperature(even) == kind.temperature(even[:1]) == RelativeMSE().temperature(undecided) == 1
    y = (undecided / temperature).double()
    hessian = torch.autograd.functional.hessian(lambda x: kind._rows(x, y[-1:]).sum(), y[-1:]).view(5, 5)
    signs = torch.randint(0, 2, (40_000, 5), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    x = undecided[-1:].repeat(40_000, 1).requires_grad_()
    (g,) = torch.autograd.grad(kind.probe(x, signs, temperature), x)
    assert torch.allclose((g.T @ g).double() / len(g), hessian, atol=0.02 * hessian.abs().max().item())


ints, floats = torch.tensor([0, 2, 1, 1]), torch.tensor([0.3, 2.0, -1.0, 0.5])
bits = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.0, 1.0]])
soft = torch.tensor([[0.9, 0.1], [0.5, 0.5], [1.0, 0.0], [0.2, 0.8]])
z2, z3 = (
    torch.randn(4, 2, generator=torch.Generator().manual_seed(0)),
    torch.randn(4, 3, generator=torch.Generator().manual_seed(1)),
)


@pytest.mark.parametrize(
    ("outputs", "targets", "expected"),
    [
        (z3, ints, SoftmaxKL()),
        (z3, ints[:, None], SoftmaxKL()),
        (z3.softmax(-1), ints, SoftmaxKL(probabilities=True)),
        (z2, soft, SoftmaxKL()),
        (z3[:, :1], bits[:, 0], SigmoidKL()),
        (z3[:, :1], bits[:, 0].bool(), SigmoidKL()),
        (z3[:, :1], bits[:, 0].long(), SigmoidKL()),
        (z2[:, :1].sigmoid(), bits[:, :1], SigmoidKL(probabilities=True)),
        (z2, bits, SigmoidKL()),
        (z2, bits.long(), SigmoidKL()),
        (z2.sigmoid(), bits, SigmoidKL(probabilities=True)),
        (z3[:, :1], floats, RelativeMSE),
        (z3[:, :1], ints, RelativeMSE),  # numbers to be counted: 0, 1, 2
        (z2, z2 + 1, RelativeMSE),
        (z3, floats, RelativeMSE),  # an embedding of three, scored in a way of the task's own
    ],
)
def test_the_default_follows_outputs_and_targets(outputs, targets, expected):
    kind, why = choose(None, [outputs], [targets])
    assert why
    if expected is RelativeMSE:
        expected = RelativeMSE((outputs.double() - outputs.double().mean(0)).square().sum(-1).mean().item())
        assert kind.variance == pytest.approx(expected.variance)
    else:
        assert kind == expected
    if isinstance(kind, SoftmaxKL) or targets.numel() == outputs.numel():
        loss = kind.task_loss(outputs, targets)
        assert loss.shape == (4,)
        assert loss.isfinite().all()
    else:
        with pytest.raises(InputError, match="need one target for each output"):
            kind.task_loss(outputs, targets)


def test_a_choice_is_refused_in_a_sentence():
    with pytest.raises(InputError, match=r"no divergence 'softmaxkl'\. Did you mean 'softmax_kl'"):
        choose("softmaxkl", [z3], [ints])
    with pytest.raises(InputError, match="needs two output columns or more; the model has one"):
        choose("softmax_kl", [z3[:, :1]], [ints])
    with pytest.raises(InputError, match="Override the task's quality"):
        RelativeMSE().accuracy(z3, z3)
    assert choose("relative_mse", [z3], [ints])[0].name == "relative_mse"
    assert choose(SigmoidKL(), [z3], [ints])[0] == SigmoidKL()


class Pairs(Task):
    """Inputs [n, 6] and targets of a float network, with noise."""

    def __init__(self, targets_of, **attributes):
        generator = torch.Generator().manual_seed(3)
        self.data = {}
        for split in SPLITS:
            x = torch.randn(64, 6, generator=generator)
            self.data[split] = [(x[i : i + 32], targets_of(x[i : i + 32])) for i in (0, 32)]
        for name, value in attributes.items():
            setattr(self, name, value)

    def batches(self, split):
        return self.data[split]


class Regression(Pairs):
    quality_name, quality_kind = "mae", "error"

    def quality(self, logits, targets):
        return (logits - targets.view(logits.shape)).abs().mean(-1)


def net(columns, last=None):
    torch.manual_seed(1)
    layers = [nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, columns), *([last] if last else [])]
    return nn.Sequential(*layers).eval()


def tasks():
    signs = lambda columns: lambda x: (x[:, :columns] > 0).float()  # noqa: E731
    return {
        "binary": (net(1), Pairs(signs(1)), "sigmoid_kl"),
        "binary, probabilities": (net(1, nn.Sigmoid()), Pairs(signs(1)), "sigmoid_kl"),
        "binary, squeezed": (net(1, nn.Flatten(0)), Pairs(lambda x: (x[:, 0] > 0).long()), "sigmoid_kl"),
        "labels": (net(4), Pairs(signs(4)), "sigmoid_kl"),
        "regression": (net(1), Regression(lambda x: x.sum(-1)), "relative_mse"),
        "embeddings": (net(8), Regression(lambda x: x.repeat(1, 2)[:, :8] * 2), "relative_mse"),
        "classes, probabilities": (net(5, nn.Softmax(-1)), Pairs(lambda x: x[:, :5].argmax(-1)), "softmax_kl"),
    }


@pytest.mark.parametrize("name", tasks())
def test_losses_of_tasks_rank_as_computed_by_hand(tiny, name):
    """The KL of one column's softmax is 0, which made the smallest allocation the best one."""
    model, task, expected = tasks()[name]
    engine = tiny.engine(model, task)
    assert engine.divergence.name == expected
    x = torch.cat([inputs for inputs, _ in engine.batches("search")])
    with torch.no_grad():
        y0 = task.forward(model, x).double()
    losses = {}
    for scheme in ("w2", "w4", "w8"):
        allocation = engine.space.uniform(scheme)
        losses[scheme] = engine.score(allocation).loss
        with engine.applied(allocation) as quantized, torch.no_grad():
            y = task.forward(quantized, x).double()
        if expected == "relative_mse":
            calibration = torch.cat([inputs for inputs, _ in engine.batches("calibration")])
            with torch.no_grad():
                variance = task.forward(model, calibration).double().var(0, unbiased=False).sum()
            by_hand = ((y - y0) ** 2).sum(-1).mean() / variance
        else:
            p, q = (y0, y) if "probabilities" in name else (y0.sigmoid(), y.sigmoid())
            if expected == "softmax_kl":  # in float32 they sum to 1 to within 1e-7
                p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
            by_hand = p * (p / q).log()
            if expected == "sigmoid_kl":
                by_hand = by_hand + (1 - p) * ((1 - p) / (1 - q)).log()
            by_hand = by_hand.sum(-1).mean()
        assert losses[scheme] == pytest.approx(by_hand.item(), rel=1e-5 if scheme == "w8" else 1e-6)
    assert losses["w2"] > 10 * losses["w4"] > 100 * losses["w8"] > 0


@pytest.mark.parametrize("name", ["labels", "regression", "classes, probabilities"])
@pytest.mark.parametrize("metric", [GaussNewton(), Fisher(), HAWQ(n_probes=20)])
def test_metrics_estimate_the_divergence_of_the_task(tiny, name, metric):
    """Small losses are quadratic, so that the estimates are near what is measured: within a factor of 3, HAWQ within 10."""
    model, task, _ = tasks()[name]
    engine = tiny.engine(model, task, bias_correction=False)
    pairs = [(group, "w4") for group in engine.space.names]
    measured, estimated = list(KL().measure(engine, pairs)), list(metric.measure(engine, pairs))
    factor = 10 if isinstance(metric, HAWQ) else 3
    for a, b in zip(measured, estimated, strict=True):
        assert a / factor < b < a * factor
    assert metric.unit_for(engine.divergence) == engine.divergence.unit


def test_the_floor_is_above_rounding_and_below_the_finest_scheme(tiny):
    """Outputs of the same network in float64 and in float32 differ by rounding alone; float16 weights are the finest scheme."""
    engine = tiny.digits({"fp16": Float("float16")})
    x = torch.cat([inputs for inputs, _ in engine.batches("search")])
    model = engine.model
    with torch.no_grad():
        single, double = model(x), model.double()(x.double())
    model.float()
    rounding = SoftmaxKL().mean(single, double)
    finest = engine.score(engine.space.uniform("fp16")).loss
    assert rounding < LOSS_FLOOR / 10
    assert finest > LOSS_FLOOR, f"{finest:.2g}"


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (
            {"last_hidden_state": z3, "pooler": z3},
            r"got a dict with last_hidden_state, pooler.*model\(inputs\)\['last_hidden_state'\]",
        ),
        ((z3, z3), r"got a tuple of 2 parts.*model\(inputs\)\[0\]"),
        (None, "got a NoneType"),
    ],
)
def test_outputs_that_are_no_tensor_are_refused_with_what_to_write(output, message):
    task = Pairs(lambda x: x)
    with pytest.raises(InputError, match=message):
        task.forward(lambda inputs: output, z3)


def test_the_logits_of_an_output_are_taken():
    from collections import namedtuple
    from types import SimpleNamespace

    task, parts = Pairs(lambda x: x), namedtuple("Output", "loss logits")
    for output in ({"hidden": z2, "logits": z3}, SimpleNamespace(loss=None, logits=z3), parts(None, z3), z3):
        assert task.forward(lambda inputs, output=output: output, z3) is z3
    assert task.forward(lambda inputs: floats, z3).shape == (4, 1)
