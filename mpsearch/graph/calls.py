"""Find where a forward pass could start in its middle: runs of modules in which each takes only the output of the one before.

The calls of a model form a tree. Neighbouring calls in it make a *run* as long as the tensor that one returns is the very object
that the next one takes first: residual blocks in a row, the layers of a transformer. Where the output of a run's j-th module is
known, none of the first j has to run. Code that reads a value between its calls, as in `if x.mean() > 0`, may branch by it, so
that its calls make no run. Whether a run can be skipped (a U-Net reads an inner output again, a module may keep something for
later) only running shows: `engine/prefix_cache.py` checks before it relies on one.
"""

from __future__ import annotations

import itertools
import math
import weakref
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mpsearch.graph.surgery import hooked
from mpsearch.graph.trace import Forward
from mpsearch.layer import LayerGroup
from mpsearch.tree import tensors_in


@dataclass(eq=False)
class Call:
    """One call of a module: the calls within it, by runs, and how many groups had been read `before` and `after` it."""

    module: nn.Module
    begin: int
    end: int = 0
    before: int = 0
    after: int = 0
    can_be_kept: bool = False  # its output is a plain tensor that nothing writes into later
    operations: int = 0  # a hash of what its own code runs, in order
    branches: bool = False  # its own code reads values that depend on weights, and may branch by them
    runs: list[list[Call]] = field(default_factory=list)
    children: list[Call] = field(default_factory=list)
    source: tuple[Any, int] = (None, 0)  # the first argument and its version: written into, it is another
    result: tuple[Any, int] = (None, 0)


@torch.no_grad()
def find_runs(
    model: nn.Module, forward: Forward, inputs: Any, groups: Sequence[LayerGroup]
) -> tuple[list[list[Call]], tuple[str, ...]]:
    """The outermost runs of `forward(model, inputs)`, and the groups' names in the order in which they are first read.

    A compiled or scripted model has no runs: its modules are not called one by one.
    """
    modules = dict(model.named_modules())
    if any(_is_compiled(module) for module in modules.values()):
        return [], tuple(group.name for group in groups)
    weights = [weight for group in groups for weight in _weights_of(group, modules)]
    root, calls, _ = _record(model, forward, inputs, weights)
    begins = _first_reads(modules, calls, groups)
    order = sorted(begins, key=begins.__getitem__)
    times = [begins[name] for name in order]
    n_calls = Counter(call.module for call in calls)
    once = {module for module, n in n_calls.items() if n == 1 and "_call_impl" not in vars(module)}
    for call in calls:
        tensor, written = call.result
        call.can_be_kept = call.module in once and written >= 0 and tensor._version == written
        call.before, call.after = bisect_left(times, call.begin), bisect_left(times, call.end)
    for call in (root, *calls):
        for child in call.children:
            last = call.runs[-1][-1] if call.runs else root
            if _is_linked(last, child) and not call.branches and {last.module, child.module} <= once:
                call.runs[-1].append(child)
            else:
                call.runs.append([child])
    for call in calls:
        call.source = call.result = (None, 0)
    return root.runs, tuple(order)


@dataclass
class Path:
    """The way of one batch through the model; another batch may take another.

    Attributes
    ----------
    own
        Of each module that is called once (`None`: of the caller of the model): the modules that it calls, which of these take
        the output of the one before, and a hash of the operations that its own code runs.
    parents
        The module that calls each of these modules.
    until
        How many groups of the order have been read when each module returns.
    """

    own: dict[nn.Module | None, tuple[Any, ...]] = field(default_factory=dict)
    parents: dict[nn.Module, nn.Module | None] = field(default_factory=dict)
    until: dict[nn.Module, int] = field(default_factory=dict)

    def has_run(self, run: Sequence[Call], other: Path) -> bool:
        """Whether the calls, a run on the `other` path, are one on this path too, and read no further group here."""
        parent = other.parents.get(run[0].module)
        alike = len(run) == 1 or (parent in self.own and self.own[parent] == other.own.get(parent))
        return alike and all(self.until.get(call.module, math.inf) <= call.after for call in run)


