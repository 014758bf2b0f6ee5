"""Rotation by a Hadamard matrix of signs in plain PyTorch: the specification that every compiled backend equals bit for bit.

All arithmetic is float32, each operation rounded by itself. The columns are cut into blocks, powers of two, the largest first:
172 columns are 128, 32, 8 and 4. In a block of n, for apart = 1, 2, 4, … below n, every pair (a, b) whose positions differ by
`apart` becomes (a + b, a - b); that is H, with H H = n. Column j has the factor sign[j] / sqrt(n), rounded:

    y = (x * factor) H        and back        x = (y H) * factor

The signs are no stored numbers but a formula, so that any reader can make them: sign[j] is -1 where the lowest bit of j's hash is
1, the hash being the finalizer of MurmurHash3 (Appleby 2011) in 32 bits.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor


def blocks_of(columns: int) -> list[int]:
    """The powers of two that add up to `columns`, the largest first."""
    return [1 << bit for bit in reversed(range(columns.bit_length())) if columns >> bit & 1]


@functools.lru_cache(maxsize=256)
def factors_of(columns: int, device: torch.device) -> Tensor:
    """float32 `[columns]`: sign / sqrt(columns of its block)."""
    sizes = [size for size in blocks_of(columns) for _ in range(size)]
    signed = [(-1 if _hash(j) & 1 else 1) / math.sqrt(size) for j, size in enumerate(sizes)]
    return torch.tensor(signed, dtype=torch.float32, device=device)


def _hash(j: int) -> int:
    j = (j ^ j >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    j = (j ^ j >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return j ^ j >> 16


def rotate(x: Tensor, back: bool) -> Tensor:
    """`x` float32 `[..., columns]`, rotated or rotated back."""
    factors = factors_of(x.shape[-1], x.device)
    y = x if back else x * factors
    y = torch.cat([_butterflies(block) for block in y.split(blocks_of(x.shape[-1]), dim=-1)], dim=-1)
    return y * factors if back else y


def _butterflies(x: Tensor) -> Tensor:
    columns, apart = x.shape[-1], 1
    while apart < columns:
        a, b = x.reshape(*x.shape[:-1], -1, 2, apart).unbind(-2)
        x = torch.stack([a + b, a - b], dim=-2).reshape(x.shape)
        apart *= 2
    return x
