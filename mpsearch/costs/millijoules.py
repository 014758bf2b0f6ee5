"""Energy, by a model: what the arithmetic takes, and what it takes to bring the weights from memory. Nothing is measured.

The numbers are Horowitz's, of a 45 nm process at 0.9 V ("Computing's energy problem (and what we can do about it)", ISSCC 2014):
a float32 multiplication takes 3.7 pJ and an addition 0.9; an 8-bit integer multiplication takes 0.2 pJ and a 32-bit one 3.1, so
about as much as the product of the bits; a 32-bit integer addition takes 0.1 pJ; 64 bits from DRAM take 1.3 to 2.6 nJ, 20 pJ a
bit at the least. A multiply-accumulate of b_w-bit weights and b_x-bit inputs therefore takes

    0.2 pJ x b_w b_x / 64 + 0.1 pJ    where both are integers,
    3.7 pJ + 0.9 pJ                   where the input is float, as the codes of the weight are converted first; also where it
                                      is a small float, of which there is no number: more than these take;

a rotation of the input takes 0.9 pJ for each of its additions; and every weight is read from DRAM once a forward pass, as
stored. Not in it: activations, caches, what does no multiplication, and what the machine takes while it idles. Newer processes
take less, and arithmetic has gained more than memory: compare allocations by it, and measure the machine where joules matter.
"""

from __future__ import annotations

from dataclasses import dataclass

from mpsearch.allocation import SearchSpace
from mpsearch.costs.base import Cost, CostTable, per_layer
from mpsearch.errors import InputError
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
    """Millijoules for one sample where `batch_size` samples share each weight that is read.

    Of an embedding, which is looked up and not multiplied, nothing is counted: of its rows only a few are read.
    """

    batch_size: int = 1

    name = "millijoules"
    column = "millijoules"

    def __post_init__(self) -> None:
        if type(self.batch_size) is not int or self.batch_size < 1:
            raise InputError(f"cost.millijoules.batch_size is a whole number from 1; {self.batch_size!r} came.")

    def table(self, space: SearchSpace) -> CostTable:
        """Each group's millijoules in each scheme; reading what is not searched is the constant."""
        constant = space.other_bits * DRAM / self.batch_size / PICOJOULES
        return CostTable(self.name, self.column, per_layer(space, self._of), constant)

    def _of(self, layer: LayerSpec, scheme: QuantScheme) -> float:
        if layer.macs == 0:
            return 0.0
        mac = FLOAT_MAC
        if scheme.input_format is not None and scheme.input_format.is_integer:
            mac = INTEGER_MULTIPLICATION * scheme.weight_bits * scheme.input_bits + INTEGER_ADDITION
        rotation = layer.tokens * scheme.input_additions(layer.shape) * FLOAT_ADDITION
        return (layer.macs * mac + rotation + scheme.storage_bits(layer.shape) * DRAM / self.batch_size) / PICOJOULES
