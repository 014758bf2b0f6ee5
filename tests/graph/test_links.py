"""Finding channels that can be scaled: all that can are found, wherever their factors pass, and none that cannot."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mpsearch.graph.fold import fold_batch_norms
from mpsearch.graph.links import find_links
from mpsearch.models import bert, llama
from mpsearch.models.efficientnet import EfficientNet


class Net(nn.Module):
    """Layers a and b, b and c of a `run` that the case gives."""

    def __init__(self, run, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.run = run

    def forward(self, x):
        return self.run(self, x)


def linear(n_in=6, n_out=6):
    return nn.Linear(n_in, n_out)


class OwnNorm(nn.Module):
    """A root-mean-square norm as checkpoints' own code has it; with `plus_one` the weight is 1 + what is stored."""

    def __init__(self, n, plus_one=False):
        super().__init__()
        self.weight, self.plus_one = nn.Parameter(torch.rand(n) + 0.5), plus_one

    def forward(self, x):
        gain = self.weight + 1 if self.plus_one else self.weight
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * gain


def attention(net, x):
    """4 query heads of 3, 2 heads of keys and values."""
    q, k, v = (project(x).unflatten(-1, (-1, 3)).transpose(1, 2) for project in (net.q, net.k, net.v))
    return net.o(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))


VECTORS, IMAGES, TOKENS = (4, 6), (4, 3, 8, 8), (4, 5, 6)

# what -> (network, shape of its input, producer -> consumers, where channels are not one to one the index)
FOUND = {
    "relu": (Net(lambda n, x: n.b(F.relu(n.a(x))), a=linear(), b=linear()), VECTORS, {"a": ["b"]}),
    "leaky and dropout": (
        Net(lambda n, x: n.b(n.drop(F.leaky_relu(n.a(x)))), a=linear(), b=linear(), drop=nn.Dropout()),
        VECTORS,
        {"a": ["b"]},
    ),
    "pooling, transposed, depthwise": (
        Net(
            lambda n, x: n.d(F.avg_pool2d(n.c(F.max_pool2d(F.relu(n.a(x)), 2)), 2)),
            a=nn.Conv2d(3, 8, 3, padding=1),
            c=nn.Conv2d(8, 8, 3, padding=1, groups=8),
            d=nn.ConvTranspose2d(8, 4, 2, groups=2),
        ),
        IMAGES,
        {"a": ["c"], "c": ["d"]},
    ),
    "two calls": (
        Net(lambda n, x: n.b(F.relu(n.a(x))) + n.c(F.relu(n.a(x))), a=linear(), b=linear(), c=linear()),
        VECTORS,
        {"a": ["b", "c"]},
    ),
    "two readers": (
        Net(lambda n, x: (lambda y: n.b(F.relu(y)) + n.c(y))(n.a(x)), a=linear(), b=linear(), c=linear()),
        VECTORS,
        {"a": ["b", "c"]},
    ),
    "product with a gate": (
        Net(lambda n, x: n.down(F.silu(n.gate(x)) * n.up(x)), gate=linear(), up=linear(), down=linear()),
        VECTORS,
        {"up": ["down"]},
    ),
    "norms": (
        Net(
            lambda n, x: n.c(F.relu(n.last(n.b(n.own(n.a(n.first(x))))))),
            first=nn.LayerNorm(6),
            a=linear(),
            own=OwnNorm(6),
            b=linear(),
            last=nn.RMSNorm(6),
            c=linear(),
        ),
        TOKENS,
        {"first": ["a"], "own": ["b"], "last": ["c"]},
    ),
    "a batch norm on its own": (
        Net(lambda n, x: n.a(F.relu(n.norm(x))), norm=nn.BatchNorm2d(3), a=nn.Conv2d(3, 4, 3)),
        IMAGES,
        {"norm": ["a"]},
    ),
    "residual": (Net(lambda n, x: n.c(x + n.b(F.relu(n.a(x)))), a=linear(), b=linear(), c=linear()), VECTORS, {"a": ["b"]}),
}
BLOCKED = {
    "gelu": Net(lambda n, x: n.b(F.gelu(n.a(x))), a=linear(), b=linear()),
    "silu": Net(lambda n, x: n.b(F.silu(n.a(x))), a=linear(), b=linear()),
    "relu6 as a function": Net(lambda n, x: n.b(F.relu6(30 * n.a(x))), a=linear(), b=linear()),
    "softmax": Net(lambda n, x: n.b(n.a(x).softmax(-1)), a=linear(), b=linear()),
    "its own output": Net(lambda n, x: (lambda y: n.b(y) + y)(n.a(x)), a=linear(), b=linear()),
    "a weight read elsewhere": Net(lambda n, x: n.b(n.a(x)) @ n.b.weight, a=linear(), b=linear()),
    "the consumer also called with other things": Net(lambda n, x: n.b(n.a(x)) + n.b(x), a=linear(), b=linear()),
    "a norm of 1 + weight": Net(lambda n, x: n.b(n.a(x)), a=OwnNorm(6, plus_one=True), b=linear()),
    "a layer that was not reached": Net(lambda n, x: n.b(n.a(x)), a=linear(), b=linear(), expert=linear()),
}


