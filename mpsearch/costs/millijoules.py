"""Energy, by a model: the arithmetic, and reading the weights from memory. Nothing is measured.

The numbers are Horowitz's, of a 45 nm process at 0.9 V ("Computing's energy problem (and what we can do about it)", ISSCC 2014):
a float32 multiplication takes 3.7 pJ and an addition 0.9; an 8-bit integer multiplication takes 0.2 pJ and a 32-bit one 3.1, so
about as much as the product of the bits; a 32-bit integer addition takes 0.1 pJ; 64 bits from DRAM take 1.3 to 2.6 nJ, at least
20 pJ per bit. A multiply-accumulate of b_w-bit weights and b_x-bit inputs therefore takes

    0.2 pJ x b_w b_x / 64 + 0.1 pJ    where both are integers,
    3.7 pJ + 0.9 pJ                   where the input is float, as the codes of the weight are converted first; also where it
                                      is a small float, for which there is no number: an upper bound;

a rotation of the input takes 0.9 pJ per addition; and every weight is read from DRAM once per forward pass, as stored. Not
included: activations, caches, operations without a multiplication, and the idle power of the machine. Newer processes take less,
and arithmetic has gained more than memory: use it to compare allocations, and measure the machine where joules matter.
"""

from __future__ import annotations

from dataclasses import dataclass

from mpsearch.allocation import SearchSpace
from mpsearch.costs.base import Cost, CostTable, per_layer
from mpsearch.errors import check_integer
from mpsearch.layer import LayerSpec
from mpsearch.schemes.base import QuantScheme

FLOAT_ADDITION = 0.9  # pJ
FLOAT_MAC = 3.7 + FLOAT_ADDITION
INTEGER_MULTIPLICATION = 0.2 / 64  # pJ for each bit of the weight and bit of the input
INTEGER_ADDITION = 0.1  # pJ, into 32 bits
DRAM = 1300 / 64  # pJ a bit
PICOJOULES = 1e9  # in a millijoule


@dataclass(frozen=True)
class Millijoules(Cost):
    """Millijoules for one sample.

    Nothing is counted of an embedding, which is looked up and not multiplied: only a few of its rows are read.

    Parameters
    ----------
    batch_size
        Samples that share each read of a weight.
    """

    batch_size: int = 1

    name = "millijoules"
    column = "millijoules"

    def __post_init__(self) -> None:
        check_integer("cost.millijoules.batch_size", self.batch_size)

    def table(self, space: SearchSpace) -> CostTable:
        """Each group's millijoules in each scheme; reading the other weights is the constant."""
        constant = space.other_bits * DRAM / self.batch_size / PICOJOULES
        return CostTable(self.name, self.column, per_layer(space, self._millijoules), constant)

    def _millijoules(self, layer: LayerSpec, scheme: QuantScheme) -> float:
        if layer.macs == 0:
            return 0.0
        mac = FLOAT_MAC
        if scheme.input_format is not None and scheme.input_format.is_integer:
            mac = INTEGER_MULTIPLICATION * scheme.weight_bits * scheme.input_bits + INTEGER_ADDITION
        rotation = layer.tokens * scheme.input_additions(layer.shape) * FLOAT_ADDITION
        return (layer.macs * mac + rotation + scheme.storage_bits(layer.shape) * DRAM / self.batch_size) / PICOJOULES
