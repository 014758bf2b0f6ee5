"""Peak memory of the activations: one forward pass, followed from operation to operation.

The model runs once. Every operation is recorded with the memory that it reads and writes. An activation is alive from the
operation that creates it to the last one that reads it, as a memory planner would have it, however long Python holds on to it.
Parameters and buffers are not counted. An elementwise operation writes over an input of the same size that nothing reads later,
as planners do; the temporary memory of a kernel is not seen.
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
    """The memory of an activation: its bytes, the operation that creates it, and the (operation, layer call) that read it."""

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
    """Record all operations in order; `caller` is the index of the layer call in which they run."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: PyTorch would import its compiler, more than a second, only to keep it out of `__torch_dispatch__`."""
        return False

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        super().__init__()
        # A weak reference keeps the address of a freed storage from being used again, and none of its bytes.
        constants = [*model.parameters(), *model.buffers()]
        self.constants = {StorageWeakRef(tensor.untyped_storage()) for tensor in constants}
        self.memories: dict[StorageWeakRef, _Memory] = {}
        self.callers: list[int | None] = []
        # Bytes of an elementwise operation's output, and its inputs: it can write over one that nothing reads later.
        self.reusable: list[tuple[int, list[_Memory]]] = []
        self.calls: list[_Call] = []
        self.caller: int | None = None
        for tensor in tensors_in(inputs):
            self.memories.setdefault(StorageWeakRef(tensor.untyped_storage()), _Memory(tensor.nbytes, 0))

    def memory_of(self, tensor: Tensor) -> _Memory | None:
        key = StorageWeakRef(tensor.untyped_storage())
        if key in self.constants:
            return None
        return self.memories.setdefault(key, _Memory(tensor.untyped_storage().nbytes(), len(self.callers)))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        read = [memory for tensor in tensors_in((args, kwargs or {})) if (memory := self.memory_of(tensor))]
        result = func(*args, **(kwargs or {}))
        now = len(self.callers)
        for memory in read:
            memory.reads.append((now, self.caller))
        written = [m for tensor in tensors_in(result) if (m := self.memory_of(tensor)) and m.born == now and m not in read]
        elementwise = torch.Tag.pointwise in func.tags and len(written) == 1
        self.reusable.append((written[0].nbytes, read) if elementwise else (0, []))
        self.callers.append(self.caller)
        return result


@torch.no_grad()
def measure_activations(model: nn.Module, forward: Forward, inputs: Any, layers: Sequence[LayerSpec]) -> tuple[LayerSpec, ...]:
    """`layers` with their `activations`, of `forward(model, inputs)`; `inputs` hold one sample.

    A layer's input can be kept in another format alone where no operation but those of the layers of its group reads it later.
    """
    recorder = _Recorder(model, inputs)
    outer: list[int | None] = []
    indices = {model.get_submodule(name): i for i, layer in enumerate(layers) for name in layer.modules}

    def enter(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next(tensors_in((args, kwargs)))
        n_inner = 1 if isinstance(module, nn.Linear) else module.weight.dim() - 1  # as the engine quantizes it
        tokens = math.prod(x.shape[: max(x.dim() - n_inner, 0)])
        outer.append(recorder.caller)
        recorder.caller = len(recorder.calls)
        recorder.calls.append(_Call(indices[module], recorder.memory_of(x), x.nbytes, x.numel(), tokens))

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        recorder.caller = outer.pop()

    with hooked([(m, enter) for m in indices], [(m, leave) for m in indices]), evaluating(model), recorder:
        output = forward(model, inputs)
    for tensor in tensors_in(output):  # read by the caller
        if memory := recorder.memory_of(tensor):
            memory.reads.append((len(recorder.callers), None))
    return _with_activations(recorder, layers)


def _with_activations(recorder: _Recorder, layers: Sequence[LayerSpec]) -> tuple[LayerSpec, ...]:
    alive = _alive_bytes(recorder)
    most = [dict.fromkeys(("live", "without_input", "values", "tokens", "until_next"), 0) for _ in layers]

    def raise_to(layer: int, **values: int) -> None:
        for name, value in values.items():
            most[layer][name] = max(most[layer][name], int(value))

    ends = {caller: now for now, caller in enumerate(recorder.callers) if caller is not None}
    freed = [_freed_bytes(call, ends.get(i, len(alive)), recorder, layers) for i, call in enumerate(recorder.calls)]
    layer = 0
    for now, caller in enumerate(recorder.callers):
        if caller is None:
            raise_to(layer, until_next=alive[now])
            continue
        call = recorder.calls[caller]
        layer = call.layer
        is_alive = call.memory is not None and call.memory.born <= now <= call.memory.last
        without_input = alive[now] - freed[caller] * is_alive
        raise_to(layer, live=alive[now], without_input=without_input, values=call.values, tokens=call.tokens)
    return tuple(replace(layer, activations=Activations(**values)) for layer, values in zip(layers, most, strict=True))


def _alive_bytes(recorder: _Recorder) -> np.ndarray:
    """int64: bytes of the activations that are alive at each operation."""
    n = len(recorder.callers)
    change = np.zeros(n + 2, dtype=np.int64)
    for memory in recorder.memories.values():
        change[memory.born] += memory.nbytes
        change[memory.last + 1] -= memory.nbytes
    alive = change.cumsum()[:n]
    for now, (nbytes, inputs) in enumerate(recorder.reusable):
        if any(memory.last == now and memory.nbytes == nbytes for memory in inputs):
            alive[now] -= nbytes
    return alive


def _freed_bytes(call: _Call, end: int, recorder: _Recorder, layers: Sequence[LayerSpec]) -> int:
    """Bytes of the call's input that need not be in float: 0 where another group's layer, or no layer, reads it later."""
    if call.memory is None:
        return 0
    later = {caller for when, caller in call.memory.reads if when > end}
    if any(caller is None or layers[recorder.calls[caller].layer].group != layers[call.layer].group for caller in later):
        return 0
    return min(call.nbytes, call.memory.nbytes)
