"""The order of the search data: the samples that the float model is least sure of come first.

A mean KL divergence is made by few samples, and those are the ones where the float model wavers. On ResNet-20 and 400 images, an
eighth of them in the order of the data says what the whole loss will be to within a factor of 2.1 (one standard deviation), the
eighth of largest entropy to within 1.13. The first batches are what trials that stop early see, and sensitivities on a part of
the data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

TOLERANCE = 1e-3  # of logits: what other samples in the same batch may change


@torch.no_grad()
def hardest_first(batches: Sequence[tuple[Any, Tensor]], forward: Callable[[Any], Tensor]) -> list[tuple[Any, Tensor]]:
    """The same samples in batches of the same sizes, by falling entropy of the logits [n, classes] that `forward` gives.

    Where samples cannot be told apart (the inputs are no tensors of one shape, or a sample's logits depend on the others in its
    batch), whole batches are put in this order.
    """
    logits = [forward(inputs) for inputs, _ in batches]
    return _by_sample(batches, logits, forward) or _by_batch(batches, logits)


def _by_batch(batches: Sequence[tuple[Any, Tensor]], logits: Sequence[Tensor]) -> list[tuple[Any, Tensor]]:
    order = torch.tensor([_entropies(found).mean() for found in logits]).argsort(descending=True, stable=True)
    return [batches[i] for i in order.tolist()]


def _by_sample(
    batches: Sequence[tuple[Any, Tensor]], logits: Sequence[Tensor], forward: Callable[[Any], Tensor]
) -> list[tuple[Any, Tensor]] | None:
    """A sample is a row of the inputs, with as many rows of logits and targets as there are to each; `None` if it is not."""
    rows = [len(inputs) if isinstance(inputs, Tensor) and inputs.dim() else 0 for inputs, _ in batches]
    if not all(rows) or len({(inputs.shape[1:], inputs.dtype) for inputs, _ in batches}) > 1:
        return None
    inputs, targets, found = (torch.cat(list(parts)) for parts in (*zip(*batches, strict=True), logits))
    n = sum(rows)
    if len(targets) != len(found) or len(found) % n:
        return None
    targets, found = targets.view(n, -1, *targets.shape[1:]), found.view(n, -1, *found.shape[1:])
    order = _entropies(found).mean(1).argsort(descending=True, stable=True)
    parts = zip(inputs[order].split(rows), targets[order].split(rows), strict=True)
    ordered = [(x, y.flatten(0, 1)) for x, y in parts]
    again = torch.cat([forward(x) for x, _ in ordered])
    alike = torch.allclose(again, found[order].flatten(0, 1), rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
    return ordered if alike else None


def _entropies(logits: Tensor) -> Tensor:
    """[...] nats, of logits [..., classes]; 0 where they are not finite."""
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).nan_to_num(0.0).double().cpu()
