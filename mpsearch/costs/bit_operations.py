"""Bit operations: a measure of work that depends on bit widths, and on no machine.

A layer takes MACs x bits of its weights x bits of its input (van Baalen et al. 2020, "Bayesian Bits",
https://arxiv.org/abs/2005.07093; Yao et al. 2021, "HAWQ-V3", https://arxiv.org/abs/2011.10680). Floats have
the bits of their format, 32 for an input that is not quantized. Baskin et al. 2021 ("UNIQ", https://arxiv.org/abs/1804.10969) add
the work of the accumulator; here, as in the other two, it is left out. The additions of a rotated input are counted: a float32
addition as 32 bit operations, as a multiplication of b and c bits is bc of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from mpsearch.allocation import SearchSpace
from mpsearch.costs.base import Cost, CostTable, per_layer
from mpsearch.layer import LayerSpec
from mpsearch.schemes.base import QuantScheme

ADDITION = 32  # of float32


@dataclass(frozen=True)
class BitOperations(Cost):
    """Bit operations of the searched layers, for one sample; an embedding, which multiplies nothing, has none."""

    name = "bit_operations"
    column = "bit_operations"

    def table(self, space: SearchSpace) -> CostTable:
        """MACs x weight bits x input bits of each group in each scheme, and the additions of rotations."""
        return CostTable(self.name, self.column, per_layer(space, _bit_operations), 0.0)


def _bit_operations(layer: LayerSpec, scheme: QuantScheme) -> float:
    product = float(layer.macs * scheme.weight_bits * scheme.input_bits)
    return product + ADDITION * layer.tokens * scheme.input_additions(layer.shape)
