"""Which positions of a layer's output belong to which sample of a batch: measured, for modules may order axes as they like.

A sample's logits are probed apart from the others': positions of other samples must then have no gradient. Sequences may come
first (`[tokens, samples, features]`), samples may be joined along an axis, one after another or in turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpsearch.batches import CHUNK
from mpsearch.divergence import Divergence
from mpsearch.metrics.fisher import Recording


@dataclass(frozen=True)
class Layout:
    """Where `n` samples lie in a tensor: along `axis`, one after another or, `in_turn`, the first position of each first."""

    n: int
    axis: int = 0
    in_turn: bool = False

    def by_sample(self, tensor: Tensor) -> Tensor:
        """`[n, positions]`."""
        each = tensor.shape[self.axis] // self.n
        split = tensor.movedim(self.axis, 0)
        split = split.unflatten(0, (each, self.n)).transpose(0, 1) if self.in_turn else split.unflatten(0, (self.n, each))
        return split.flatten(1)


def layouts(shape: Sequence[int], n: int) -> Iterator[Layout]:
    """All that a tensor of this shape may have."""
    for axis, size in enumerate(shape):
        if size % n == 0:
            yield Layout(n, axis)
            if n < size:
                yield Layout(n, axis, in_turn=True)


def find_layouts(
    recording: Recording,
    divergence: Divergence,
    signs: Tensor,
    counts: Iterable[int],
    as_one: set[tuple[int, ...]] | None = None,
) -> tuple[list[Layout], float]:
    """How the samples lie in each call's output, and how many samples count.

    The logits `[n_rows, columns]` of a random half of the samples are probed (`Divergence.probe`), then those of the others.
    `counts` are what the number of samples may be. Where no layout of the rows and of each output
    explains the gradients, for samples reach one another's logits or lie in yet another way, the whole batch is one sample. The
    shape of such a batch's logits is added to `as_one`, and one that is there is not looked at again.

    A mean of squares of expected sizes w varies like that of (sum w)^2 / sum w^2 squares of one size: so many samples count. Here
    w are the samples' squared gradients: the loss of samples that are predicted with confidence hardly changes.
    """
    logits, calls = recording.logits, recording.calls
    counts = () if as_one is not None and tuple(logits.shape) in as_one else counts
    for rows in (rows for count in dict.fromkeys(counts) if count > 1 for rows in layouts(logits.shape[:1], count)):
        n = rows.n
        chosen = torch.randperm(n, generator=torch.Generator().manual_seed(n)).to(logits.device) < n // 2
        index = rows.by_sample(torch.arange(len(logits), device=logits.device))
        possible = [dict.fromkeys(layouts(call.shape, n), torch.zeros(n, dtype=torch.float64)) for _, call in calls]
        for half in (chosen, ~chosen):

            def compare(i: int, gradient: Tensor, others: Tensor = ~half, possible: Any = possible) -> None:
                """Keep the layouts in which the gradient is 0 at the samples of the other half."""
                split = {layout: layout.by_sample(gradient) for layout in possible[i]}
                possible[i] = {
                    layout: possible[i][layout] + each.double().square().sum(1).cpu()
                    for layout, each in split.items()
                    if not each[others].any()
                }

            probed = signs.index_fill(0, index[~half].flatten(), 0)
            recording.backward(divergence.probe(logits, probed), compare)
            if not all(possible):
                break
        if all(possible):
            first = [next(iter(each.items())) for each in possible]
            counting = [float(size.sum().square() / size.square().sum()) for _, size in first if size.any()]
            return [layout for layout, _ in first], float(np.median(counting or [1.0]))
    if as_one is not None:
        as_one.add(tuple(logits.shape))
    return [Layout(1)] * len(calls), 1.0


def probe_signs(like: Tensor, seed: int, index: int) -> Tensor:
    """Random signs for one of up to 2^k probes, int8 in the shape of `like`.

    Over all 2^k, 2^k consecutive elements are orthogonal: the i-th probe is the i-th row of a Hadamard matrix (Sylvester 1867: -1
    where i and the column have an odd number of common bits), repeated, times signs that all probes of a `seed` share. The mean
    of (v . x)^2 over so many probes is |x|^2 for so many elements of x.
    """
    signs = torch.randint(0, 2, like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8).flatten() * 2 - 1
    for start in range(0, len(signs), CHUNK):  # positions take eight times as much memory as signs
        part = signs[start : start + CHUNK]
        position = torch.arange(start, start + len(part))
        for bit in range(index.bit_length()):
            if index >> bit & 1:
                part *= 1 - 2 * (position >> bit & 1)
    return signs.view(like.shape).to(like.device)
