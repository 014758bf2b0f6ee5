"""Weight error: needs no data and no forward pass, and is no estimate of the loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mpsearch.engine.engine import QuantEngine
from mpsearch.metrics.base import Pair, SensitivityMetric, layers_by_group, squared_weight_error


class WeightMSE(SensitivityMetric):
    """Sum of the squared errors of the group's weights, ||dW||^2."""

    name = "weight_mse"
    unit = "squared weight"

    def measure(self, engine: QuantEngine, pairs: Sequence[Pair]) -> Iterator[float]:
        """From the weight bank alone."""
        layers = layers_by_group(engine)
        yield from (sum(squared_weight_error(engine, layer.name, s) for layer in layers[group]) for group, s in pairs)
