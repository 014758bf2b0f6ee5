"""Diagonal Fisher information on layer outputs: one backward pass for all layers and schemes.

A small change dy of a layer's output changes the loss L by g dy + 1/2 dy^T H dy. At a trained model g vanishes on average, H is
close to the Fisher information E[g g^T], and its diagonal gives

    sensitivity(layer, scheme) = 1/2 E_x sum_i g_i^2 dy_i^2,        g = dL/dy,  dy = (W' x' + b') - (W x + b)

(LeCun et al. 1990, "Optimal Brain Damage", eq. 3 with the Fisher in place of the Hessian; on layer outputs as in Li et al. 2021,
"BRECQ", eq. 10). L is the negative log-likelihood of targets drawn from the model's own prediction (`Divergence.drawn_loss`),
which makes E[g g^T] the true Fisher and not the empirical one (Kunstner et al. 2019). Runs on the calibration split.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.engine.engine import QuantEngine
from mpsearch.errors import InputError, check_memory
from mpsearch.graph.surgery import hooked
from mpsearch.graph.uses import Use, observe_uses
from mpsearch.metrics.base import Pair, SensitivityMetric, layers_by_group, quantize_groups


class Fisher(SensitivityMetric):
    """Half the Fisher-weighted squared change of the layers' outputs, in the unit of the loss; no label is used."""

    name = "fisher"
    unit = "nats"

    def measure(self, engine: QuantEngine, pairs: Sequence[Pair]) -> Iterator[float]:
        """All pairs at once, then yielded one by one."""
        quantize_groups(engine, pairs)
        layers = layers_by_group(engine)
        measured = {(layer.name, scheme) for group, scheme in pairs for layer in layers[group]}
        sums = dict.fromkeys(sorted(measured), 0.0)
        generator = torch.Generator().manual_seed(0)
        n_samples = 0
        layer_of = {name: layer.name for layer in engine.space.layers for name in layer.readers}
        for inputs, targets in engine.batches("calibration"):
            n_samples += len(targets)
            logits, calls = record_calls(engine, list(layer_of), inputs)
            gradients = gradients_at(calls, engine.divergence.drawn_loss(logits, generator))
            for (name, call), gradient in zip(calls, gradients, strict=True):
                if gradient is None:  # the output reached no logit
                    continue
                for scheme in [s for layer, s in sums if layer == layer_of[name]]:
                    change = changed(engine, name, layer_of[name], scheme, call)
                    sums[layer_of[name], scheme] += 0.5 * (change * gradient).double().square().sum().item()
        for group, scheme in pairs:
            yield sum(sums[layer.name, scheme] for layer in layers[group]) / n_samples


@dataclass(frozen=True)
class Call:
    """The inputs and the output of a module's call, or of a `use` of its weight outside of it."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Tensor
    use: Use | None = None


def record_calls(engine: QuantEngine, readers: Sequence[str], inputs: Any) -> tuple[Tensor, list[tuple[str, Call]]]:
    """Run the float model on one batch so that gradients reach the output of every call of a layer.

    Parameters
    ----------
    readers
        Names of modules and of weights (`LayerSpec.readers`).

    Returns
    -------
    tuple of (Tensor, list of (str, Call))
        The logits, and each call with its reader, in their order.
    """
    calls: list[tuple[str, Call]] = []
    names = {module: name for name, module in engine.model.named_modules() if name in set(readers)}
    weights = {name: engine.model.get_parameter(name) for name in readers if name not in names.values()}
    weight_names = {id(weight): name for name, weight in weights.items()}

    def record(name: str, args: Any, kwargs: Any, output: Tensor, use: Use | None = None) -> Tensor:
        output = output if output.requires_grad else output.detach().requires_grad_()
        calls.append((name, Call(args, kwargs, output, use)))
        return output.clone()  # later code may work in place

    def record_use(use: Use) -> Tensor | None:
        return record(weight_names[id(use.weight)], use.args, use.kwargs, use.output, use) if use.owner is None else None

    def record_call(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        return record(names[module], args, kwargs, output)

    observed = observe_uses(engine.model, list(weights.values()), record_use)
    with torch.enable_grad(), engine.own_inputs(), hooked(after=[(module, record_call) for module in names]), observed:
        return engine.task.forward(engine.model, inputs), calls


def gradients_at(calls: Sequence[tuple[str, Call]], loss: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of `loss` at each call's output; `None` where it does not reach the loss. The graph is kept."""
    outputs = [call.output for _, call in calls]
    try:
        return torch.autograd.grad(loss, outputs, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        check_memory(error)
        raise InputError(
            f"The model has no gradients, which this metric needs ({str(error).splitlines()[0]}; torch.no_grad in its forward?). "
            "Use metric=kl, which needs none."
        ) from None


@torch.no_grad()
def changed(engine: QuantEngine, reader: str, layer: str, scheme: str, call: Call) -> Tensor:
    """The change of a call's output when the module runs on the layer's quantized weight and input and its corrected bias.

    For a use outside of the layer's modules: when it runs on the quantized weight.
    """
    if call.use is not None:
        return call.use.run_with(engine.swaps(layer, scheme)[0][1]) - call.output
    module = engine.model.get_submodule(reader)
    own = dict(module.named_parameters(recurse=False))
    swapped = {name: value for parameter, value in engine.swaps(layer, scheme) for name, p in own.items() if p is parameter}
    with engine.input_quantized(layer, scheme):
        return torch.func.functional_call(module, swapped, call.args, dict(call.kwargs)) - call.output
