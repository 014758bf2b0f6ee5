"""Bit-operations: the work of a network in one number that knows of bits, and of no machine.

A layer takes MACs x bits of its weights x bits of its input (van Baalen et al. 2020, "Bayesian Bits",
https://arxiv.org/abs/2005.07093; Yao et al. 2021, "HAWQ-V3", https://arxiv.org/abs/2011.10680). What is float has
the bits of its format, 32 for an input that is not quantized. Baskin et al. 2021 ("UNIQ", https://arxiv.org/abs/1804.10969) add
what the accumulator takes; here, as in the other two, it is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from mpsearch.allocation import SearchSpace
from mpsearch.costs.base import Cost, CostTable, per_layer


@dataclass(frozen=True)
class BitOperations(Cost):
    """Bit-operations of the searched layers, for one sample; an embedding, which multiplies nothing, has none."""

    name = "bit_operations"
    column = "bit_operations"

    def table(self, space: SearchSpace) -> CostTable:
        """MACs x weight bits x input bits of each group in each scheme."""
        values = per_layer(space, lambda layer, scheme: float(layer.macs * scheme.weight_bits * scheme.input_bits))
        return CostTable(self.name, self.column, values, 0.0)
