"""The Llama: what its parts compute, what is found of it, and the published perplexity."""

import math

import pytest
import torch
import torch.nn.functional as F

from mpsearch.errors import InputError
from mpsearch.graph.sharing import share
from mpsearch.graph.trace import trace_layers
from mpsearch.models.llama import Attention, Llama, Sizes, rotate, rotations, stories260k
from mpsearch.pipeline.evaluators import ConfirmEvaluator
from mpsearch.runtimes.vllm import VLLM
from mpsearch.schemes.integer import Integer
from mpsearch.tasks.language import Language, read_tokens

TINY = Sizes(dim=16, n_layers=2, n_heads=4, n_kv_heads=2, hidden=24, vocabulary=30)


def tiny_llama():
    torch.manual_seed(0)
    return Llama(TINY).eval()


def test_layers_of_a_llama():
    ids = torch.randint(30, (3, 10))
    layers = trace_layers(tiny_llama(), lambda model, x: model(x), ids)
    assert [layer.name for layer in layers[:3]] == ["embed_tokens", "layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj"]
    assert len(layers) == 1 + 2 * 7
    assert (layers[0].kind, layers[0].modules) == ("embedding", ("embed_tokens", "lm_head"))
    assert layers[0].macs == 10 * 16 * 30, "those of the output projection of one window"
    assert {layer.kind for layer in layers[1:]} == {"linear"}
    assert layers[2].macs == 10 * 16 * 8
    assert len({layer.group for layer in share(layers, VLLM().shared, required=False)}) == 1 + 2 * 4


def test_a_token_is_foretold_from_those_before_it():
    model, ids = tiny_llama(), torch.randint(30, (2, 9))
    other = ids.clone()
    other[:, 5:] = (other[:, 5:] + 7) % 30
    with torch.no_grad():
        one, two = model(ids), model(other)
    assert one.shape == (2, 9, 30)
    torch.testing.assert_close(one[:, :5], two[:, :5])
    assert not torch.allclose(one[:, 5:], two[:, 5:])
    with pytest.raises(InputError, match="is 512 tokens; got 513"):
        model(torch.zeros(1, 513, dtype=torch.long))


def test_rotations_turn_pairs_by_their_distance_alone():
    turns = rotations(40, 8, 10_000.0)
    q, k = torch.randn(8), torch.randn(8)
    at = rotate(q.expand(40, 8), turns), rotate(k.expand(40, 8), turns)
    torch.testing.assert_close(at[0][7] @ at[1][3], at[0][30] @ at[1][26])
    angle = 5 * 10_000.0 ** (-2 / 8)
    expected = math.cos(angle) * q[2] - math.sin(angle) * q[3], math.sin(angle) * q[2] + math.cos(angle) * q[3]
    torch.testing.assert_close(at[0][5, 2:4], torch.stack(expected))


def test_attention_is_the_textbook_s():
    torch.manual_seed(1)
    attention, x, turns = Attention(TINY), torch.randn(1, 6, 16), rotations(6, 4, 10_000.0)
    heads = []
    for i in range(4):
        q = rotate(attention.q_proj(x)[0, :, 4 * i : 4 * i + 4], turns)
        k = rotate(attention.k_proj(x)[0, :, 4 * (i // 2) : 4 * (i // 2) + 4], turns)
        v = attention.v_proj(x)[0, :, 4 * (i // 2) : 4 * (i // 2) + 4]
        scores = (q @ k.T / 2).masked_fill(torch.ones(6, 6).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ v)
    torch.testing.assert_close(attention(x, turns), attention.o_proj(torch.cat(heads, -1))[None])


def test_a_tied_embedding_packs_once(tiny):
    texts = [torch.randint(30, (40,)).numpy() for _ in range(12)]
    engine = tiny.engine(tiny_llama(), Language(texts, 8, 8, 8, window=12, batch_size=3), {"w8": Integer(8)})
    uniform = engine.space.uniform("w8")
    simulated = engine.score(uniform, "confirm")
    confirmed = ConfirmEvaluator(engine)(uniform, "uniform")
    assert confirmed.packed
    assert confirmed.quality == pytest.approx(simulated.quality, rel=1e-4)
    assert confirmed.n_samples == 3  # texts, of which the 8 windows are parts


def test_sizes_of_stories260k():
    assert sum(p.numel() for p in stories260k().parameters()) == 260_032


@pytest.mark.slow
@pytest.mark.data
def test_stories260k_has_its_recorded_perplexity(data_dir):
    folder = data_dir / "stories260k"
    model = stories260k(folder / "model.safetensors")
    ids = torch.from_numpy(read_tokens(folder / "tokens_dev.npz").astype("int64"))[: 64 * 256 + 1]
    with torch.no_grad():
        nats = [F.cross_entropy(model(x[None])[0], y) for x, y in zip(ids[:-1].split(256), ids[1:].split(256), strict=True)]
    assert math.exp(torch.stack(nats).double().mean()) == pytest.approx(4.165, abs=5e-4)
