"""The engine: what it measures, that it measures nothing twice, and that it leaves the model as it found it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mpsearch.allocation import Allocation
from mpsearch.engine.engine import FLOAT
from mpsearch.errors import InputError
from mpsearch.graph.unsearched import other_bits
from mpsearch.intervals import paired_interval
from mpsearch.layer import from_rows
from mpsearch.quantizers.base import Quantizer
from mpsearch.quantizers.clip_search import ClipSearch
from mpsearch.quantizers.round_to_nearest import RoundToNearest
from mpsearch.schemes.floating import Float
from mpsearch.schemes.integer import Integer


def watched(task):
    """The task, with the number of its forward passes in `task.calls`."""
    forward, task.calls = task.forward, 0

    def counting(model, inputs):
        task.calls += 1
        return forward(model, inputs)

    task.forward = counting
    return task


class Tied(nn.Module):
    """Two linear layers with one weight and biases of their own, and two with one bias and weights of their own."""

    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.other.weight = self.one.weight
        self.left, self.right = nn.Linear(8, 5), nn.Linear(8, 5)
        self.right.bias = self.left.bias

    def forward(self, x):
        x = F.relu(self.other(F.relu(self.one(x))))
        return self.left(x) - self.right(x.flip(1))


@pytest.mark.parametrize("make", ["net", "tied"])
def test_the_model_is_left_bitwise_as_it_was(tiny, make):
    net, task = (tiny.net(), tiny.task()) if make == "net" else (Tied().eval(), tiny.task(shape=(8,)))
    before = tiny.state(net)
    engine = tiny.engine(net, task)
    for scheme in engine.space.schemes:
        engine.score(engine.space.uniform(scheme))
    tiny.assert_same_state(net, before)

    def fail_inside():
        with engine.applied(engine.space.uniform("w2")) as model:
            assert not torch.equal(next(model.parameters()), before[next(iter(before))][0])
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail_inside()
    tiny.assert_same_state(net, before)


def test_the_model_is_left_as_it_was_where_a_layer_cannot_be_quantized(tiny):
    net = tiny.net()
    with torch.no_grad():
        net.last.weight[0, 0] = 1e6
    engine = tiny.engine(net, tiny.task(), {"w8": Integer(8), "fp16": Float("float16")})
    before = tiny.state(net)
    with pytest.raises(InputError, match=r"Layer 'last' in scheme 'fp16': A weight of 1e\+06 does not fit in float16"):
        engine.score(engine.space.uniform("fp16"))
    tiny.assert_same_state(net, before)


def test_what_is_swapped_in_is_what_is_stored(tiny):
    engine = tiny.engine(tiny.net(), tiny.task())
    allocation = Allocation({"first": "w2", "second": "w4", "last": "w8"})
    before = tiny.state(engine.model)
    with engine.applied(allocation) as model:
        assert model is engine.model
        for layer, scheme in allocation.items():
            module = model.get_submodule(layer)
            assert torch.equal(module.weight, from_rows(module, engine.quantized(layer, scheme).dequantize()))
        assert torch.equal(model.first.bias, engine.biases("first", "w2")["first"])
        assert not torch.equal(model.first.bias, before["first.bias"][0])
    with engine.applied(Allocation({"second": "w2"})) as model:
        assert torch.equal(model.first.weight, before["first.weight"][0]), "a group that is left out stays float"
        assert not torch.equal(model.second.weight, before["second.weight"][0])


def test_without_bias_correction_biases_stay(tiny):
    engine = tiny.engine(tiny.net(), tiny.task(), bias_correction=False)
    bias = engine.model.first.bias.clone()
    with engine.applied(engine.space.uniform("w2")) as model:
        assert torch.equal(model.first.bias, bias)


def test_every_owner_of_a_tied_weight_gets_its_own_bias(tiny):
    engine = tiny.engine(Tied().eval(), tiny.task(shape=(8,)))
    assert engine.space.names == ("one", "left", "right")
    biases = engine.biases("one", "w2")
    assert set(biases) == {"one", "other"}
    change = engine.quantized("one", "w2").dequantize() - engine.model.one.weight.detach()
    for name, bias in biases.items():  # each by the mean of its own input
        shift = change @ engine.moments[name].mean[0]
        assert torch.allclose(engine.model.get_submodule(name).bias.detach() - shift, bias, atol=1e-6)
    assert not torch.allclose(engine.moments["one"].mean, engine.moments["other"].mean)
    with engine.applied(Allocation({"one": "w2"})) as model:
        assert model.one.weight is model.other.weight
        assert torch.equal(model.other.bias, biases["other"])


def test_a_second_score_costs_no_forward_pass(tiny):
    task = watched(tiny.task())
    engine = tiny.engine(tiny.net(), task, prefix_max_bytes=0)
    allocation = Allocation({"first": "w2", "second": "w4", "last": "w8"})
    engine.batches("search")  # puts them in order
    task.calls = 0
    score = engine.score(allocation)
    assert task.calls == 4, "two batches of the float model, two of this one"
    again = engine.score(Allocation(reversed(list(allocation.items()))))
    assert again is score
    engine.score(FLOAT)
    assert task.calls == 4
    engine.score(Allocation({**allocation, "last": "w4"}))
    assert task.calls == 6
    engine.score(allocation, "confirm")
    assert task.calls == 10, "two of the float model there, two of this one"


def test_each_layer_is_quantized_once(tiny):
    calls = []

    class Counting(Quantizer):
        def codes(self, matrix, scheme, group_size, importance):
            calls.append((tuple(matrix.shape), scheme.bits))
            return RoundToNearest().codes(matrix, scheme, group_size, importance)

    engine = tiny.engine(tiny.net(), tiny.task(), quantizer=Counting(), bank_max_bytes=0)
    for _ in range(2):
        for scheme in ("w2", "w4", "w8"):
            engine.score(engine.space.uniform(scheme))
        engine.score(Allocation({"first": "w2", "second": "w4", "last": "w8"}))
    assert len(calls) == len(set(calls)) == 9


def test_a_small_bank_forgets_dense_copies_and_gives_the_same_scores(tiny):
    engines = {size: tiny.engine(tiny.net(), tiny.task(), bank_max_bytes=size) for size in (10**9, 400, 0)}
    rng = np.random.default_rng(0)
    for _ in range(12):
        choice = rng.integers(0, 3, 3)
        scores = [engine.score(engine.space.allocation(choice)) for engine in engines.values()]
        assert scores[0] == scores[1] == scores[2]
        for size, engine in engines.items():
            assert engine.bank.dense_bytes <= size
    assert 0 < engines[400].bank.dense_bytes < engines[10**9].bank.dense_bytes


def test_the_float_model_loses_nothing(trained):
    score = trained.score(FLOAT)
    assert score.loss == score.noise == 0.0
    assert score.quality == score.quality_low == score.quality_high
    assert score.n_samples == 400
    assert score.quality > 0.98


def test_scores_by_hand(tiny):
    task = tiny.task()
    engine = tiny.engine(tiny.net(), task)
    allocation = engine.space.uniform("w2")
    x, y = (torch.cat(parts) for parts in zip(*task.batches("search"), strict=True))
    with torch.no_grad():
        reference = engine.model(x).double()
        with engine.applied(allocation) as model:
            logits = model(x).double()
    score = engine.score(allocation)
    assert score.n_samples == len(y)
    assert score.qualities.size == 0, "only the confirm split is compared sample by sample"
    p, q = reference.softmax(1), logits.softmax(1)
    assert score.loss == pytest.approx((p * (p / q).log()).sum(1).mean().item(), rel=1e-5)
    assert score.cross_entropy == pytest.approx(-q[range(len(y)), y].log().mean().item(), rel=1e-5)
    assert score.noise == pytest.approx(((logits - reference) ** 2).sum().item() / (reference**2).sum().item(), rel=1e-5)
    assert score.quality == pytest.approx((logits.argmax(1) == y).double().mean().item())
    assert score.loss > 1e-3
    assert score.quality_low <= score.quality <= score.quality_high


def test_a_quantized_model_that_breaks_down_scores_infinity(tiny):
    engine = tiny.engine(tiny.net(), tiny.task())
    engine.score(FLOAT)
    engine.quantized("last", "w2").tensors["scales"].fill_(torch.nan)
    score = engine.score(engine.space.uniform("w2"))
    assert score.loss == score.noise == np.inf
    assert 0 <= score.quality <= 1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_named_at_the_door(tiny, bad):
    net = tiny.net()
    with torch.no_grad():
        net.second.weight[1, 0, 0, 0] = bad
    with pytest.raises(InputError, match="Layer 'second' has 1 weights of 108 that are NaN or infinite"):
        tiny.engine(net, tiny.task())


def test_a_float_model_that_gives_nan_is_refused(tiny):
    net = tiny.net()
    engine = tiny.engine(net, tiny.task())
    with torch.no_grad():
        net.norm.running_var.fill_(-1)
    with pytest.raises(InputError, match="The float model gives NaN or infinite outputs on the search split"):
        engine.score(engine.space.uniform("w8"))


def test_an_empty_split_is_refused(tiny):
    task = tiny.task()
    engine = tiny.engine(tiny.net(), task)
    task.batches = lambda split: []
    with pytest.raises(InputError, match="no batch for its confirm split"):
        engine.score(FLOAT, "confirm")


def test_other_bits_are_all_that_is_not_searched(tiny):
    net = tiny.net()
    engine = tiny.engine(net, tiny.task())
    biases, norm = 4 + 5, 4 * 6
    assert engine.space.other_bits == 32 * (biases + norm) + 64, "64 bits count the batch norm's steps"
    tied = Tied()
    layers = tiny.engine(tied.eval(), tiny.task(shape=(8,))).space.layers
    assert other_bits(tied, layers) == 32 * (8 + 8 + 5), "a shared bias counts once"
    assert other_bits(tied, layers[:1]) == 32 * (8 + 8 + 5 + 2 * 40)


def test_quality_interval_is_laid_round_the_float_model(trained):
    baseline = trained.score_of(None, "confirm")
    with trained.applied(trained.space.uniform("w2")) as model:
        score = trained.score_of(model, "confirm")
    low, high = paired_interval(score.qualities, baseline.qualities)
    assert score.quality_low == pytest.approx(baseline.quality + low)
    assert score.quality_high == pytest.approx(baseline.quality + high)
    assert score.quality_low < score.quality < score.quality_high


def test_a_quantizer_for_one_scheme(tiny):
    net, task = tiny.net(), tiny.task()
    engine = tiny.engine(net, task)
    mixed = tiny.engine(net, task)
    mixed.bank.quantizers = {"w2": RoundToNearest(), "w4": ClipSearch(20), "w8": ClipSearch(20)}
    assert not torch.equal(mixed.quantized("first", "w2").dequantize(), engine.quantized("first", "w2").dequantize())
    assert torch.equal(mixed.quantized("first", "w4").dequantize(), engine.quantized("first", "w4").dequantize())


def test_the_float_reference_is_never_taken_of_what_is_swapped_in(tiny):
    engine = tiny.engine(tiny.net(), tiny.task())
    with (
        engine.applied(engine.space.uniform("w2")),
        pytest.raises(RuntimeError, match=r"float_logits\('confirm'\) was first called"),
    ):
        engine.float_logits("confirm")
    expected = engine.float_logits("confirm")
    with engine.applied(engine.space.uniform("w2")):
        assert engine.float_logits("confirm") is expected
