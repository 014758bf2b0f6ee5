"""Whether the splits of a task share samples: their inputs are compared by hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from mpsearch.errors import InputError
from mpsearch.tasks.base import SPLITS, Batch, Task
from mpsearch.tree import tensors_in


def overlap(task: Task) -> dict[str, Any] | None:
    """`samples` of each split, and how many of them are `shared` with an earlier split, by "confirm in the search".

    A sample is what all input tensors of a batch hold at one index of their first dimension; targets do not count. `None` where
    samples cannot be told apart (an input tensor has no such dimension, or they differ in length). Raises `InputError` where
    every confirm sample is in another split: nothing would be confirmed.
    """
    hashes: dict[str, list[bytes]] = {}
    for split in SPLITS:
        digests = sample_digests(task.loaded(split))
        if digests is None:
            return None
        hashes[split] = digests
    shared = {}
    for i, split in enumerate(SPLITS):
        for other in SPLITS[:i]:
            known = set(hashes[other])
            shared[f"{split} in the {other}"] = sum(digest in known for digest in hashes[split])
    seen = {*hashes["calibration"], *hashes["search"]}
    if hashes["confirm"] and all(digest in seen for digest in hashes["confirm"]):
        raise InputError(
            f"All {len(hashes['confirm']):,} samples of the confirm split are in the calibration or the search split, too. Give "
            "the confirm split data of its own."
        )
    return {"samples": {split: len(digests) for split, digests in hashes.items()}, "shared": shared}


def sample_digests(batches: Sequence[Batch]) -> list[bytes] | None:
    """A hash of each sample's inputs, or `None`: see `overlap`."""
    digests = []
    for inputs, _ in batches:
        tensors = list(tensors_in(inputs))
        if not tensors or any(not t.dim() or len(t) != len(tensors[0]) for t in tensors):
            return None
        rows = [t.detach().cpu().contiguous().flatten(1) if t.dim() > 1 else t.detach().cpu()[:, None] for t in tensors]
        views = [row.contiguous().view(torch.uint8).numpy() for row in rows]
        for parts in zip(*views, strict=True):
            digest = hashlib.blake2b(digest_size=16)
            for part in parts:
                digest.update(part)
            digests.append(digest.digest())
    return digests
