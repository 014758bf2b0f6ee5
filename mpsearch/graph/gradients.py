"""Gradients at the outputs of a network's layers, handed over one after another while the backward pass runs.

None of them is kept, nor are the outputs themselves, so that in addition to the graph of the network one gradient is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class GradientTaps:
    """The outputs of one forward pass at which gradients are asked for.

    Run the network under `recording`, give each output to `tap` and let the network go on with what that returns.
    """

    def __init__(self) -> None:
        self._leaves: list[Tensor] = []

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        """While the block runs, a graph is recorded from the taps on: no parameter of the model takes a gradient."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            with torch.enable_grad():
                yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)

    def tap(self, output: Tensor, see: Callable[[Tensor], None]) -> Tensor:
        """What takes the output's place; `see` is called with its gradient in each backward pass that reaches it."""
        if output.requires_grad:  # its hook sees the gradient as of now, also where later code works in place
            output.register_hook(see)
            return output
        leaf = output.detach().requires_grad_()
        self._leaves.append(leaf)
        leaf.register_hook(see)
        return leaf.clone()  # no later code may work in place on a leaf

    def backward(self, loss: Tensor) -> None:
        """Hand over the gradients of `loss`, from the last output to the first; the graph is kept."""
        try:
            loss.backward(retain_graph=True)
        finally:
            for leaf in self._leaves:
                leaf.grad = None
