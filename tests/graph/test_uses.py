"""A weight that is read outside of its module is what it is where a second module owns it: a tied Linear is the oracle."""

import copy

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from mpsearch.divergence import SoftmaxKL
from mpsearch.engine.calibrate import calibrate, hessians, output_fishers
from mpsearch.graph.trace import trace_layers
from mpsearch.metrics.fisher import Fisher
from mpsearch.metrics.gauss_newton import GaussNewton
from mpsearch.metrics.hawq import HAWQ
from mpsearch.metrics.kl import KL
from mpsearch.packed.model import load, pack, packed, quantized_layers, save
from mpsearch.quantizers.gptq import GPTQ
from mpsearch.quantizers.kronecker_descent import KroneckerDescent
from mpsearch.schemes.codebook import Codebook
from mpsearch.schemes.integer import Integer
from mpsearch.training.student import Student

WORDS, WIDTH = 5, 8
SCHEMES = {"w2": Integer(2), "w4g4u": Integer(4, 4, symmetric=False), "w8": Integer(8), "nf4": Codebook("nf4")}


class Tied(nn.Module):
    """Numbers `[n, 6]` -> words -> logits `[n, 5]`, the embedding's weight read by a Linear that shares it."""

    def __init__(self):
        super().__init__()
        self.embedding, self.hidden = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.own = nn.Parameter(torch.randn(WORDS))

    def body(self, x):
        return torch.tanh(self.hidden(self.embedding((x.abs() * 10).long() % WORDS))).mean(1)

    def forward(self, x):
        return self.output(self.body(x))


class ByModule(Tied):
    def __init__(self):
        super().__init__()
        self.output = nn.Linear(WIDTH, WORDS, bias=False)
        self.output.weight = self.embedding.weight


class ByLinear(Tied):
    def output(self, h):
        return F.linear(h, self.embedding.weight)


class ByTransposed(Tied):
    def output(self, h):
        return h @ self.embedding.weight.T


class ByTransposedInPlace(Tied):
    def output(self, h):
        return torch.matmul(h, self.embedding.weight.transpose(0, 1))


class ByAddmm(Tied):
    def output(self, h):
        return torch.addmm(torch.zeros(WORDS), h, self.embedding.weight.t())


class ByAlias(Tied):
    """The same parameter under a second name."""

    def __init__(self):
        super().__init__()
        self.output_weight = self.embedding.weight

    def output(self, h):
        return F.linear(h, self.output_weight)


