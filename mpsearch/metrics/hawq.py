"""Hessian trace times weight error: one network-wide second derivative, no forward pass for any scheme.

    sensitivity(layer, scheme) = 1/2 tr(H_layer) / n_layer * ||dW||^2

(Dong et al. 2020, "HAWQ-V2", https://arxiv.org/abs/1911.03852, eq. 9: the average trace; Yao et al. 2021, "HAWQ-V3"). H is the
Hessian of the mean log-likelihood with respect to the layer's weights, its trace estimated by Hutchinson's method, E[v^T H v]
over random signs v. Targets are drawn from the model's own prediction, as in `fisher.py`. Runs on the calibration split.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mpsearch.engine.engine import QuantEngine
from mpsearch.metrics.base import Pair, SensitivityMetric, layers_by_group, squared_weight_error


class HAWQ(SensitivityMetric):
    """Half the average Hessian trace times the squared error of the weights.

    Parameters
    ----------
    n_probes
        Sign vectors per layer and batch.
    """

    name = "hawq"
    unit = "nats"

    def __init__(self, n_probes: int = 4) -> None:
        self.n_probes = n_probes

    def measure(self, engine: QuantEngine, pairs: Sequence[Pair]) -> Iterator[float]:
        """All traces at once, then pairs one by one."""
        layers, traces = layers_by_group(engine), self._traces(engine)
        for group, scheme in pairs:
            total = 0.0
            for layer in layers[group]:
                error = squared_weight_error(engine, layer.name, scheme)
                total += 0.5 * max(traces[layer.name], 0.0) / layer.numel * error
            yield total

    def _traces(self, engine: QuantEngine) -> dict[str, float]:
        names = [layer.name for layer in engine.space.layers]
        weights: list[Tensor] = [engine.model.get_submodule(name).weight for name in names]  # type: ignore[misc]
        generator = torch.Generator().manual_seed(0)
        sums, n_samples = [0.0] * len(names), 0
        for inputs, targets in engine.batches("calibration"):
            with torch.enable_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                with engine.own_inputs():
                    logits = engine.task.forward(engine.model, inputs)
                loss = engine.divergence.drawn_loss(logits, generator)
                gradients = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
                # One layer at a time: the blocks between layers would dominate the trace of a layer of low sensitivity.
                for i, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
                    for _ in range(self.n_probes):
                        sign = (torch.randint(0, 2, weight.shape, generator=generator) * 2.0 - 1).to(weight)
                        (product,) = torch.autograd.grad(gradient, weight, sign, retain_graph=True, materialize_grads=True)
                        sums[i] += (sign * product).double().sum().item() / self.n_probes
            n_samples += len(targets)
        return dict(zip(names, (total / n_samples for total in sums), strict=True))
