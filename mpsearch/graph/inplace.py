"""Networks that write into a layer's input after the layer has read it, as `x += self.fc(x)` does.

What is kept of a call, for a backward pass or to run the layer again, would then be another input. Those layers are given a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.tree import map_tensors, tensors_in


@torch.no_grad()
def overwritten_inputs(model: nn.Module, names: Sequence[str], run: Callable[[], Any]) -> tuple[str, ...]:
    """Those of the modules `names` whose input is written into after their call, while `run()` runs the model once."""
    seen: dict[str, list[tuple[Tensor, int]]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            found = [x for x in tensors_in((args, kwargs)) if not x.is_inference()]
            seen.setdefault(name, []).extend((x, x._version) for x in found)

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(watch(name), with_kwargs=True) for name in names]
    try:
        run()
    finally:
        for handle in hooks:
            handle.remove()
    return tuple(name for name, inputs in seen.items() if any(x._version != version for x, version in inputs))


@contextmanager
def cloned_inputs(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """While the block runs, the modules `names` read a copy of their input."""

    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return map_tensors(Tensor.clone, args), map_tensors(Tensor.clone, kwargs)

    # Before other hooks: what these see is the copy.
    handles = [model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True, prepend=True) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