@torch.no_grad()
def follow(
    model: nn.Module, forward: Forward, inputs: Any, groups: Sequence[LayerGroup], order: Sequence[str]
) -> tuple[Any, Path]:
    """The output of `forward(model, inputs)` and its path; `order` is that of `find_runs`."""
    root, calls, output = _record(model, forward, inputs)
    begins = _first_reads(dict(model.named_modules()), calls, groups)
    n_calls, path = Counter(call.module for call in calls), Path()
    for call in (root, *calls):
        linked = [False, *(_is_linked(last, child) for last, child in itertools.pairwise(call.children))]
        own = (*((child.module, link) for child, link in zip(call.children, linked, strict=False)), call.operations)
        if call is root or n_calls[call.module] == 1:
            path.own[None if call is root else call.module] = own
        for child in call.children:
            path.parents[child.module] = None if call is root else call.module
    for call in calls:
        if n_calls[call.module] == 1:
            path.until[call.module] = max((i for i, name in enumerate(order, start=1) if begins[name] < call.end), default=0)
    return output, path


def _is_linked(last: Call, call: Call) -> bool:
    return last.result[0] is call.source[0] and last.result[1] == call.source[1] >= 0


def version(value: Any) -> int:
    """How often the tensor was written into; -1 for anything but a plain tensor that counts this."""
    plain = type(value) is Tensor and value.layout == torch.strided and not value.is_inference() and not value.requires_grad
    return value._version if plain else -1


def owned_by(modules: Sequence[nn.Module]) -> list[nn.Parameter]:
    """Weights and biases of the modules, each once."""
    parameters = (module._parameters.get(name) for module in modules for name in ("weight", "bias"))
    return list({id(parameter): parameter for parameter in parameters if parameter is not None}.values())


def _weights_of(group: LayerGroup, modules: Mapping[str, nn.Module]) -> list[nn.Parameter]:
    return owned_by([modules[name] for layer in group.layers for name in layer.modules])


def _record(model: nn.Module, forward: Forward, inputs: Any, weights: Sequence[Tensor] = ()) -> tuple[Call, list[Call], Any]:
    """The root of the calls, all of them in order, and the output. Calls that branch by values that `weights` make are marked."""
    clock = itertools.count()
    root, calls = Call(model, next(clock)), []
    stack = [root]

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        source = args[0] if args else None
        call = Call(module, next(clock), source=(source, version(source)))
        stack[-1].children.append(call)
        stack.append(call)
        calls.append(call)

    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call = stack.pop()
        call.end, call.result = next(clock), (output, version(output))

    modules = list(model.modules())
    # Prepended, to see the input before a hook that quantizes it.
    with hooked([(m, enter) for m in modules], [(m, leave) for m in modules], prepend=True), _Operations(weights, stack):
        output = forward(model, inputs)
    return root, calls, output


class _Operations(TorchDispatchMode):
    """Record for each call the operations of its own code, and whether that makes a Python number of a value from `weights`."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: PyTorch would import its compiler, more than a second, only to keep it out of `__torch_dispatch__`."""
        return False

    def __init__(self, weights: Sequence[Tensor], stack: Sequence[Call]) -> None:
        super().__init__()
        self._stack = stack
        self._depends = {id(weight): weakref.ref(weight) for weight in weights}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self._stack[-1].operations = hash((self._stack[-1].operations, func))
        # An id is a tensor's own while that lives.
        if any(x is self._depends.get(id(x), lambda: None)() for x in tensors_in((args, kwargs))):
            if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
                self._stack[-1].branches = True
            self._depends.update((id(x), weakref.ref(x)) for x in tensors_in(output))
        return output


def _first_reads(modules: Mapping[str, nn.Module], calls: Sequence[Call], groups: Sequence[LayerGroup]) -> dict[str, int]:
    """Group -> when the first module was called that owns one of its weights or biases, which may be shared with other layers.

    The parameters of an owner that was not called may be read by the module that it is part of.
    """
    called: dict[nn.Module, int] = {}
    for call in calls:
        called.setdefault(call.module, call.begin)
    names = {module: name for name, module in modules.items()}
    owners: dict[int, list[nn.Module]] = {}
    for module in names:
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), []).append(module)

    def begin(module: nn.Module) -> int:
        name = names[module]
        while modules[name] not in called and name:
            name = name.rpartition(".")[0]
        return called.get(modules[name], 0)

    return {
        group.name: min(begin(owner) for parameter in _weights_of(group, modules) for owner in owners[id(parameter)])
        for group in groups
    }


def _is_compiled(module: nn.Module) -> bool:
    return (
        isinstance(module, torch.jit.ScriptModule)
        or hasattr(module, "_orig_mod")
        or getattr(module, "_compiled_call_impl", None) is not None
    )
