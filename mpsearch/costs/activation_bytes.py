"""The most memory that the activations of a forward pass take at once: a peak over the layers, and not a sum.

What is in memory in addition to a layer's input when it runs is recorded once on the float model
(`mpsearch.graph.activation_memory`). For a scheme that quantizes the input to b bits, this is assumed:

- the input lies in memory as codes, b / 8 bytes a value, and a float32 scale for every token; a static scale is stored with the
  weight. Its float values are never there, because the operation before writes codes: that takes a static scale, or an
  operation before that has a whole token in hand (a norm);
- that is so only where nobody else reads the input later. Where something does that is no layer of the same group (a residual
  connection, another branch), its float values stay, as the score has it, and the codes come on top;
- a rotated input is a copy in float32, or its codes; in place of the input where nobody else reads that;
- everything else is in float: the layer's output, and what waits for later layers, also where those quantize it. So the
  peak is an upper bound for a runtime in which every tensor is quantized once for all its readers (TensorFlow Lite, ONNX
  Runtime where all of a graph is quantized).

Runtimes that quantize as they read (this package's own kernels among them) keep the float input: they take what a float input
takes, and a buffer for the codes. Where no searched layer runs (softmax, norms, additions) nothing depends on the schemes: no
allocation has a lower peak than that. What a kernel needs while it runs, and what an allocator wastes, is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpsearch.allocation import SearchSpace
from mpsearch.costs.base import Cost, CostTable
from mpsearch.costs.size import parse_bytes
from mpsearch.errors import InputError
from mpsearch.layer import Activations, LayerSpec
from mpsearch.schemes.base import QuantScheme


@dataclass(frozen=True)
class ActivationBytes(Cost):
    """Peak bytes of the activations of one sample."""

    name = "activation_bytes"
    column = "activation_bytes"

    def table(self, space: SearchSpace) -> CostTable:
        """The peak while each group runs, in each scheme; the constant is that of all the rest."""
        values = [[max(_peak(layer, s) for layer in group.layers) for s in space.schemes.values()] for group in space.groups]
        constant = max(_of(layer).until_next for layer in space.layers)
        return CostTable(self.name, self.column, np.array(values, dtype=np.float64), float(constant), peak=True)

    def parse(self, text: str | float) -> float:
        """Bytes, with or without a unit."""
        return float(parse_bytes(text))


def _of(layer: LayerSpec) -> Activations:
    if layer.activations is None:
        raise InputError(
            "The activations of this run were not followed, so activation_bytes is not known. Start a run with "
            "'cost=[bytes,activation_bytes]'."
        )
    return layer.activations


def _peak(layer: LayerSpec, scheme: QuantScheme) -> int:
    found, wanted = _of(layer), scheme.input_format
    if layer.kind == "embedding" or (wanted is None and not scheme.input_additions(layer.shape)):
        return found.live
    scales = 0 if wanted is None else wanted.scale_bytes(found.values, found.tokens)
    return found.without_input + -(-found.values * scheme.input_bits // 8) + scales
