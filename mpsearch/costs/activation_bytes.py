"""Peak memory of the activations of a forward pass: a maximum over the layers, not a sum.

The memory in use in addition to a layer's input when it runs is recorded once on the float model
(`mpsearch.graph.activation_memory`). For a scheme that quantizes the input to b bits, this is assumed:

- the input is in memory as codes, b / 8 bytes per value, and a float32 scale per token; a static scale is stored with the weight.
  Its float values are never in memory, because the operation before writes codes: that takes a static scale, or an operation
  before that has a whole token at once (a norm);
- that holds only where nothing else reads the input later. Where something does that is no layer of the same group (a residual
  connection, another branch), its float values stay, as the score has it, and the codes are added;
- a rotated input is a copy in float32, or its codes; in place of the input where nothing else reads that;
- everything else is in float: the layer's output, and the inputs of later layers, also where those quantize them. So the peak is
  an upper bound for a runtime in which every tensor is quantized once for all its readers (TensorFlow Lite, ONNX Runtime where
  all of a graph is quantized).

Runtimes that quantize as they read (this package's own kernels among them) keep the float input: they take the memory of a float
input, and a buffer for the codes. Where no searched layer runs (softmax, norms, additions) nothing depends on the schemes: no
allocation has a lower peak than that. The temporary memory of kernels and the waste of an allocator are not counted.
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
        """The peak while each group runs, in each scheme; the constant is the peak of everything else."""
        values = [[max(_peak(layer, s) for layer in group.layers) for s in space.schemes.values()] for group in space.groups]
        constant = max(_activations(layer).until_next for layer in space.layers)
        return CostTable(self.name, self.column, np.array(values, dtype=np.float64), float(constant), peak=True)

    def parse(self, text: str | float) -> float:
        """Bytes, with or without a unit."""
        return float(parse_bytes(text))


def _activations(layer: LayerSpec) -> Activations:
    if layer.activations is None:
        raise InputError(
            "The activations of this run were not measured, so activation_bytes is not known. Start a run with "
            "'cost=[bytes,activation_bytes]'."
        )
    return layer.activations


def _peak(layer: LayerSpec, scheme: QuantScheme) -> int:
    memory, input_format = _activations(layer), scheme.input_format
    if layer.kind == "embedding" or (input_format is None and not scheme.input_additions(layer.shape)):
        return memory.live
    scales = 0 if input_format is None else input_format.scale_bytes(memory.values, memory.tokens)
    return memory.without_input + -(-memory.values * scheme.input_bits // 8) + scales
