"""Prefix reuse: a score is bit for bit the naive one whatever the network does, and outputs are kept within their bound."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mpsearch.allocation import Allocation
from mpsearch.engine.engine import FLOAT
from mpsearch.engine.prefix_cache import N_REMEMBERED, _Prefixes
from mpsearch.graph.calls import find_runs
from mpsearch.models.resnet import Block, _stage
from mpsearch.schemes.integer import Integer

IMAGES, VECTORS = (2, 6, 6), (8,)
INPUTS = {"w2": Integer(2), "w8": Integer(8), "w4a8": Integer(4, input={"bits": 8, "scale": "token"})}


class SmallResNet(nn.Module):
    """Residual blocks in two stages, as in models/resnet.py."""

    def __init__(self):
        super().__init__()
        self.stem, self.layer1, self.layer2 = nn.Conv2d(2, 4, 3, padding=1), _stage(2, 4, 4, 1), _stage(2, 4, 8, 2)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.layer2(self.layer1(F.relu(self.stem(x)))).mean((2, 3)))


class Attention(nn.Module):
    """A transformer's block that takes a mask beside its input, by position and by name."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x, mask, scale=1.0):
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, mask)) * scale
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Images as rows of tokens; blocks called in a loop."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(12, 8), nn.Linear(8, 5)
        self.blocks = nn.ModuleList(Attention() for _ in range(3))

    def forward(self, x):
        x = self.embed(x.transpose(1, 2).flatten(2))
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        for block in self.blocks:
            x = block(x, mask, scale=0.5)
        return self.head(x.mean(1))


class UNet(nn.Module):
    """What looks like a chain of six, but the second's output is read again before the last."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(6))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        for i, part in enumerate(self.parts):
            x = part(x)
            if i == 1:
                skip = x
        return self.head(x + skip)


class Keeps(nn.Module):
    """The first part leaves something behind in itself, which the head reads."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third, self.head = (nn.Linear(8, 8) for _ in range(4))
        self.seen = []
        self.first.register_forward_hook(lambda module, args, output: self.seen.append(output))

    def forward(self, x):
        self.seen.clear() if len(self.seen) > 3 else None
        x = self.third(self.second(self.first(x)))
        return self.head(x * self.seen[-1])[:, :5]


class TiedBlocks(nn.Module):
    """A weight in the first and the last of four blocks, and a bias in the second and the third."""

    def __init__(self):
        super().__init__()
        self.parts = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)), nn.Linear(8, 5))
        self.parts[3][0].weight = self.parts[0][0].weight
        self.parts[2][0].bias = self.parts[1][0].bias

    def forward(self, x):
        return self.parts(x)


class Twice(nn.Module):
    """One of the modules in a row runs twice, another as often as its input says."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.d(self.b(self.c(self.b(self.a(x)))))
        return self.head(self.d(x) if x.mean() > 0.02 else x)


class InPlace(nn.Module):
    """Activations that write over what the module before them returned, and a shortcut that does."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.relu1, self.relu2 = nn.ReLU(inplace=True), nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.relu1(self.a(x))
        x = self.b(x).add_(x)
        return self.head(self.c(self.relu2(x)))


class Named(nn.Module):
    """Returns a dict from within, and takes its input by name; the last layer's weight is read before the layer is called."""

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
        self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = x * self.head.weight.mean()
        x = self.body["b"](input=self.body["a"](x))
        return self.head(self.inner(x))


class Overwrites(nn.Module):
    """Adds to a layer's input in place after the layer read it."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.a(x)
        x += self.b(x)
        x += self.c(x)
        return self.head(x)


class Branches(nn.Module):
    """Takes a path by a value that its layers made, which most allocations and samples leave on the same side."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.a(x)
        if x.mean() > -0.05:
            return self.head(self.c(self.b(x)))
        return self.head(self.c(x + self.b(x)))


class BatchBranches(Branches):
    """Takes a path by its input."""

    def forward(self, x):
        larger = x.mean() > 0.55
        x = self.a(x)
        return self.head(self.c(x + self.b(x) if larger else self.b(x)))


def mlp():
    return nn.Sequential(*(m for i in range(4) for m in (nn.Linear(8, 8), nn.ReLU())), nn.Linear(8, 5))


