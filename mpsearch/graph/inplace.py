"""Networks that write into a layer's input after the layer has read it, as `x += self.fc(x)` does.

What is kept of a call, for a backward pass or to run the layer again, would then be another input: such layers get a copy
(`mpsearch.graph.surgery.cloned_inputs`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.graph.surgery import hooked
from mpsearch.tree import tensors_in


@torch.no_grad()
def overwritten_inputs(model: nn.Module, names: Sequence[str], run: Callable[[], Any]) -> tuple[str, ...]:
    """The modules among `names` whose input is written into after their call, while `run()` runs the model once."""
    modules = {model.get_submodule(name): name for name in names}
    versions: dict[str, list[tuple[Tensor, int]]] = {}

    def record(module: nn.Module, args: Any, kwargs: Any) -> None:
        tensors = [x for x in tensors_in((args, kwargs)) if not x.is_inference()]
        versions.setdefault(modules[module], []).extend((x, x._version) for x in tensors)

    with hooked([(module, record) for module in modules]):
        run()
    return tuple(name for name, inputs in versions.items() if any(x._version != version for x, version in inputs))
