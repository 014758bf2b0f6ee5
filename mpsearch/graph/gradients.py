"""Gradients at the outputs of a network's layers, handed over one after another while the backward pass runs.

None of them is kept, nor are the outputs themselves, so that in addition to the graph of the network one gradient is in memory.
What a large graph holds lies in files (`Kept`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.hooks import RemovableHandle

from mpsearch.files.scratch import Kept, n_writes

GRAPH_BYTES = 2**26  # of a graph's tensors in memory


class GradientTaps:
    """The outputs of one forward pass at which gradients are asked for.

    Run the network under `recording`, give each output to `tap` and let the network go on with what that returns.

    Attributes
    ----------
    kept
        The tensors of the graph, of which `GRAPH_BYTES` are in memory and others in files in the folder `scratch`.
    """

    def __init__(self, model: nn.Module, scratch: Path | None = None) -> None:
        self.model = model
        self.kept = Kept(GRAPH_BYTES, scratch, (*model.parameters(), *model.buffers()))
        self._leaves: list[Tensor] = []
        self._hooks: list[RemovableHandle] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """While the block runs, a graph is recorded from the taps on: no parameter of the model takes a gradient."""
        model = self.model
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            with torch.enable_grad(), saved_tensors_hooks(self._save, _saved):
                yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)

    def _save(self, tensor: Tensor) -> tuple[Tensor, int]:
        kept = self.kept.keep(tensor)
        return kept, n_writes(kept)

    def tap(self, output: Tensor, see: Callable[[Tensor], None]) -> Tensor:
        """What takes the output's place; `see` is called with its gradient in each backward pass that reaches it."""
        if output.requires_grad:  # its hook sees the gradient as of now, also where later code works in place
            self._hooks.append(output.register_hook(see))
            return output
        leaf = output.detach().requires_grad_()
        self._leaves.append(leaf)
        self._hooks.append(leaf.register_hook(see))
        return leaf.clone()  # no later code may work in place on a leaf

    def close(self) -> None:
        """Let go of the hooks: what they refer to often refers to the graph, which would be kept."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._leaves.clear()

    def backward(self, loss: Tensor) -> None:
        """Hand over the gradients of `loss`, from the last output to the first; the graph is kept."""
        try:
            loss.backward(retain_graph=True)
        finally:
            for leaf in self._leaves:
                leaf.grad = None


def _saved(kept: tuple[Tensor, int]) -> Tensor:
    tensor, n_then = kept
    if n_writes(tensor) != n_then:  # autograd's own check, which hooks turn off
        raise RuntimeError("one of the variables needed for gradient computation has been modified by an inplace operation")
    return tensor