# model, shape of a sample, whether something is reused when only the last layer changes
NETS = {
    "resnet": (SmallResNet, IMAGES, True),
    "mlp": (mlp, VECTORS, True),
    "transformer": (Transformer, IMAGES, True),
    "unet": (UNet, VECTORS, True),
    "keeps": (Keeps, VECTORS, False),
    "tied": (TiedBlocks, VECTORS, True),
    "twice": (Twice, VECTORS, True),
    "in place": (InPlace, VECTORS, True),
    "named": (Named, VECTORS, False),
    "overwrites": (Overwrites, VECTORS, False),
    "branches": (Branches, VECTORS, True),
    "batch branches": (BatchBranches, VECTORS, False),
}


def build(tiny, name, schemes=None, **options):
    make, shape, _ = NETS[name]
    torch.manual_seed(0)
    return tiny.engine(make().eval(), tiny.task(shape=shape), schemes, **options)


def sequence(space, rng, n=40):
    """Allocations as a search asks for them: one at a time, then changes of what was asked for before."""
    for group, choices in zip(space.names, space.choices, strict=True):
        for scheme in choices[:2]:
            yield Allocation({group: scheme})
    asked = [rng.integers(0, len(space.schemes), len(space.groups))]
    for _ in range(n):
        choice = asked[rng.integers(len(asked))].copy()
        choice[rng.integers(len(choice))] = rng.integers(0, len(space.schemes))
        asked.append(choice)
        yield space.allocation(choice)


def logits(engine, allocation, split="search"):
    with engine.applied(allocation):
        return torch.cat(list(engine.outputs(allocation, split)))


def watch(module):
    """How often the module computes something."""
    calls, forward = [], module.forward
    module.forward = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    return calls


@pytest.mark.parametrize("max_bytes", [10**9, 2000])
@pytest.mark.parametrize("schemes", [None, INPUTS], ids=["weights", "inputs too"])
@pytest.mark.parametrize("name", NETS)
@pytest.mark.thin(4)
def test_logits_are_those_of_a_whole_pass_bit_for_bit(tiny, name, schemes, max_bytes):
    engine, naive = build(tiny, name, schemes, prefix_max_bytes=max_bytes), build(tiny, name, schemes, prefix_max_bytes=0)
    before = tiny.state(engine.model)
    for i, allocation in enumerate([FLOAT, *sequence(engine.space, np.random.default_rng(0))]):
        split = "confirm" if i % 7 == 3 else "search"
        assert torch.equal(logits(engine, allocation, split), logits(naive, allocation, split)), allocation
    tiny.assert_same_state(engine.model, before)
    assert not any("_call_impl" in vars(module) for module in engine.model.modules())
    assert naive.prefix_cache is None


@pytest.mark.parametrize("name", NETS)
def test_a_change_of_the_last_layer_runs_little(tiny, name):
    engine = build(tiny, name)
    first = engine.model.get_submodule(engine.space.layers[1 if name == "tied" else 0].name)
    calls = watch(first)
    last = engine.space.names[-1]
    engine.score(FLOAT)
    engine.score(Allocation({last: "w2"}))
    calls.clear()
    engine.score(Allocation({last: "w4"}))
    assert (not calls) == NETS[name][2]


def test_each_block_of_a_resnet_is_a_place_to_start(tiny):
    engine = build(tiny, "resnet")
    calls = {name: watch(module) for name, module in engine.model.named_modules() if isinstance(module, Block | nn.Conv2d)}
    engine.score(FLOAT)
    engine.score(Allocation({"layer2.0.conv2": "w2"}))
    for seen in calls.values():
        seen.clear()
    engine.score(Allocation({"layer2.0.conv2": "w4"}))
    ran = [name for name, seen in calls.items() if seen]
    assert ran == ["layer2.0", "layer2.0.conv2", "layer2.1", "layer2.1.conv1", "layer2.1.conv2"]
    assert set(engine.space.names) > set(ran[1:2])