class Reader(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weights = nn.ParameterList([weight])

    def forward(self, h):
        return F.linear(h, self.weights[0])


class ByOtherModule(Tied):
    """A module of no known kind owns it too."""

    def __init__(self):
        super().__init__()
        self.output = Reader(self.embedding.weight)


FUNCTIONAL = (ByLinear, ByTransposed, ByTransposedInPlace, ByAddmm, ByAlias, ByOtherModule)


def made(cls):
    torch.manual_seed(0)
    model = cls().eval()
    for parameter in (model.embedding.weight, *model.hidden.parameters()):  # equal, however many draws each class made
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


def engine_of(tiny, cls, **options):
    return tiny.engine(made(cls), tiny.task(shape=(6,)), SCHEMES, **options)


@pytest.mark.parametrize("cls", FUNCTIONAL)
def test_a_use_is_found_and_counted(tiny, cls):
    x = tiny.task(shape=(6,)).batches("calibration")[0][0]
    layer = trace_layers(made(cls), lambda m, x: m(x), x)[0]
    expected = trace_layers(made(ByModule), lambda m, x: m(x), x)[0]
    assert (layer.name, layer.kind, layer.macs) == ("embedding", "embedding", WORDS * WIDTH)
    assert layer.macs == expected.macs
    assert layer.modules == ("embedding",)


@pytest.mark.parametrize("cls", FUNCTIONAL)
def test_what_calibration_finds_is_of_the_use(tiny, cls):
    task, batches = tiny.task(shape=(6,)), tiny.task(shape=(6,)).batches("calibration")
    of = [("output", made(ByModule)), ("embedding.weight", made(cls))]
    layers = [trace_layers(model, task.forward, batches[0][0]) for _, model in of]
    theirs, ours = (calibrate(model, task, la, batches)[name] for (name, model), la in zip(of, layers, strict=True))
    inputs = torch.cat([of[1][1].body(x) for x, _ in batches]).detach()
    torch.testing.assert_close(ours.mean[0], inputs.mean(0))
    torch.testing.assert_close(ours.second_moment[0], inputs.square().mean(0))
    assert str(ours.histogram) == str(theirs.histogram)
    found = [hessians(model, task, [name], batches)[name] for name, model in of]
    torch.testing.assert_close(found[1][0], inputs.T @ inputs / len(inputs))
    torch.testing.assert_close(*found)
    torch.testing.assert_close(*[output_fishers(model, task, [name], batches, SoftmaxKL())[name] for name, model in of])


@pytest.mark.parametrize("quantizer", [GPTQ(), KroneckerDescent()], ids=lambda q: type(q).__name__)
@pytest.mark.parametrize("cls", [ByLinear, ByAlias])
def test_codes_are_those_of_the_tied_layer(tiny, cls, quantizer):
    ours, theirs = (engine_of(tiny, c, quantizer=quantizer) for c in (cls, ByModule))
    for scheme in SCHEMES:
        one, other = (engine.quantized("embedding", scheme).dequantize() for engine in (ours, theirs))
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("metric", [KL(), Fisher(), GaussNewton(), HAWQ(2)], ids=lambda m: m.name)
@pytest.mark.parametrize("cls", FUNCTIONAL)
def test_sensitivity_includes_both_uses(tiny, cls, metric):
    ours, theirs = (engine_of(tiny, c) for c in (cls, ByModule))
    pairs = [("embedding", scheme) for scheme in SCHEMES]
    found, expected = (list(metric.measure(engine, pairs)) for engine in (ours, theirs))
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("cls", [*FUNCTIONAL, ByModule])
def test_packed_is_simulated_and_as_small(tiny, tmp_path, cls):
    engine = engine_of(tiny, cls)
    x = engine.batches("confirm")[0][0]
    before, classes = tiny.state(engine.model), [type(m) for m in engine.model.modules()]
    for scheme in SCHEMES:
        allocation = engine.space.uniform(scheme)
        with torch.no_grad(), engine.applied(allocation) as model:
            simulated = model(x)
        with packed(engine, allocation) as model:
            torch.testing.assert_close(model(x), simulated, rtol=1e-5, atol=1e-6)
        tiny.assert_same_state(engine.model, before)
        assert [type(m) for m in engine.model.modules()] == classes
        theirs = pack(made(cls), quantized_layers(engine, allocation))
        file = save(theirs, tmp_path / f"{scheme}.safetensors")
        stored = sum(tensor.nbytes for tensor in load_file(file).values())
        assert 8 * stored == engine.space.size_bits(engine.space.choice(allocation))
        loaded = load(file, made(cls))
        for model in (theirs, loaded, copy.deepcopy(loaded)):
            torch.testing.assert_close(model(x), simulated, rtol=1e-5, atol=1e-6)


def test_a_layer_that_is_only_read_is_searched(tiny):
    """No module is called, yet the weights are layers."""

    class Read(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.other = nn.Linear(6, 7), nn.Linear(7, 5)

        def forward(self, x):
            return F.linear(F.linear(x, self.layer.weight, self.layer.bias), self.other.weight)

    torch.manual_seed(0)
    engine = tiny.engine(Read().eval(), tiny.task(shape=(6,)), SCHEMES, quantizer=GPTQ())
    assert [(layer.name, layer.macs) for layer in engine.space.layers] == [("layer", 42), ("other", 35)]
    allocation, x = engine.space.uniform("w2"), engine.batches("search")[0][0]
    with torch.no_grad(), engine.applied(allocation) as model:
        simulated = model(x)
    with packed(engine, allocation) as model:
        torch.testing.assert_close(model(x), simulated, rtol=1e-5, atol=1e-6)
    values = list(Fisher().measure(engine, [("layer", "w2"), ("layer", "w8")]))
    assert values[0] > 10 * values[1] > 0


def test_reuse_of_prefixes_knows_a_use_before_the_call(tiny):
    """The weight is read before its module runs: what was computed until there depends on its scheme."""

    class Early(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.middle, self.last = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.ReLU()), nn.Linear(6, 6)
            self.head = nn.Linear(6, 5)

        def forward(self, x):
            return self.head(self.last(self.middle(self.first(F.linear(x, self.last.weight)))))

    torch.manual_seed(0)
    model, task = Early().eval(), tiny.task(shape=(6,))
    engine, plain = (tiny.engine(model, task, SCHEMES, prefix_max_bytes=size) for size in (10**9, 0))
    for scheme in (*SCHEMES, *SCHEMES):
        for name in ("last", "head"):
            allocation = engine.space.uniform("w8")
            allocation = type(allocation)({**allocation, name: scheme})
            assert engine.score(allocation).loss == plain.score(allocation).loss


@pytest.mark.parametrize("cls", [ByLinear, ByAlias, ByOtherModule])
def test_training_reaches_every_reader(tiny, cls):
    engine = engine_of(tiny, cls)
    x, allocation, before = engine.batches("search")[0][0], engine.space.uniform("w4g4u"), tiny.state(engine.model)
    student = Student(engine, allocation)
    with torch.no_grad(), engine.applied(allocation) as model:
        simulated = model(x)
    with torch.no_grad(), student.installed():
        torch.testing.assert_close(engine.model(x), simulated, rtol=1e-5, atol=1e-6)
    tiny.assert_same_state(engine.model, before)
