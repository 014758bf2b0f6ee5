"""Weight error: needs no data and no forward pass; says nothing about the loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mpsearch.engine.engine import QuantEngine
from mpsearch.layer import weight_rows
from mpsearch.metrics.base import Pair, SensitivityMetric


class WeightMSE(SensitivityMetric):
    """Summed squared error of the group's weights, ||dW||^2."""

    name = "weight_mse"
    unit = "squared weight"

    def measure(self, engine: QuantEngine, pairs: Sequence[Pair]) -> Iterator[float]:
        """From the weight bank alone."""
        layers = {group.name: group.layers for group in engine.space.groups}
        for group, scheme in pairs:
            total = 0.0
            for layer in layers[group]:
                weight = weight_rows(engine.model.get_submodule(layer.name)).float().cpu()
                total += (engine.quantized(layer.name, scheme).dequantize() - weight).double().square().sum().item()
            yield total