def found(model, *shape):
    torch.manual_seed(0)
    for module in model.modules():
        if hasattr(module, "weight") and module.weight.ndim == 1:
            nn.init.uniform_(module.weight, 0.5, 1.5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    links = find_links(model.eval(), lambda model, x: model(x), torch.randn(*shape))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return links


@pytest.mark.parametrize("what", FOUND)
def test_what_can_be_scaled_is_found(what):
    model, shape, expected = FOUND[what]
    links = found(model, *shape)
    assert {link.producer: list(link.consumers) for link in links} == expected
    assert all(index.tolist() == list(range(link.channels)) for link in links for index in link.consumers.values())
    assert not any(link.clips for link in links)


@pytest.mark.parametrize("what", BLOCKED)
def test_what_would_change_the_outputs_is_not(what):
    assert found(BLOCKED[what], *VECTORS) == []


def test_a_tied_weight_stays_as_it_is():
    model = Net(lambda n, x: n.b(n.a(x)), a=linear(), b=linear())
    model.b.weight = model.a.weight
    assert found(model, *VECTORS) == []


def test_heads_that_several_queries_share():
    model = Net(attention, q=linear(6, 12), k=linear(), v=linear(), o=linear(12, 6))
    (link,) = found(model, *TOKENS)
    assert link.producer == "v"
    assert link.consumers["o"].tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]


def test_feature_maps_that_are_flattened():
    model = Net(lambda n, x: n.b(F.relu(n.a(x)).flatten(1)), a=nn.Conv2d(3, 4, 7), b=linear(16, 5))
    (link,) = found(model, *IMAGES)
    assert link.consumers["b"].tolist() == [i // 4 for i in range(16)]


@pytest.mark.parametrize("inplace", [False, True])
def test_a_relu6_is_a_bound_that_is_scaled_too(inplace):
    images = Net(lambda n, x: n.b(n.act(8 * n.a(x))), a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(4, 2, 3), act=nn.ReLU6(inplace))
    (link,) = found(images, *IMAGES)
    assert link.clips == {"act": (4, 1, 1)}
    (link,) = found(Net(lambda n, x: n.b(n.act(8 * n.a(x))), a=linear(), b=linear(), act=nn.ReLU6(inplace)), *TOKENS)
    assert link.clips == {"act": (6,)}


def test_a_relu6_in_several_places_has_one_bound():
    model = Net(lambda n, x: n.c(n.act(8 * n.b(n.act(8 * n.a(x))))), a=linear(), b=linear(), c=linear(), act=nn.ReLU6())
    assert found(model, *VECTORS) == []
    # Which does not keep what lies elsewhere from being scaled.
    model = Net(lambda n, x: n.act(3 * n.c(n.b(n.act(8 * n.a(x))))), a=linear(), b=linear(6, 4), c=linear(4), act=nn.ReLU6())
    assert [link.producer for link in found(model, *VECTORS)] == ["b"]


def links_of(model, x):
    fold_batch_norms(model.eval(), lambda model, x: model(x), x)
    links = find_links(model, lambda model, x: model(x), x)
    return {link.producer: [*link.consumers, *link.clips] for link in links}


def test_in_an_efficientnet():
    torch.manual_seed(0)
    model = EfficientNet(((1, 3, 1, 1, 8), (2, 3, 2, 6, 8)), stem=10, head=16, n_classes=5)
    assert links_of(model, torch.randn(2, 3, 32, 32)) == {
        "_conv_stem": ["_blocks.0._depthwise_conv", "act0"],
        "_blocks.0._depthwise_conv": ["_blocks.0._project_conv", "_blocks.0.act1"],
        "_blocks.0._project_conv": ["_blocks.1._expand_conv"],
        "_blocks.1._expand_conv": ["_blocks.1._depthwise_conv", "_blocks.1.act0"],
        "_blocks.1._depthwise_conv": ["_blocks.1._project_conv", "_blocks.1.act1"],
        "_blocks.2._expand_conv": ["_blocks.2._depthwise_conv", "_blocks.2.act0"],
        "_blocks.2._depthwise_conv": ["_blocks.2._project_conv", "_blocks.2.act1"],
        "_conv_head": ["_fc", "act1"],
    }


def test_in_a_llama():
    torch.manual_seed(0)
    model = llama.Llama(llama.Sizes(dim=16, n_layers=1, n_heads=4, n_kv_heads=2, hidden=20, vocabulary=30))
    attention, mlp = "layers.0.self_attn", "layers.0.mlp"
    assert links_of(model, torch.randint(0, 30, (2, 7))) == {
        "layers.0.input_layernorm": [f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"],
        f"{attention}.v_proj": [f"{attention}.o_proj"],
        "layers.0.post_attention_layernorm": [f"{mlp}.gate_proj", f"{mlp}.up_proj"],
        f"{mlp}.up_proj": [f"{mlp}.down_proj"],
    }


def test_in_a_bert_whose_norms_also_feed_the_residuals():
    torch.manual_seed(0)
    model = bert.Bert(bert.Sizes(dim=16, n_layers=1, n_heads=4, hidden=20, vocabulary=30, context=8))
    parts = "encoder.layer.0.attention"
    assert links_of(model, torch.randint(1, 30, (2, 7))) == {f"{parts}.self.value": [f"{parts}.output.dense"]}
