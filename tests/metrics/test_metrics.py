"""The contract of `metrics/base.py`, which every metric fulfils, and each metric against its formula."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from mpsearch.allocation import Allocation
from mpsearch.engine.engine import FLOAT
from mpsearch.errors import InputError
from mpsearch.metrics.base import SensitivityMetric, quantize_groups
from mpsearch.metrics.fisher import Fisher, changed
from mpsearch.metrics.gauss_newton import GaussNewton, _carried_over
from mpsearch.metrics.hawq import HAWQ
from mpsearch.metrics.kl import KL
from mpsearch.metrics.sqnr import SQNR
from mpsearch.metrics.task_loss import TaskLoss
from mpsearch.metrics.weight_mse import WeightMSE
from mpsearch.quantizers.gptq import GPTQ
from mpsearch.quantizers.kronecker_descent import KroneckerDescent
from mpsearch.quantizers.round_to_nearest import RoundToNearest
from mpsearch.runs.deadline import Deadline
from mpsearch.schemes.integer import Integer

CONF = Path(__file__).parents[2] / "conf" / "metric"


@pytest.fixture(params=sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def metric(request):
    found = instantiate(OmegaConf.load(request.param), _convert_="object")
    assert isinstance(found, SensitivityMetric)
    assert found.name == request.param.stem
    assert found.unit
    return found


def all_pairs(engine):
    return list(itertools.product(engine.space.names, engine.space.schemes))


def test_more_bits_hurt_less(metric, trained):
    """On the trained network: each of two bits added makes the sum over the layers smaller, and nearly each layer's own value."""
    pairs = all_pairs(trained)
    values = np.array(list(metric.measure(trained, pairs))).reshape(len(trained.space.names), -1)
    assert np.isfinite(values).all()
    total = values.sum(0)
    assert (np.diff(total) < 0).all(), total
    assert total[-1] < 0.05 * total[0]
    assert (values[:, 0] > values[:, -1]).mean() > 0.85
    if metric.name != "task_loss":  # which may fall by chance
        assert (values >= 0).all()
        assert (values[:, 0] > 0).all()


def test_one_value_for_each_pair_in_their_order(metric, tiny):
    engine = tiny.engine(tiny.net(), tiny.task())
    pairs = all_pairs(engine)
    expected = dict(zip(pairs, metric.measure(engine, pairs), strict=True))
    assert len(set(expected.values())) == len(pairs)
    some = [pairs[7], pairs[0], pairs[4]]
    other = tiny.engine(tiny.net(), tiny.task())
    assert list(metric.measure(other, some)) == [expected[pair] for pair in some]
    assert all(type(value) is float for value in expected.values())


def test_the_model_is_left_bitwise_as_it_was(metric, tiny):
    net = tiny.net()
    engine = tiny.engine(net, tiny.task())
    before = tiny.state(net)
    random = torch.get_rng_state()
    list(metric.measure(engine, all_pairs(engine)))
    tiny.assert_same_state(net, before)
    assert torch.equal(torch.get_rng_state(), random)
    assert not any(module._forward_hooks for module in net.modules())


def test_the_confirm_split_is_never_touched(metric, tiny):
    task = tiny.task()
    engine = tiny.engine(tiny.net(), task)
    batches, asked = task.batches, set()
    task.batches = lambda split: asked.add(split) or batches(split)
    list(metric.measure(engine, all_pairs(engine)))
    assert "confirm" not in asked


@pytest.fixture
def all_carries_over(monkeypatch):
    """Effects as they are on the search data."""
    monkeypatch.setattr("mpsearch.metrics.gauss_newton._carried_over", lambda splits, groups: 1.0)


@pytest.fixture
def quadratic(monkeypatch):
    """The quadratic form also where the divergence could be had."""
    monkeypatch.setattr("mpsearch.metrics.gauss_newton.MOST_COLUMNS", 0)


def test_a_group_of_layers_counts_all_of_them(metric, tiny, all_carries_over, quadratic):
    """Weight error and Fisher add up; what is measured is measured with all of them quantized."""
    net, task = tiny.net(), tiny.task()
    engine = tiny.engine(net, task)
    together = tiny.engine(net, task)
    first, second, last = together.space.groups
    both = type(first)("both", first.layers + second.layers)
    object.__setattr__(together.space, "groups", (both, last))
    together._members = {"both": both.layers, "last": last.layers}
    (value,) = metric.measure(together, [("both", "w2")])
    if isinstance(metric, Fisher | HAWQ | WeightMSE):
        assert value == pytest.approx(sum(metric.measure(engine, [("first", "w2"), ("second", "w2")])))
    elif isinstance(metric, GaussNewton):
        _, effects = metric.measure_joint(engine, [("first", "w2"), ("second", "w2")])
        assert value == pytest.approx(0.5 * np.square(effects.sum(1)).sum(), rel=1e-4)
    else:
        score = engine.score(Allocation({"first": "w2", "second": "w2"}))
        assert value == metric.value(score, engine.score(FLOAT))


