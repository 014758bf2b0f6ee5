"""Temporary changes to a model: all code that alters a network it did not build does so by one of these three mechanisms.

1. Swapped parameter data (`swapped_data`): the parameters stay the same objects and hold other values.
2. Hooks around a module's forward (`hooked`, and on top of it `quantize_input` and `cloned_inputs`).
3. Replaced modules and calls: another module under the same name (`replace_module`), another class, parameters or attributes of
   one module (`snapshot`), another function for a module's next call (`intercepted`).

Each is a context manager, or a function that returns what undoes it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from mpsearch.schemes.base import QuantizedTensor
from mpsearch.tree import map_tensors

Undo = Callable[[], None]
Hook = Callable[..., Any]
Hooks = Iterable[tuple[nn.Module, Hook]]
Handler = Callable[..., Any]


@contextmanager
def swapped_data(values: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """While the block runs, each parameter of the (parameter, data) pairs holds that data; of repeated parameters the last."""
    saved: list[tuple[Tensor, Tensor]] = []
    try:
        for parameter, data in values:
            saved.append((parameter, parameter.data))
            parameter.data = data
        yield
    finally:
        for parameter, data in reversed(saved):
            parameter.data = data


@contextmanager
def hooked(before: Hooks = (), after: Hooks = (), *, prepend: bool = False, always_call: bool = False) -> Iterator[None]:
    """While the block runs, each module's hook is called before or after its forward.

    Parameters
    ----------
    before
        (module, hook) pairs. `hook(module, args, kwargs)` returns `None` or the (args, kwargs) to use instead.
    after
        (module, hook) pairs. `hook(module, args, kwargs, output)` returns `None` or the output to use instead.
    prepend
        Whether `before` hooks are called before those that the module already has.
    always_call
        Whether `after` hooks are called, with the output `None`, if the forward raises.
    """
    with ExitStack() as undo:
        for module, hook in before:
            undo.callback(module.register_forward_pre_hook(hook, with_kwargs=True, prepend=prepend).remove)
        for module, hook in after:
            undo.callback(module.register_forward_hook(hook, with_kwargs=True, always_call=always_call).remove)
        yield


def quantize_input(module: nn.Module, weight: QuantizedTensor, quantize: Callable[[Tensor, int], Tensor] | None = None) -> Undo:
    """Quantize the module's input before each of its calls, as the scheme of its quantized weight says; returns the undo.

    Nothing changes if the scheme leaves inputs in float, or if the module is an embedding. `quantize(x, n_inner)`, where
    `n_inner` is the number of dimensions of one token or image, replaces the scheme's own function, as in training.
    """
    input_format = weight.scheme.input_format
    if input_format is None or isinstance(module, nn.Embedding):
        return lambda: None
    n_inner = 1 if isinstance(module, nn.Linear) else len(weight.shape) - 1  # of a convolution: channels and space
    round_input = quantize or (lambda x, n: input_format.fake_quantize(x, n, weight.input_params))

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (round_input(args[0], n_inner), *args[1:]), kwargs
        return args, {**kwargs, "input": round_input(kwargs["input"], n_inner)}

    return module.register_forward_pre_hook(hook, with_kwargs=True).remove


@contextmanager
def cloned_inputs(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """While the block runs, the modules `names` get a copy of their input, which their other hooks see too."""

    def clone(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return map_tensors(Tensor.clone, args), map_tensors(Tensor.clone, kwargs)

    with hooked([(model.get_submodule(name), clone) for name in names], prepend=True):
        yield


def replace_module(model: nn.Module, name: str, module: nn.Module) -> Undo:
    """Put `module` in the place of the submodule `name`; returns the undo."""
    undo = functools.partial(model.set_submodule, name, model.get_submodule(name))
    model.set_submodule(name, module)
    return undo


def snapshot(module: nn.Module) -> Undo:
    """What restores the module's class, attributes, parameters, buffers and submodules (not their values), in their order."""
    cls, attributes = type(module), dict(vars(module))
    registries = [attributes[name] for name in ("_parameters", "_buffers", "_modules")]
    contents = [dict(registry) for registry in registries]

    def restore() -> None:
        module.__class__ = cls
        vars(module).clear()
        vars(module).update(attributes)
        for registry, content in zip(registries, contents, strict=True):
            registry.clear()
            registry.update(content)

    return restore


@contextmanager
def intercepted(handlers: Mapping[nn.Module, Handler]) -> Iterator[None]:
    """While the block runs, the next call of each module calls its handler instead, without hooks; later calls are its own."""

    def once(module: nn.Module, handler: Handler) -> Handler:
        def call(*args: Any, **kwargs: Any) -> Any:
            del vars(module)["_call_impl"]
            return handler(*args, **kwargs)

        return call

    try:
        for module, handler in handlers.items():
            vars(module)["_call_impl"] = once(module, handler)
        yield
    finally:
        for module in handlers:
            vars(module).pop("_call_impl", None)
