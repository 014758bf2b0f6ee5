"""What is in memory when: the activations of one forward pass, followed from operation to operation.

The model runs once. Every operation is seen with the memory that it reads and writes, so that for each activation is known
when it came to be and which operation reads it last: from the one to the other it is alive, as a planner of memory would have
it, however long Python holds on to it. Parameters and buffers are not counted. An elementwise operation writes over an input of
the same size that nobody reads later, as planners do; what a kernel takes for itself while it runs is not seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from mpsearch.graph.surgery import hooked
from mpsearch.graph.trace import Forward, evaluating
from mpsearch.layer import Activations, LayerSpec
from mpsearch.tree import tensors_in


@dataclass(eq=False)
class _Memory:
    """An activation's memory: its bytes, the operation that writes it first, and (operation, call) of those that read it."""

    nbytes: int
    born: int
    reads: list[tuple[int, int | None]] = field(default_factory=list)

    @property
    def last(self) -> int:
        return max([self.born, *(when for when, _ in self.reads)])


@dataclass(frozen=True)
class _Call:
    """A call of a searched layer: its input's memory (`None`: not an activation), bytes, values and tokens."""

    layer: int
    memory: _Memory | None
    nbytes: int
    values: int
    tokens: int


class _Recorder(TorchDispatchMode):
    """All operations in order; `caller` is the index of the layer's call in which they happen."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        super().__init__()
        # A weak reference keeps the address of a freed storage from being used again, and none of its bytes.
        held = [*model.parameters(), *model.buffers()]
        self.own = {StorageWeakRef(tensor.untyped_storage()) for tensor in held}
        self.memories: dict[StorageWeakRef, _Memory] = {}
        self.callers: list[int | None] = []
        self.over: list[int] = []  # bytes of the output that the operation can write over an input, where that dies
        self.candidates: list[list[_Memory]] = []  # and these inputs
        self.calls: list[_Call] = []
        self.caller: int | None = None
        for tensor in tensors_in(inputs):
            self.memories.setdefault(StorageWeakRef(tensor.untyped_storage()), _Memory(tensor.nbytes, 0))

    def of(self, tensor: Tensor) -> _Memory | None:
        key = StorageWeakRef(tensor.untyped_storage())
        if key in self.own:
            return None
        return self.memories.setdefault(key, _Memory(tensor.untyped_storage().nbytes(), len(self.callers)))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        read = [memory for tensor in tensors_in((args, kwargs or {})) if (memory := self.of(tensor))]
        result = func(*args, **(kwargs or {}))
        now = len(self.callers)
        for memory in read:
            memory.reads.append((now, self.caller))
        written = [m for tensor in tensors_in(result) if (m := self.of(tensor)) and m.born == now and m not in read]
        elementwise = torch.Tag.pointwise in func.tags and len(written) == 1
        self.over.append(written[0].nbytes if elementwise else 0)
        self.candidates.append(read if elementwise else [])
        self.callers.append(self.caller)
        return result


@torch.no_grad()
def measure_activations(model: nn.Module, forward: Forward, inputs: Any, layers: Sequence[LayerSpec]) -> tuple[LayerSpec, ...]:
    """`layers` with their `activations`, of `forward(model, inputs)`; `inputs` hold one sample.

    A layer's input is done with, so that it could be kept in another format alone, where no operation but those of the layers
    of its group reads it later.
    """
    recorder = _Recorder(model, inputs)
    outer: list[int | None] = []

    def enter(layer: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next(tensors_in((args, kwargs)))
            n_inner = 1 if isinstance(module, nn.Linear) else module.weight.dim() - 1  # as the engine quantizes it
            tokens = math.prod(x.shape[: max(x.dim() - n_inner, 0)])
            outer.append(recorder.caller)
            recorder.caller = len(recorder.calls)
            recorder.calls.append(_Call(layer, recorder.of(x), x.nbytes, x.numel(), tokens))

        return hook

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        recorder.caller = outer.pop()

    before = {model.get_submodule(name): enter(i) for i, layer in enumerate(layers) for name in layer.modules}
    with hooked(before.items(), [(module, leave) for module in before]), evaluating(model), recorder:
        output = forward(model, inputs)
    for tensor in tensors_in(output):  # what comes out is read by whoever called
        if memory := recorder.of(tensor):
            memory.reads.append((len(recorder.callers), None))
    return _summed_up(recorder, layers)


def _summed_up(recorder: _Recorder, layers: Sequence[LayerSpec]) -> tuple[LayerSpec, ...]:
    n = len(recorder.callers)
    change = np.zeros(n + 2, dtype=np.int64)
    for memory in recorder.memories.values():
        change[memory.born] += memory.nbytes
        change[memory.last + 1] -= memory.nbytes
    alive = change.cumsum()[:n]
    for now, (over, candidates) in enumerate(zip(recorder.over, recorder.candidates, strict=True)):
        if any(memory.last == now and memory.nbytes == over for memory in candidates):
            alive[now] -= over
    group = [layer.group for layer in layers]
    found = [dict.fromkeys(("live", "beside", "values", "tokens", "elsewhere"), 0) for _ in layers]

    def most(layer: int, what: str, value: int) -> None:
        found[layer][what] = max(found[layer][what], int(value))

    ends = {caller: now for now, caller in enumerate(recorder.callers) if caller is not None}
    freed = [_freed(call, ends.get(i, n), recorder, group) for i, call in enumerate(recorder.calls)]
    layer = 0
    for now, caller in enumerate(recorder.callers):
        if caller is None:
            most(layer, "elsewhere", alive[now])
            continue
        call = recorder.calls[caller]
        layer = call.layer
        there = call.memory is not None and call.memory.born <= now <= call.memory.last
        most(layer, "live", alive[now])
        most(layer, "beside", alive[now] - freed[caller] * there)
        most(layer, "values", call.values)
        most(layer, "tokens", call.tokens)
    return tuple(replace(layer, activations=Activations(**counts)) for layer, counts in zip(layers, found, strict=True))


def _freed(call: _Call, end: int, recorder: _Recorder, group: Sequence[str]) -> int:
    """Bytes of the call's input that need not be in float: none where somebody else reads it later."""
    if call.memory is None:
        return 0
    later = {caller for when, caller in call.memory.reads if when > end}
    if any(caller is None or group[recorder.calls[caller].layer] != group[call.layer] for caller in later):
        return 0
    return min(call.nbytes, call.memory.nbytes)