def test_measured_metrics_are_parts_of_the_score(tiny):
    engine = tiny.engine(tiny.net(), tiny.task())
    baseline, score = engine.score(FLOAT), engine.score(Allocation({"second": "w2"}))
    pair = [("second", "w2")]
    assert list(KL().measure(engine, pair)) == [score.loss]
    assert list(SQNR().measure(engine, pair)) == [score.noise]
    assert list(TaskLoss().measure(engine, pair)) == [score.cross_entropy - baseline.cross_entropy]


def test_weight_error_is_exact(tiny):
    engine = tiny.engine(tiny.net(), tiny.task())
    for (group, scheme), value in zip(all_pairs(engine), WeightMSE().measure(engine, all_pairs(engine)), strict=True):
        with engine.applied(Allocation({group: scheme})) as model:
            quantized = model.get_submodule(group).weight.detach().double()
        change = quantized - engine.model.get_submodule(group).weight.detach().double()
        assert value == pytest.approx(change.square().sum().item(), rel=1e-6)


class Straight(nn.Module):
    """Two layers with a nonlinearity between, in place or not; the second is called twice."""

    def __init__(self, inplace):
        super().__init__()
        torch.manual_seed(4)
        self.one, self.relu = nn.Conv2d(2, 3, 3), nn.ReLU(inplace=inplace)
        self.two, self.head = nn.Linear(3, 3, bias=False), nn.Linear(3, 5)

    def forward(self, x):
        y = self.relu(self.one(x)).mean((2, 3))
        return 4 * self.head(self.two(self.two(y)))


def by_hand(engine):
    """Half the squared product of dL/dy and dy: one sample, one layer, one call at a time, labels drawn as the metric does."""
    model, generator = engine.model, torch.Generator().manual_seed(0)
    sums = dict.fromkeys(all_pairs(engine), 0.0)
    n_samples = 0
    for x, _ in engine.batches("calibration"):
        labels = torch.multinomial(model(x).softmax(1).detach(), 1, generator=generator)[:, 0]
        for sample, label in zip(x, labels, strict=True):
            n_samples += 1
            for name in engine.space.names:
                layer, calls = model.get_submodule(name), []

                def hook(_, args, output, calls=calls):
                    calls.append((args[0].detach().clone(), output + torch.zeros_like(output, requires_grad=True)))
                    return calls[-1][1].clone()

                handle = layer.register_forward_hook(hook)
                loss = -model(sample[None]).log_softmax(1)[0, label]
                handle.remove()
                gradients = torch.autograd.grad(loss, [output for _, output in calls])
                for scheme in engine.space.schemes:
                    for (seen, _), gradient in zip(calls, gradients, strict=True):
                        with torch.no_grad():
                            before = layer(seen)
                            with engine.applied(Allocation({name: scheme})):
                                change = layer(seen) - before
                        sums[name, scheme] += 0.5 * (gradient * change).double().square().sum().item()
    return [value / n_samples for value in sums.values()]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("bias_correction", [False, True])
def test_fisher_is_the_formula(tiny, inplace, bias_correction):
    engine = tiny.engine(
        Straight(inplace).eval(),
        tiny.task(n=10, batch_size=4),
        {"w2": Integer(2), "w4": Integer(4)},
        quantizer=RoundToNearest(),
        bias_correction=bias_correction,
    )
    found = list(Fisher().measure(engine, all_pairs(engine)))
    assert found == pytest.approx(by_hand(engine), rel=1e-3, abs=1e-9)
    assert min(found) > 0


def test_fisher_needs_no_parameter_with_gradients(tiny):
    net = tiny.net()
    engine = tiny.engine(net, tiny.task())
    expected = list(Fisher().measure(engine, all_pairs(engine)))
    net.requires_grad_(False)
    assert list(Fisher().measure(engine, all_pairs(engine))) == pytest.approx(expected, rel=1e-5)
    assert not any(parameter.requires_grad for parameter in net.parameters())


def test_fisher_predicts_measured_divergence(trained):
    """Where the change is small, half the Fisher quadratic form is the KL divergence: the same order of magnitude at 4 bits."""
    pairs = [(group, "w4") for group in trained.space.names]
    fisher, kl = (np.array(list(metric.measure(trained, pairs))) for metric in (Fisher(), KL()))
    assert 0.05 < np.median(fisher / kl) < 20


