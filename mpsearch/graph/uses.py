"""Calls of torch functions that read a weight, such as `F.linear(h, self.embedding.weight)`.

A use is any torch function called with the weight or a view of it. Outside of the modules that own the weight it may be any
function: it can be run again with another weight.
"""

from __future__ import annotations

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
    """One call of a torch function that reads a weight.

    Attributes
    ----------
    func, args, kwargs
        The function and its arguments.
    weight
        The parameter that is read.
    output
        The first floating-point tensor that the function returned.
    owner
        The module that owns the weight and was running; `None` outside of all modules that own it.
    """

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    weight: nn.Parameter
    output: Tensor
    owner: nn.Module | None

    @property
    def macs(self) -> int:
        """Multiply-accumulates of a product with the whole weight; 0 of any other function."""
        axis = CHANNEL_AXIS.get(self.func)
        if axis is None or not self.output.numel():
            return 0
        view = next(x for x in _floats_in((self.args, self.kwargs)) if _is_view(x, self.weight))
        return self.output.numel() * view.numel() // self.output.shape[axis] if view.numel() == self.weight.numel() else 0

    def run_with(self, weight: Tensor) -> Tensor:
        """The output with `weight`, of the parameter's shape and strides, in the parameter's place."""

        def swapped(x: Tensor) -> Tensor:
            if not _is_view(x, self.weight):
                return x
            return weight.as_strided(x.shape, x.stride(), x.storage_offset() - self.weight.storage_offset())

        args, kwargs = map_tensors(swapped, (self.args, dict(self.kwargs)))
        return next(_floats_in(self.func(*args, **kwargs)))


@contextmanager
def observe_uses(model: nn.Module, weights: Sequence[nn.Parameter], callback: Callable[[Use], Tensor | None]) -> Iterator[None]:
    """Call `callback(use)` for each use of `weights` while the block runs; a tensor that it returns replaces the output."""
    running: dict[int, list[nn.Module]] = {id(weight): [] for weight in weights}
    by_storage: dict[int, list[nn.Parameter]] = {}
    for weight in weights:
        by_storage.setdefault(weight.untyped_storage().data_ptr(), []).append(weight)

    def weight_of(x: Tensor) -> nn.Parameter | None:
        if x.layout != torch.strided or x.is_meta:
            return None
        return next((w for w in by_storage.get(x.untyped_storage().data_ptr(), ()) if _is_view(x, w)), None)

    def observe(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        read = [weight for x in _floats_in((args, kwargs)) if (weight := weight_of(x)) is not None]
        first = next(_floats_in(output), None) if read else None
        # A view is no use of its own, and what is new takes no values from the weight.
        if first is None or weight_of(first) is not None or func is torch.empty_like:
            return output
        weight = next((weight for weight in read if not running[id(weight)]), read[0])
        replaced = callback(Use(func, args, kwargs, weight, first, next(reversed(running[id(weight)]), None)))
        return output if replaced is None else map_tensors(lambda x: replaced if x is first else x, output)

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        running[id(module._parameters["weight"])].append(module)

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if calls := running[id(module._parameters["weight"])]:  # none where another hook raised before `enter` ran
            calls.pop()

    owners = [m for m in model.modules() if id(m._parameters.get("weight")) in running and kind_of(m) is not None]
    with hooked([(m, enter) for m in owners], [(m, leave) for m in owners], always_call=True), _Observer(observe):
        yield


class _Observer(TorchFunctionMode):
    """Call `callback(func, args, kwargs, output)` for every torch function; what it returns replaces the output."""

    def __init__(self, callback: Callable[..., Any]) -> None:
        super().__init__()
        self.callback = callback

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.callback(func, args, kwargs or {}, func(*args, **(kwargs or {})))


def owners_outside(model: nn.Module, weight: nn.Parameter, modules: Sequence[nn.Module]) -> list[tuple[nn.Module, str]]:
    """(module, parameter name) of all modules but `modules` that own the weight."""
    others = (module for module in model.modules() if module not in modules)
    return [(module, name) for module in others for name, parameter in module._parameters.items() if parameter is weight]


def _floats_in(value: Any) -> Iterator[Tensor]:
    return (x for x in tensors_in(value) if x.is_floating_point())


def _is_view(x: Tensor, weight: Tensor) -> bool:
    """Whether x is the weight or a view of it."""
    if x is weight:
        return True
    if x.layout != torch.strided or x.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
        return False
    return 0 <= x.data_ptr() - weight.data_ptr() < max(weight.nbytes, 1)