def test_the_runs_of_a_transformer(tiny):
    engine = build(tiny, "transformer")
    x = engine.batches("search")[0][0]
    runs, order = find_runs(engine.model, engine.task.forward, x, engine.space.groups)
    (model,) = runs[0]
    names = {module: name for name, module in engine.model.named_modules()}
    assert [[names[call.module] for call in run] for run in model.runs] == [
        ["embed", "blocks.0", "blocks.1", "blocks.2"],
        ["head"],
    ]
    assert order == engine.space.names
    assert [(call.before, call.after) for call in model.runs[0]] == [(0, 1), (1, 5), (5, 9), (9, 13)]


def test_a_unet_is_cut(tiny):
    """What is read again later has to be there; on both sides of it nothing else has."""
    engine = build(tiny, "unet")
    engine.score(FLOAT)
    engine.score(Allocation({"head": "w2"}))
    names = {module: name for name, module in engine.model.named_modules()}
    assert [[names[call.module] for call in run] for run, _ in engine.prefix_cache._plan] == [
        ["parts.0", "parts.1"],
        ["parts.2", "parts.3", "parts.4", "parts.5"],
    ]
    assert {key[1]: sum(k[1] == key[1] for k in engine.prefix_cache._kept) for key in engine.prefix_cache._kept} == {0: 2, 1: 2}


def test_groups_are_ordered_by_who_reads_them_first(tiny):
    """A shared bias is read where the first of its owners runs, a weight where a parent may read it."""
    tied = build(tiny, "tied")
    x = tied.batches("search")[0][0]
    _, order = find_runs(tied.model, tied.task.forward, x, tied.space.groups)
    assert order == ("parts.0.0", "parts.1.0", "parts.2.0", "parts.4")
    runs, _ = find_runs(tied.model, tied.task.forward, x, tied.space.groups)
    sequential = runs[0][0].runs[0][0]
    assert [call.after for call in sequential.runs[0]] == [1, 3, 3, 3, 4]


def test_a_compiled_or_scripted_model_runs_as_it_is(tiny):
    task, groups = tiny.task(shape=VECTORS), build(tiny, "mlp").space.groups
    x = task.batches("search")[0][0]
    model = mlp().eval()
    model[2]._compiled_call_impl = model[2]._call_impl
    assert find_runs(model, task.forward, x, groups) == ([], tuple(group.name for group in groups))


def test_an_output_that_is_written_into_later_is_not_kept(tiny):
    engine = build(tiny, "in place")
    runs, _ = find_runs(engine.model, engine.task.forward, engine.batches("search")[0][0], engine.space.groups)
    names = {module: name for name, module in engine.model.named_modules()}
    kept = {names[call.module]: call.can_be_kept for run in runs[0][0].runs for call in run}
    assert kept == {"a": False, "relu1": True, "b": False, "relu2": True, "c": True, "head": True}


def test_what_is_kept_stays_within_its_bound(tiny):
    engines = {size: build(tiny, "resnet", prefix_max_bytes=size) for size in (10**9, 40_000, 12_000, 10)}
    most = dict.fromkeys(engines, 0)
    for allocation in sequence(engines[10].space, np.random.default_rng(1)):
        scores = [engine.score(allocation) for engine in engines.values()]
        assert all(score == scores[0] for score in scores)
        for size, engine in engines.items():
            held = {kept.tensor.untyped_storage().data_ptr(): kept.tensor for kept in engine.prefix_cache._kept.values()}
            assert sum(tensor.untyped_storage().nbytes() for tensor in held.values()) <= engine.prefix_cache.n_bytes <= size
            most[size] = max(most[size], engine.prefix_cache.n_bytes)
    assert most[10] == 0 < most[12_000] < most[40_000] < most[10**9]


def test_what_is_asked_for_once_is_not_kept(tiny):
    engine = build(tiny, "mlp")
    first, *_, last = engine.space.names
    engine.score(FLOAT)
    engine.score(Allocation({first: "w2"}))
    assert not engine.prefix_cache._kept, "nothing in common with an earlier one"
    engine.score(Allocation({first: "w2", last: "w4"}))
    prefixes = {key[3] for key in engine.prefix_cache._kept}
    assert len(prefixes) == 1
    assert next(iter(prefixes))[0] != "-"