def test_hawq_finds_the_trace_of_the_hessian(tiny):
    """Of the last layer it is known: the mean over the samples of sum_c p_c (1 - p_c) |x|^2, whatever the labels are."""
    engine = tiny.engine(tiny.net(), tiny.task())
    seen = []
    hook = engine.model.last.register_forward_hook(lambda module, args, output: seen.append((args[0].detach(), output.detach())))
    traces = HAWQ(n_probes=100)._traces(engine)
    hook.remove()
    x, p = torch.cat([x for x, _ in seen]), torch.cat([logits for _, logits in seen]).softmax(-1)
    expected = ((p * (1 - p)).sum(1) * x.square().sum(1)).mean().item()
    assert traces["last"] == pytest.approx(expected, rel=0.1)
    error = (engine.quantized("last", "w2").dequantize() - engine.model.last.weight.detach()).double().square().sum().item()
    (value,) = HAWQ().measure(engine, [("last", "w2")])
    assert value == pytest.approx(0.5 * expected / 30 * error, rel=0.5)


def first_order(engine, allocation):
    """dz^T (diag(p) - p p^T) dz / 2 and KL(z + dz), means over the search split, dz the first-order change of the logits."""
    model, total, divergence, n = engine.model, 0.0, 0.0, 0
    names = list(allocation)
    for x, _ in engine.batches("search"):
        changes = []
        handles = []
        for name in names:
            layer = model.get_submodule(name)

            def hook(module, args, output, name=name, changes=changes):
                changes.append((args[0].detach().clone(), output.detach().clone(), name))

            handles.append(layer.register_forward_hook(hook))
        z = model(x).detach()
        for handle in handles:
            handle.remove()
        deltas = {}
        for seen, before, name in changes:
            with engine.applied(Allocation({name: allocation[name]})):
                deltas[name] = model.get_submodule(name)(seen).detach() - before

        def moved(step, deltas=deltas, x=x):
            handles = [
                model.get_submodule(name).register_forward_hook(lambda m, a, out, d=delta: out + step * d)
                for name, delta in deltas.items()
            ]
            found = model(x)
            for handle in handles:
                handle.remove()
            return found

        _, dz = torch.autograd.functional.jvp(moved, torch.zeros(()), torch.ones(()))
        p = z.softmax(-1)
        total += 0.5 * ((p * dz**2).sum() - ((p * dz).sum(-1) ** 2).sum()).item()
        divergence += engine.divergence.rows(z + dz.detach(), z).sum().item()
        n += len(x)
    return total / n, divergence / n


def test_gauss_newton_is_the_second_order_loss_of_groups_alone_and_together(tiny, monkeypatch, all_carries_over, quadratic):
    monkeypatch.setattr("mpsearch.metrics.gauss_newton.MOST_FOR_A_SAMPLE", 64)
    monkeypatch.setattr("mpsearch.metrics.gauss_newton.FEWEST_FEATURES", 10**6)
    engine = tiny.engine(tiny.net(), tiny.task(n=20, batch_size=8))
    pairs = all_pairs(engine)
    values, effects = GaussNewton().measure_joint(engine, pairs)
    assert list(GaussNewton().measure(engine, pairs)) == pytest.approx(values.tolist())
    assert 0.5 * np.square(effects).sum(0) == pytest.approx(values, rel=1e-4)
    for group, scheme in pairs:
        assert values[pairs.index((group, scheme))] == pytest.approx(first_order(engine, {group: scheme})[0], rel=1e-3)
    sums = []
    for schemes in itertools.product(("w2", "w4"), repeat=3):
        allocation = dict(zip(engine.space.names, schemes, strict=True))
        together = 0.5 * np.square(effects[:, [pairs.index(pair) for pair in allocation.items()]].sum(1)).sum()
        sums.append([sum(values[pairs.index(pair)] for pair in allocation.items()), together, first_order(engine, allocation)[0]])
        assert together == pytest.approx(sums[-1][2], rel=1e-3)
    alone, _, true = np.array(sums).T
    assert np.abs(np.log(alone / true)).max() > 0.1  # so that the test above says something


def test_of_few_logits_gauss_newton_is_the_divergence_of_the_first_order_change(tiny, monkeypatch, all_carries_over):
    """Its features are those of the quadratic form, of each group in the size of its own sensitivity."""
    engine = tiny.engine(tiny.net(), tiny.task(n=20, batch_size=8))
    pairs = all_pairs(engine)
    values, effects = GaussNewton().measure_joint(engine, pairs)
    assert list(GaussNewton().measure(engine, pairs)) == pytest.approx(values.tolist())
    first_orders = np.array([first_order(engine, dict([pair])) for pair in pairs])
    assert values == pytest.approx(first_orders[:, 1], rel=1e-3)
    assert np.abs(np.log(first_orders[:, 0] / first_orders[:, 1])).max() > 0.05  # so that the line above says something
    assert 0.5 * np.square(effects).sum(0) == pytest.approx(values, rel=1e-4)
    monkeypatch.setattr("mpsearch.metrics.gauss_newton.MOST_COLUMNS", 0)
    monkeypatch.setattr("mpsearch.metrics.gauss_newton.FEWEST_FEATURES", 10**6)
    _, quadratic_effects = GaussNewton().measure_joint(engine, pairs)
    correlations = [e.T @ e / np.outer(*[np.linalg.norm(e, axis=0)] * 2) for e in (effects, quadratic_effects)]
    assert correlations[0] == pytest.approx(correlations[1], abs=1e-3)


