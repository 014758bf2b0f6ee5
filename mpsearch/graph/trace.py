"""Find the layers of a model by running it once.

The module tree alone does not tell the order of the layers, how often each is used, and which are never reached.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.errors import InputError
from mpsearch.graph.surgery import hooked
from mpsearch.graph.uses import Use, observe_uses
from mpsearch.layer import LayerSpec, kind_of, rows_shape
from mpsearch.tree import map_tensors, tensors_in

Forward = Callable[[nn.Module, Any], Any]


def trace_layers(model: nn.Module, forward: Forward, inputs: Any) -> tuple[LayerSpec, ...]:
    """The quantizable layers (`layer.KINDS`) that `forward(model, inputs)` reaches, in the order of their first call or use.

    A weight that several modules own is one layer under the name of the first one called; its `modules` are those called, then
    those not. A weight that other code multiplies by (`F.linear(h, embedding.weight)`, `mpsearch.graph.uses`) is reached too; the
    input of such a product is not quantized. Every layer is its own group. `macs` are those of one sample, summed over all calls
    and uses; an embedding's calls have 0.

    Left out, so that they stay float: layers that are never reached (as `out_proj` of a subclass of `nn.MultiheadAttention`), and
    layers whose `weight` is computed from other parameters at each call (`nn.utils.parametrize`, `weight_norm`). The model runs
    in eval mode without gradients and is left as it was.

    Parameters
    ----------
    inputs
        A batch of n samples: a tensor, or a tuple, list or mapping that holds tensors. n is the first size of the first tensor.

    Raises
    ------
    InputError
        For a weight that is not float32, for inputs without a tensor, and where no layer is called.
    """
    modules: dict[Any, str] = {module: name for name, module in model.named_modules() if _owns_weight(module)}
    for module, name in modules.items():
        if module.weight.dtype != torch.float32:
            raise InputError(
                f"The weight of layer '{name}' is {module.weight.dtype}; layers are quantized from float32. "
                "Call model.float() before, or load a float32 checkpoint."
            )
    n_samples = batch_length(inputs)
    macs: Counter[Any] = Counter()
    first_owner: dict[int, Any] = {}
    for module in modules:
        first_owner.setdefault(id(module.weight), module)

    def count_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        macs[module] += _macs(module, (*args, kwargs), output)

    def count_use(use: Use) -> None:
        if use.owner is None and use.macs:
            macs[first_owner[id(use.weight)]] += use.macs

    weights = [module.weight for module in first_owner.values()]
    observed = hooked(after=[(module, count_call) for module in modules])
    with observed, observe_uses(model, weights, count_use), evaluating(model), torch.no_grad():
        forward(model, inputs)
    owners: dict[int, list[nn.Module]] = {}
    for module in [*macs, *(module for module in modules if module not in macs)]:
        owners.setdefault(id(module.weight), []).append(module)
    layers = tuple(_layer(tied, modules, macs, n_samples) for tied in owners.values() if tied[0] in macs)
    if not layers:
        raise InputError(
            f"No quantizable layer was called in {type(model).__name__} ({len(modules)} are in it). "
            "The search needs at least one Linear, Conv, ConvTranspose or Embedding module with a plain weight."
        )
    return layers


def _layer(tied: list[nn.Module], names: Mapping[nn.Module, str], macs: Counter[nn.Module], n_samples: int) -> LayerSpec:
    first, name = tied[0], names[tied[0]]
    return LayerSpec(
        name=name,
        kind=str(kind_of(first)),
        shape=rows_shape(first),
        macs=sum(macs[module] for module in tied) // n_samples,
        group=name,
        modules=tuple(names[module] for module in tied),
    )


def _owns_weight(module: nn.Module) -> bool:
    return kind_of(module) is not None and isinstance(module._parameters.get("weight"), nn.Parameter)


def _macs(module: Any, inputs: Any, output: Any) -> int:
    """Multiply-accumulates of one call, over its whole batch."""
    if isinstance(module, nn.Embedding):
        return 0
    # Each output of a convolution or linear layer sums over one row of weights; in a transposed convolution it is each
    # input that is spread over one slice of them. Either way: weights / first size of the module's own layout.
    per_element = math.prod(module.weight.shape[1:])
    is_transposed = isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
    return next(tensors_in(inputs if is_transposed else output)).numel() * per_element


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode while the block runs; every module returns to its own mode afterwards."""
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in was_training.items():
            module.training = training


def batch_length(inputs: Any) -> int:
    """The number of samples in a batch of inputs: the first size of the first tensor that has one."""
    length = next((len(tensor) for tensor in tensors_in(inputs) if tensor.ndim), 0)
    if not length:
        raise InputError(f"The inputs ({type(inputs).__name__}) hold no tensor with samples in it, so there is nothing to run.")
    return length


def first_samples(inputs: Any, n: int) -> Any:
    """The first `n` samples of a batch of inputs; tensors of another length than the batch's stay whole."""
    length = batch_length(inputs)
    return map_tensors(lambda tensor: tensor[:n] if tensor.ndim and len(tensor) == length else tensor, inputs)


@torch.no_grad()
def overwritten_inputs(model: nn.Module, names: Sequence[str], run: Callable[[], Any]) -> tuple[str, ...]:
    """The modules among `names` whose input is written into after their call, as in `x += self.fc(x)`.

    Whatever is kept of such a call, for a backward pass or to run the layer again, would be another input: these modules get a
    copy (`surgery.cloned_inputs`). `run()` runs the model once.
    """
    modules = {model.get_submodule(name): name for name in names}
    versions: dict[str, list[tuple[Tensor, int]]] = {}

    def record(module: nn.Module, args: Any, kwargs: Any) -> None:
        tensors = [x for x in tensors_in((args, kwargs)) if not x.is_inference()]
        versions.setdefault(modules[module], []).extend((x, x._version) for x in tensors)

    with hooked([(module, record) for module in modules]):
        run()
    return tuple(name for name, inputs in versions.items() if any(x._version != version for x, version in inputs))
