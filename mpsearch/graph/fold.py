"""Fold batch norms into the layers before them, so that the weights that run at inference are quantized.

In eval mode a batch norm is a per-channel scale and shift, y = gamma (x - mean) / sqrt(var + eps) + beta. Multiplied into the
rows and the bias of the layer before, it costs nothing; left alone it would hide from the quantizer how much each row of the
weight counts.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.backends import cudnn
from torch.nn.modules.batchnorm import _BatchNorm

from mpsearch.errors import InputError, check_memory, did_you_mean
from mpsearch.graph.surgery import Undo, hooked, replace_module
from mpsearch.layer import from_rows, kind_of, rows_shape, set_values, weight_rows

Forward = Callable[[nn.Module, Any], Any]
Pair = tuple[str, str]

# Largest change of an output, as a share of the largest output, that folding may cause: rounding in float32 makes 5e-7 on a
# ResNet-56 and 1e-6 on an EfficientNet-B0, a batch norm folded wrongly changes the output by its own size.
TOLERANCE = 1e-4


def fold_batch_norms(model: nn.Module, forward: Forward, *batches: Any) -> tuple[Pair, ...]:
    """Fold in place every batch norm that directly follows a layer.

    A batch norm follows a layer where the layer's output tensor is its input. Folded are those that are each called once, keep
    running statistics and share no parameters with other modules; the layer gains a bias where it had none, and `nn.Identity`
    takes the batch norm's place (a batch norm that holds modules to apply after it, as timm's BatchNormAct2d does, leaves these).
    The outputs for all `batches` must stay the same to within `TOLERANCE`. Pairs for which they do not, as where the layer's
    output has other readers too, perhaps only for some inputs, are undone bit for bit.

    Parameters
    ----------
    forward
        `forward(model, inputs)` returns the output tensor.
    batches
        Inputs; the layers and batch norms are found on the first.

    Returns
    -------
    tuple of (str, str)
        (layer name, batch norm name) in forward order.

    Raises
    ------
    InputError
        For a model in training mode: there a batch norm depends on the batch, and running would change it.
    """
    training = next((name for name, module in model.named_modules() if module.training), None)
    if training is not None:
        where = f"module '{training}'" if training else type(model).__name__
        raise InputError(f"Batch norms are folded in eval mode, and {where} is in training mode. Call model.eval() before.")
    # cuDNN may round a convolution's inputs to 10 bits (TF32), which would dominate the differences.
    with torch.no_grad(), cudnn.flags(enabled=cudnn.enabled, allow_tf32=False):
        first, followers = _find_followers(model, forward, batches[0])
        uses = uses_of_tensors(model)
        pairs = [pair for pair in followers if _is_foldable(model, *pair, uses)]
        before = [first, *(forward(model, inputs) for inputs in batches[1:])] if pairs else []

        def is_unchanged() -> bool:
            try:
                outputs = zip(batches, before, strict=True)
                return all((forward(model, x) - y).abs().max() <= TOLERANCE * y.abs().max() for x, y in outputs)
            except Exception as error:  # it ran before folding: the model's code reads a batch norm that is gone
                check_memory(error)
                return False

        return tuple(_fold_exact(model, pairs, is_unchanged)) if pairs else ()


def _fold_exact(model: nn.Module, pairs: Sequence[Pair], is_unchanged: Callable[[], bool]) -> list[Pair]:
    """Fold `pairs` and return them; where that changes the outputs, undo them and try each half."""
    undo = [_fold(model, *pair) for pair in pairs]
    if is_unchanged():
        return list(pairs)
    for restore in reversed(undo):
        restore()
    half = len(pairs) // 2
    return [pair for part in (pairs[:half], pairs[half:]) for pair in _fold_exact(model, part, is_unchanged)] if half else []


def apply_folds(model: nn.Module, pairs: Iterable[Pair]) -> None:
    """Fold in place the given (layer name, batch norm name) pairs, as `fold_batch_norms` returned them, without running.

    Raises `InputError`, with the model unchanged, where a name is unknown or a pair cannot be folded.
    """
    pairs = [(layer, batch_norm) for layer, batch_norm in pairs]
    names = dict(model.named_modules(remove_duplicate=False))
    uses = uses_of_tensors(model)
    seen: set[str] = set()
    for pair in pairs:
        for name in pair:
            if name not in names:
                raise InputError(f"The model has no module '{name}' to fold." + did_you_mean(name, names))
            if name in seen:
                raise InputError(f"'{name}' is in more than one fold. Export the allocation again.")
            seen.add(name)
        if not _is_foldable(model, *pair, uses):
            layer, batch_norm = (f"'{name}' ({type(names[name]).__name__})" for name in pair)
            raise InputError(
                f"{batch_norm} cannot be folded into {layer}: it takes a batch norm with running statistics, as many channels "
                "as the layer has outputs, and parameters that no other module shares. Is this the model that was searched?"
            )
    with torch.no_grad():
        for pair in pairs:
            _fold(model, *pair)


def _fold(model: nn.Module, layer_name: str, name: str) -> Undo:
    """Fold one batch norm; returns the undo, bit for bit."""
    layer: Any = model.get_submodule(layer_name)
    batch_norm: Any = model.get_submodule(name)
    old_weight, old_bias = layer.weight.data, None if layer.bias is None else layer.bias.data
    weight, bias = folded(layer, batch_norm)
    set_values(layer.weight, weight)
    if layer.bias is None:
        layer.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=layer.weight.requires_grad)
    else:
        set_values(layer.bias, bias)
    rest = list(batch_norm.children())
    restore = replace_module(model, name, (nn.Sequential(*rest) if rest else nn.Identity()).train(batch_norm.training))

    def undo() -> None:
        layer.weight.data = old_weight
        if old_bias is None:
            layer.bias = None
        else:
            layer.bias.data = old_bias
        restore()

    return undo


def folded(layer: Any, batch_norm: Any) -> tuple[Tensor, Tensor]:
    """Weight, in the layer's own layout, and bias `[out]` of the layer with the batch norm folded in, both float64.

    Row o becomes gamma_o / sqrt(var_o + eps) W_o, and the bias (b_o - mean_o) gamma_o / sqrt(var_o + eps) + beta_o.
    """
    rows = weight_rows(layer).double()
    # A root and a division, each rounded as IEEE says, where rsqrt is not: the same weights on every device.
    gain = 1 / torch.sqrt(batch_norm.running_var.double() + batch_norm.eps)
    if batch_norm.weight is not None:
        gain = gain * batch_norm.weight.double()
    bias = -batch_norm.running_mean.double() if layer.bias is None else layer.bias.double() - batch_norm.running_mean.double()
    bias = bias * gain
    if batch_norm.bias is not None:
        bias = bias + batch_norm.bias.double()
    return from_rows(layer, rows * gain.view(-1, *[1] * (rows.ndim - 1))), bias


def _is_foldable(model: nn.Module, layer_name: str, name: str, uses: Counter[int]) -> bool:
    """Whether the arithmetic of a fold holds for the two modules, and changes no third one."""
    layer: Any = model.get_submodule(layer_name)
    batch_norm: Any = model.get_submodule(name)
    if not isinstance(batch_norm, _BatchNorm) or batch_norm.running_mean is None or batch_norm.running_var is None:
        return False
    if kind_of(layer) in (None, "embedding") or layer._parameters.get("weight") is None or "bias" not in layer._parameters:
        return False
    shared = any(uses[id(tensor)] > 1 for module in (layer, batch_norm) for tensor in _own_tensors(module))
    return not shared and rows_shape(layer)[0] == len(batch_norm.running_mean)


def uses_of_tensors(model: nn.Module) -> Counter[int]:
    """How many names each parameter and buffer has, by id: more than one where it, or a module that holds it, is shared."""
    return Counter(id(tensor) for _, module in model.named_modules(remove_duplicate=False) for tensor in _own_tensors(module))


def _own_tensors(module: nn.Module) -> list[Tensor]:
    own = [*module._parameters.values(), *module._buffers.values()]
    return [tensor for tensor in own if tensor is not None]


def _find_followers(model: nn.Module, forward: Forward, inputs: Any) -> tuple[Tensor, list[Pair]]:
    """The output, and each (layer, batch norm) where the layer's output tensor was the norm's input, both called once."""
    calls: Counter[str] = Counter()
    names = {module: name for name, module in model.named_modules()}
    # Layer outputs by id; a weak reference tells whether the id is still that tensor's, and keeps no activations alive.
    outputs: dict[int, tuple[weakref.ref[Tensor], str]] = {}
    pairs: list[Pair] = []

    def after_layer(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        calls[names[module]] += 1
        # As many dimensions as the weight: a batch of channels-first images, or of plain vectors. (A batch norm takes the
        # second dimension for channels, a linear layer on [n, tokens, features] writes them to the last.)
        if isinstance(output, Tensor) and output.ndim == module.weight.ndim:
            outputs[id(output)] = (weakref.ref(output), names[module])

    def before_norm(module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        calls[names[module]] += 1
        reference, layer = outputs.get(id(args[0]), (None, "")) if args else (None, "")
        if reference is not None and reference() is args[0]:
            pairs.append((layer, names[module]))

    norms = [(module, before_norm) for module in names if isinstance(module, _BatchNorm)]
    with hooked(norms, [(module, after_layer) for module in names if kind_of(module) is not None]):
        output = forward(model, inputs)
    return output, [pair for pair in pairs if calls[pair[0]] == calls[pair[1]] == 1]