def test_gauss_newton_keeps_what_few_dimensions_leave_out(trained, monkeypatch, all_carries_over):
    pairs = all_pairs(trained)
    values, whole = GaussNewton().measure_joint(trained, pairs)
    monkeypatch.setattr("mpsearch.metrics.gauss_newton.MOST_DIMENSIONS", 8)
    same, few = GaussNewton().measure_joint(trained, pairs)
    assert same.tolist() == values.tolist()
    assert few.shape == (8, len(pairs))
    assert (0.5 * np.square(few).sum(0) <= values * (1 + 1e-5)).all()
    assert np.abs(few.T @ few - whole.T @ whole).max() < 0.1 * np.abs(whole.T @ whole).max()
    monkeypatch.setattr("mpsearch.metrics.gauss_newton.MOST_PAIRS", 5)
    assert GaussNewton().measure_joint(trained, pairs) is None
    assert list(GaussNewton().measure(trained, pairs)) == pytest.approx(values.tolist())


@pytest.mark.parametrize("made", [Fisher, GaussNewton])
def test_a_model_without_gradients_is_refused_with_what_to_do(made, tiny):
    net = tiny.net()
    net.forward = torch.no_grad()(net.forward)
    engine = tiny.engine(net, tiny.task())
    with pytest.raises(InputError, match=r"has no gradients, .*does not require grad.* Use metric=kl"):
        list(made().measure(engine, all_pairs(engine)))


def test_a_scheme_that_breaks_the_model_has_an_infinite_value_and_no_effects(trained, monkeypatch, all_carries_over):
    pairs = all_pairs(trained)
    monkeypatch.setattr(
        "mpsearch.metrics.gauss_newton.changed",
        lambda engine, module, layer, scheme, call, before: (
            changed(engine, module, layer, scheme, call, before) * (np.nan if scheme == "w2" else 1)
        ),
    )
    values, effects = GaussNewton().measure_joint(trained, pairs)
    broken = np.array([scheme == "w2" for _, scheme in pairs])
    assert np.array_equal(np.isinf(values), broken)
    assert np.abs(effects[:, broken]).max() < 1e-6 * np.abs(effects).max()
    assert 0.5 * np.square(effects).sum(0)[~broken] == pytest.approx(values[~broken], rel=1e-4)
    assert list(GaussNewton().measure(trained, pairs)) == pytest.approx(values.tolist())


def test_effects_count_as_far_as_they_carry_over_from_half_to_half(trained):
    """Groups that always err together, groups that do by chance alone, and something between."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(6), 3)
    common, own = rng.normal(size=(2, 4000, 1)), rng.normal(size=(2, 4000, 18))

    def carried(features):
        return _carried_over([np.einsum("hri,hrj->hij", features, features)], groups)

    def of(share, n=4000):
        return carried((share * common + own)[:, :n])

    assert of(1.0) > 0.99
    assert of(0.0) < 0.2
    assert of(0.3, 40) < of(0.3, 400) < of(0.3)
    assert carried(own[[0, 0]]) == pytest.approx(1)
    pairs = all_pairs(trained)
    values, effects = GaussNewton().measure_joint(trained, pairs)
    kept = np.square(effects).sum(0) / (2 * values)
    assert kept == pytest.approx(kept[0], rel=1e-3)
    assert 0.05 < kept[0] < 0.95


@pytest.mark.parametrize(("quantizer", "seconds"), [(KroneckerDescent(), 1e-9), (KroneckerDescent(), None), (GPTQ(), 1e-9)])
def test_a_faster_quantizer_is_proposed_where_quantizing_takes_long(tiny, capsys, quantizer, seconds):
    engine = tiny.engine(tiny.net(), tiny.task(), {"w2": Integer(2), "w4": Integer(4)}, quantizer=quantizer)
    quantize_groups(engine, all_pairs(engine), Deadline(seconds))
    is_said = "quantizer=gptq takes a third of that or less" in capsys.readouterr().err
    assert is_said == (quantizer.needs_fisher and seconds is not None)
