"""Which layers end up in one group: by a runtime's patterns, by the user's, by both."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mpsearch.allocation import SearchSpace
from mpsearch.errors import InputError
from mpsearch.graph.sharing import check_reached, share
from mpsearch.graph.trace import trace_layers
from mpsearch.layer import LayerSpec
from mpsearch.runtimes.llama_cpp import LlamaCpp
from mpsearch.runtimes.vllm import VLLM
from mpsearch.schemes.integer import Integer

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
EXPERTS = tuple(f"mlp.experts.{i}.{name}" for i in range(2) for name in ("gate_proj", "up_proj", "down_proj"))
NAMES = [f"layers.{block}.{name}" for block in range(2) for name in (*ATTENTION, "mlp.gate_proj", "mlp.up_proj", *EXPERTS)]


def layer(name, modules=None):
    return LayerSpec(name, "linear", (4, 4), 16, name, modules or (name,))


LAYERS = [layer(name) for name in NAMES]


def groups(layers):
    found = {}
    for one in layers:
        found.setdefault(one.group, []).append(one.name)
    return found


def test_what_vllm_fuses_shares_within_a_block():
    found = groups(share(LAYERS, VLLM.shared, required=False))
    for block in ("layers.0", "layers.1"):
        assert found[f"{block}.self_attn.q_proj+k_proj+v_proj"] == [f"{block}.{name}" for name in ATTENTION[:3]]
        assert found[f"{block}.mlp.gate_proj+up_proj"] == [f"{block}.mlp.gate_proj", f"{block}.mlp.up_proj"]
        assert found[f"{block}.mlp.experts.0.gate_proj+5 more"] == [f"{block}.{name}" for name in EXPERTS]
        assert found[f"{block}.self_attn.o_proj"] == [f"{block}.self_attn.o_proj"]
    assert len(found) == 8


def test_llama_cpp_has_one_tensor_for_each_projection_of_all_experts():
    found = groups(share(LAYERS, LlamaCpp.shared, required=False))
    pair = ["layers.1.mlp.experts.0.up_proj", "layers.1.mlp.experts.1.up_proj"]
    assert pair in found.values()
    assert sum(len(names) == 2 for names in found.values()) == 6
    assert all(len(names) <= 2 for names in found.values())


def test_users_ties_join_the_runtimes():
    tied = share(share(LAYERS, VLLM.shared, required=False), ["*.k_proj|*.o_proj"])
    assert [f"layers.0.{name}" for name in ATTENTION] in groups(tied).values()
    everything = share(LAYERS, ["layers.**"])
    assert list(groups(everything).values()) == [NAMES]
    assert share(LAYERS, []) == tuple(LAYERS)


def test_a_tied_weight_is_found_by_any_of_its_owners():
    layers = [layer("embed", ("embed", "head")), layer("body")]
    assert len(groups(share(layers, ["head|body"]))) == 1


@pytest.mark.parametrize("pattern", ["*.q_prj|*.k_prj", "layers.0.self_attn.q_proj", "*.q_proj", ""])
def test_a_pattern_that_ties_nothing_is_said(pattern):
    with pytest.raises(InputError, match="ties no two layers"):
        share(LAYERS, [pattern])
    assert share(LAYERS, [pattern], required=False) == tuple(LAYERS)


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(32, 64, bias=False), nn.Linear(32, 64, bias=False)
        self.down_proj = nn.Linear(64, 32, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention, then three experts, each token sent to one of them."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(32, 32, bias=False) for _ in range(4))
        self.gate = nn.Linear(32, 3, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(3))

    def forward(self, x):
        x = x + self.o_proj(F.scaled_dot_product_attention(self.q_proj(x), self.k_proj(x), self.v_proj(x)))
        weights, chosen = self.gate(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            if (mine := chosen == i).any():
                y[mine] = weights[mine, None] * expert(x[mine])
        return x + y


class MixtureOfExperts(nn.Module):
    """Two blocks between an embedding and a head that share their weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 32), nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.layers:
            x = block(x)
        return self.head(x)


def traced(ids):
    torch.manual_seed(0)
    model = MixtureOfExperts()
    return model, trace_layers(model, lambda m, x: m(x), ids)


def test_a_mixture_of_experts_for_vllm_and_for_llama_cpp():
    model, layers = traced(torch.arange(50)[None])
    fused = share(layers, VLLM.shared, required=False)
    check_reached(model, fused, VLLM.shared, "vllm")
    of_vllm = groups(fused)
    assert ["embed"] in of_vllm.values(), "the head is the same layer"
    sizes = sorted(len(names) for name, names in of_vllm.items() if name.startswith("layers.1."))
    assert sizes == [1, 1, 3, 9], "o and the router, q k v, all of all experts"
    of_llama = groups(share(layers, LlamaCpp.shared, required=False))
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert sorted(f"layers.0.experts.{i}.{name}" for i in range(3)) in [sorted(names) for names in of_llama.values()]
    assert sum(len(names) == 1 for names in of_llama.values()) == 2 * 5 + 1
    schemes = {"w4g32": Integer(4, 32), "w8g32": Integer(8, 32)}
    space = SearchSpace.build(share(layers, LlamaCpp.shared, required=False), schemes, runtime=LlamaCpp())
    assert set(space.choices) == {tuple(schemes)}
    with pytest.raises(InputError, match="vllm is not known to run layer 'embed'"):
        SearchSpace.build(fused, schemes, runtime=VLLM())


def test_an_expert_that_no_token_reaches_is_said_where_all_run_as_one():
    model, layers = traced(torch.zeros(1, 1, dtype=torch.long))
    for runtime in (VLLM(), LlamaCpp()):
        with pytest.raises(InputError, match=r"runs 'layers.0.experts.\d.\w+' and 'layers.0.* as one.*larger batches"):
            check_reached(model, layers, runtime.shared, runtime.name)
    check_reached(model, layers, (), "mpsearch")
