"""Diagonal Fisher information on layer outputs: one backward pass for all layers and schemes.

A small change dy of a layer's output changes the loss L by g dy + 1/2 dy^T H dy. At a trained model g vanishes on average, H is
close to the Fisher information E[g g^T], and its diagonal gives

    sensitivity(layer, scheme) = 1/2 E_x sum_i g_i^2 dy_i^2,        g = dL/dy,  dy = (W' x' + b') - (W x + b)

(LeCun et al. 1990, "Optimal Brain Damage", eq. 3 with the Fisher in place of the Hessian; on layer outputs as in Li et al. 2021,
"BRECQ", eq. 10). L is the negative log-likelihood of labels drawn from the model's own prediction, which makes E[g g^T] the true
Fisher and not the empirical one (Kunstner et al. 2019). Runs on the calibration split.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.calibrate import drawn_loss
from mpsearch.engine import QuantEngine
from mpsearch.metrics.base import Pair, SensitivityMetric


class Fisher(SensitivityMetric):
    """Half the Fisher-weighted squared change of the layers' outputs, in nats; no label is used."""

    name = "fisher"
    unit = "nats"

    def measure(self, engine: QuantEngine, pairs: Sequence[Pair]) -> Iterator[float]:
        """All pairs at once, then yielded one by one."""
        layers = {group.name: group.layers for group in engine.space.groups}
        wanted = {(layer.name, scheme) for group, scheme in pairs for layer in layers[group]}
        sums = dict.fromkeys(sorted(wanted), 0.0)
        generator = torch.Generator().manual_seed(0)
        n_samples = 0
        for inputs, targets in engine.batches("calibration"):
            n_samples += len(targets)
            for name, calls in _calls_with_gradients(engine, inputs, generator).items():
                module = engine.model.get_submodule(name)
                layer = next(layer for layer in engine.space.layers if name in layer.modules)
                for scheme in [s for other, s in sums if other == layer.name]:
                    sums[layer.name, scheme] += sum(_half_square(engine, module, layer.name, scheme, call) for call in calls)
        for group, scheme in pairs:
            yield sum(sums[layer.name, scheme] for layer in layers[group]) / n_samples


@dataclass(frozen=True)
class _Call:
    """What a module was called with, what came out, and the gradient of the summed negative log-likelihood there."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    gradient: Tensor | None = None


def _calls_with_gradients(engine: QuantEngine, inputs: Any, generator: torch.Generator) -> dict[str, list[_Call]]:
    """Module name -> its calls."""
    calls: list[tuple[str, _Call]] = []
    hooks = []
    for name in (name for layer in engine.space.layers for name in layer.modules):

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor, name: str = name) -> Tensor:
            output = output if output.requires_grad else output.detach().requires_grad_()
            calls.append((name, _Call(args, kwargs, output)))
            return output.clone()  # what follows may work in place

        hooks.append(engine.model.get_submodule(name).register_forward_hook(hook, with_kwargs=True))
    try:
        with torch.enable_grad():
            logits = engine.task.forward(engine.model, inputs)
            loss = drawn_loss(logits, generator)
            gradients = torch.autograd.grad(loss, [call.output for _, call in calls], allow_unused=True)
    finally:
        for handle in hooks:
            handle.remove()
    found: dict[str, list[_Call]] = {}
    for (name, call), gradient in zip(calls, gradients, strict=True):
        found.setdefault(name, []).append(replace(call, gradient=gradient))
    return found


@torch.no_grad()
def _half_square(engine: QuantEngine, module: nn.Module, layer: str, scheme: str, call: _Call) -> float:
    """1/2 sum (g * dy)^2 over a batch, dy from running the module with quantized weight and input and corrected bias."""
    if call.gradient is None:  # what came out reached no logit
        return 0.0
    own = dict(module.named_parameters(recurse=False))
    swapped = {name: value for parameter, value in engine.swaps(layer, scheme) for name, p in own.items() if p is parameter}
    with engine.input_quantized(layer, scheme):
        delta = torch.func.functional_call(module, swapped, call.args, call.kwargs) - call.output
    return 0.5 * (delta * call.gradient).double().square().sum().item()
