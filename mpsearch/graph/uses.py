"""Reads of a layer's weight outside of the modules that own it, as in `F.linear(h, self.embedding.weight)`.

A use is any torch function called with the weight or a view of it while none of its own modules runs. Whatever the function, it
can be run again with another weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mpsearch.graph.surgery import hooked
from mpsearch.layer import kind_of
from mpsearch.tree import map_tensors, tensors_in

# The axis of output channels, of functions that are products with the weight.
MATMULS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
CHANNEL_AXIS: dict[Any, int] = {
    **dict.fromkeys((F.linear, torch.addmm, *MATMULS), -1),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), 1),
}


@dataclass(frozen=True)
class Use:
    """One call of `func`; `weight` is the parameter, `output` the first floating-point tensor that was returned."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    weight: nn.Parameter
    output: Tensor

    @property
    def macs(self) -> int:
        """Multiply-accumulates of a product with the whole weight; 0 of any other function."""
        axis = CHANNEL_AXIS.get(self.func)
        if axis is None or not self.output.numel():
            return 0
        view = next(x for x in _tensors((self.args, self.kwargs)) if _reads(x, self.weight))
        return self.output.numel() * view.numel() // self.output.shape[axis] if view.numel() == self.weight.numel() else 0

    def run_with(self, weight: Tensor) -> Tensor:
        """The output with `weight`, of the parameter's shape and strides, in its place."""

        def swapped(x: Tensor) -> Tensor:
            if not _reads(x, self.weight):
                return x
            return weight.as_strided(x.shape, x.stride(), x.storage_offset() - self.weight.storage_offset())

        args, kwargs = map_tensors(swapped, (self.args, dict(self.kwargs)))
        return next(_tensors(self.func(*args, **kwargs)))


See = Callable[[str, Use], Tensor | None]


@contextmanager
def watched_uses(model: nn.Module, weights: Mapping[str, nn.Parameter], see: See) -> Iterator[None]:
    """While the block runs, `see(name, use)` gets each use of `weights`; what it returns takes the output's place."""
    running: Counter[str] = Counter()
    names = {id(weight): name for name, weight in weights.items()}
    by_storage: dict[int, list[str]] = {}
    for name, weight in weights.items():
        by_storage.setdefault(weight.untyped_storage().data_ptr(), []).append(name)

    def read(x: Tensor) -> str | None:
        if x.layout != torch.strided or x.is_meta:
            return None
        candidates = by_storage.get(x.untyped_storage().data_ptr(), ())
        return next((name for name in candidates if _reads(x, weights[name])), None)

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = func(*args, **(kwargs or {}))
            of = next((found for x in _tensors((args, kwargs)) if (found := read(x)) is not None and not running[found]), None)
            first = next(_tensors(output), None)
            # A view is no use of its own, and what is new takes no values from the weight.
            if of is None or first is None or read(first) is not None or func is torch.empty_like:
                return output
            seen = see(of, Use(func, args, kwargs or {}, weights[of], first))
            return output if seen is None else map_tensors(lambda x: seen if x is first else x, output)

    owners = {
        module: owned
        for module in model.modules()
        if kind_of(module) is not None and (owned := names.get(id(module._parameters.get("weight")))) is not None
    }

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        running[owners[module]] += 1

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        running[owners[module]] -= 1

    with hooked([(m, enter) for m in owners], [(m, leave) for m in owners], always_call=True), Watch():
        yield


def holders(model: nn.Module, weight: nn.Parameter, modules: Sequence[nn.Module]) -> list[tuple[nn.Module, str]]:
    """(module, parameter name) of all that hold the weight, but for `modules`."""
    others = (module for module in model.modules() if module not in modules)
    return [(module, name) for module in others for name, found in module._parameters.items() if found is weight]


def _tensors(value: Any) -> Iterator[Tensor]:
    return (x for x in tensors_in(value) if x.is_floating_point())


def _reads(x: Tensor, weight: Tensor) -> bool:
    """Whether x is the weight or a view of it."""
    if x is weight:
        return True
    if x.layout != torch.strided or x.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
        return False
    return 0 <= x.data_ptr() - weight.data_ptr() < max(weight.nbytes, 1)
