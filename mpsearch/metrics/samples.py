"""Which positions of a layer's output belong to which sample of a batch: measured, for modules may order axes as they like.

A sample's logits are probed apart from the others': positions of other samples must then have no gradient. Sequences may come
first (`[tokens, samples, features]`), samples may be joined along an axis, one after another or in turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpsearch.divergence import Divergence
from mpsearch.metrics.fisher import Call, gradients_at

Gradients = tuple[Tensor | None, ...]


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


def probe_gradients(
    calls: Sequence[tuple[str, Call]],
    logits: Tensor,
    divergence: Divergence,
    signs: Tensor,
    counts: Iterable[int],
    as_one: set[tuple[int, ...]] | None = None,
) -> tuple[Gradients, list[Layout]]:
    """The gradients of one probe (`Divergence.probe`) at the calls' outputs, and how the samples lie in each of them.

    The logits `[n_rows, columns]` of a random half of the samples are probed, then those of the others; the sum is the whole
    probe's. `counts` are what the number of samples may be. Where no layout of the rows and of each output
    explains the gradients, for samples reach one another's logits or lie in yet another way, the whole batch is one sample. The
    shape of such a batch's logits is added to `as_one`, and one that is there is not looked at again.
    """
    counts = () if as_one is not None and tuple(logits.shape) in as_one else counts
    for rows in (rows for count in dict.fromkeys(counts) if count > 1 for rows in layouts(logits.shape[:1], count)):
        n = rows.n
        chosen = torch.randperm(n, generator=torch.Generator().manual_seed(n)).to(logits.device) < n // 2
        index = rows.by_sample(torch.arange(len(logits), device=logits.device))
        halves = []
        for half in (chosen, ~chosen):
            probed = torch.zeros_like(logits, dtype=torch.bool).index_fill(0, index[half].flatten(), True)
            halves.append(gradients_at(calls, divergence.probe(torch.where(probed, logits, logits.detach()), signs)))
        matching = [
            next((layout for layout in layouts(call.output.shape, n) if _explains(layout, of_halves, chosen)), None)
            for (_, call), *of_halves in zip(calls, *halves, strict=True)
        ]
        explained = [layout for layout in matching if layout is not None]
        if len(explained) == len(matching):
            return tuple(map(_sum, *halves)), explained
        del halves  # as large as all outputs
    if as_one is not None:
        as_one.add(tuple(logits.shape))
    return gradients_at(calls, divergence.probe(logits, signs)), [Layout(1)] * len(calls)


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return second if first is None else first if second is None else first + second


def _explains(layout: Layout, halves: Sequence[Tensor | None], chosen: Tensor) -> bool:
    """Whether the gradients of either half of the logits are 0 at the samples of the other half."""
    pairs = zip(halves, (~chosen, chosen), strict=True)
    return not any(bool(layout.by_sample(g)[others].any()) for g, others in pairs if g is not None)


def probe_signs(like: Tensor, seed: int, index: int) -> Tensor:
    """Random signs for one of up to 2^k probes, in the shape of `like`; over all 2^k, 2^k consecutive elements are orthogonal.

    The i-th row of a Hadamard matrix (Sylvester 1867: -1 where i and the column have an odd number of common bits), repeated,
    times signs that all probes of a `seed` share. The mean of (v . x)^2 over so many probes is |x|^2 for so many elements of x.
    """
    signs = torch.randint(0, 2, like.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    position = torch.arange(like.numel()).view(like.shape)
    for bit in range(index.bit_length()):
        if index >> bit & 1:
            signs *= 1 - 2 * (position >> bit & 1)
    return signs.to(like)
