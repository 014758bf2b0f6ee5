"""Which layers end up in one group: by a runtime's patterns, by the user's, by both."""

import pytest

from mpsearch.errors import InputError
from mpsearch.group import share
from mpsearch.layer import LayerSpec
from mpsearch.runtimes.llama_cpp import LlamaCpp
from mpsearch.runtimes.vllm import VLLM

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