def test_a_useful_output_is_not_driven_out_by_one_that_saves_less(tiny):
    """In turns over more than fits, what fits is still reused."""
    size = build(tiny, "mlp")
    last = size.space.names[-1]
    for scheme in (None, "w2", "w4"):
        size.score(FLOAT if scheme is None else Allocation({last: scheme}))
    n_bytes = size.prefix_cache.n_bytes
    engine = build(tiny, "mlp", prefix_max_bytes=n_bytes - 1)  # one of the two batches' outputs
    for scheme in (None, "w2", "w4"):
        engine.score(FLOAT if scheme is None else Allocation({last: scheme}))
    calls = watch(engine.model[0])
    engine.score(Allocation({last: "w8"}))
    assert len(calls) == 1


def test_forward_is_restored_after_an_error(tiny):
    engine = build(tiny, "mlp")
    last = engine.space.names[-1]
    expected = engine.score(FLOAT), engine.score(Allocation({last: "w2"}))
    forward = engine.model[8].forward
    engine.model[8].forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        engine.score(Allocation({last: "w4"}))
    engine.model[8].forward = forward
    assert not any("_call_impl" in vars(module) for module in engine.model.modules())
    engine._scores.clear()
    assert (engine.score(FLOAT), engine.score(Allocation({last: "w2"}))) == expected


def test_a_model_for_batches_of_one_size_is_tried_on_a_whole_batch(tiny):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x):
            return self.c(self.b(self.a(x.reshape(16, 8))))

    engine = tiny.engine(Fixed().eval(), tiny.task(n=32, shape=VECTORS))
    naive = tiny.engine(engine.model, tiny.task(n=32, shape=VECTORS), prefix_max_bytes=0)
    for allocation in [FLOAT, *sequence(engine.space, np.random.default_rng(0), 5)]:
        assert engine.score(allocation) == naive.score(allocation)
    assert engine.prefix_cache._kept


def test_batches_may_stop_early_and_go_on_later(tiny):
    engine, naive = build(tiny, "resnet"), build(tiny, "resnet", prefix_max_bytes=0)
    batches = engine.batches("search")
    naive.batches("search")  # ordered by the float model
    rng = np.random.default_rng(0)
    allocations = [engine.space.allocation(rng.integers(0, 3, len(engine.space.groups)) * (i > 2)) for i in range(5)]
    for i in (0, 1, 0, 1):
        for allocation in allocations:
            with engine.applied(allocation):
                found = engine.prefix_cache.forward("search", i, batches[i][0], allocation)
            with naive.applied(allocation) as model:
                assert torch.equal(found, list(naive.scorer.outputs(model, "search"))[i])


def test_longest_common_prefix():
    rng = np.random.default_rng(0)
    asked, codes = _Prefixes(), []
    for _ in range(200):
        code = "".join(rng.choice(list("-01"), 6))
        if code not in codes:
            lengths = [next((i for i in range(6) if code[i] != other[i]), 6) for other in codes]
            codes.append(code)
            assert asked.common(code) == max(lengths, default=0)
        assert asked.common(code) == asked.common(code)


def test_what_was_asked_for_long_ago_is_forgotten():
    asked, length = _Prefixes(), N_REMEMBERED // 4
    for character in "abcdefg":
        asked.common(character * length)
    assert [code[0] for code in asked.sorted] == ["d", "e", "f", "g"] == [code[0] for code in asked.in_order]
    assert len(asked.lengths) == 4


def test_an_engine_that_holds_other_weights_starts_from_none_of_this_ones_outputs(tiny):
    engine = build(tiny, "mlp")
    first, *_, last = engine.space.names
    allocations = [Allocation({first: "w2"} | ({last: scheme} if scheme else {})) for scheme in (None, "w2", "w4")]
    for allocation in allocations:
        engine.score(allocation)
    weight = engine.quantized(first, "w2")
    other = engine.with_weights({(first, "w2"): engine.quantized(first, "w8")}, {})
    assert weight is engine.quantized(first, "w2")
    with other.applied(allocations[1]) as model:
        expected = torch.cat([other.task.forward(model, inputs) for inputs, _ in other.batches("search")])
    assert torch.equal(logits(other, allocations[1]), expected)
