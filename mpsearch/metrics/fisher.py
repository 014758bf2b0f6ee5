"""Diagonal Fisher information on layer outputs: one backward pass for all layers and schemes.

A small change dy of a layer's output changes the loss L by g dy + 1/2 dy^T H dy. At a trained model g vanishes on average, H is
close to the Fisher information E[g g^T], and its diagonal gives

    sensitivity(layer, scheme) = 1/2 E_x sum_i g_i^2 dy_i^2,        g = dL/dy,  dy = (W' - W) x + (b' - b)

(LeCun et al. 1990, "Optimal Brain Damage", eq. 3 with the Fisher in place of the Hessian; on layer outputs as in Li et al. 2021,
"BRECQ", eq. 10). L is the negative log-likelihood of labels drawn from the model's own prediction, which makes E[g g^T] the true
Fisher and not the empirical one (Kunstner et al. 2019). Runs on the calibration split.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
                    sums[layer.name, scheme] += sum(_half_square(engine, module, layer.name, scheme, x, g) for x, g in calls)
        for group, scheme in pairs:
            yield sum(sums[layer.name, scheme] for layer in layers[group]) / n_samples


def _calls_with_gradients(engine: QuantEngine, inputs: Any, generator: torch.Generator) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Module name -> (input, gradient of the summed negative log-likelihood at the output) of each of its calls."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
    hooks = []
    for layer in engine.space.layers:
        for name in layer.modules:

            def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> Tensor:
                output = output if output.requires_grad else output.detach().requires_grad_()
                calls.setdefault(name, []).append((args[0].detach(), output))
                return output.clone()  # what follows may work in place

            hooks.append(engine.model.get_submodule(name).register_forward_hook(hook))
    try:
        with torch.enable_grad():
            logits = engine.task.forward(engine.model, inputs)
            labels = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0].to(logits.device)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            outputs = [output for name in calls for _, output in calls[name]]
            gradients = iter(torch.autograd.grad(loss, outputs, allow_unused=True))
    finally:
        for handle in hooks:
            handle.remove()
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, pairs in calls.items():
        found[name] = [(x, g if g is not None else torch.zeros_like(y)) for (x, y), g in zip(pairs, gradients, strict=False)]
    return found


@torch.no_grad()
def _half_square(engine: QuantEngine, module: Any, layer: str, scheme: str, x: Tensor, gradient: Tensor) -> float:
    """1/2 sum (g * dy)^2 over a batch, dy from running the module with the *change* of its weight and bias."""
    change = {
        name: value - parameter for parameter, value in engine.swaps(layer, scheme) for name in _names_of(module, parameter)
    }
    if getattr(module, "bias", None) is not None and "bias" not in change:
        change["bias"] = torch.zeros_like(module.bias)
    delta = torch.func.functional_call(module, change, (x,))
    return 0.5 * (delta * gradient).double().square().sum().item()


def _names_of(module: nn.Module, parameter: Tensor) -> list[str]:
    return [name for name, own in module.named_parameters(recurse=False) if own is parameter]
