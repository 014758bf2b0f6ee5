"""torchao by `FqnToConfig`: a configuration a module (torchao/quantization/quant_api.py).

Weights alone: `IntxWeightOnlyConfig`, a scale a row or a group of a row. Inputs of 8 bits, a scale a token:
`Int8DynamicActivationInt8WeightConfig`, symmetric 8-bit weights with a scale a row. Modules are configured one by one, so nothing
is fused. Only Linear layers are known to be taken; widths are those that its tests and documentation name.
"""

from __future__ import annotations

from mpsearch.layer import LayerSpec
from mpsearch.runtimes.base import Runtime, whole_groups
from mpsearch.schemes.base import QuantScheme
from mpsearch.schemes.floating import Float
from mpsearch.schemes.input import IntegerInput
from mpsearch.schemes.integer import Integer


class TorchAO(Runtime):
    """torchao, in eager PyTorch or under `torch.compile`."""

    name = "torchao"
    what = "Linear layers at 2, 3, 4, 5, 6 or 8 bits, a scale a row or whole groups of it, or at 8 bits with 8-bit inputs"

    def runs(self, layer: LayerSpec, scheme: QuantScheme) -> bool:
        """Linear layers: 2, 3, 4, 5, 6 or 8 bits a row or in whole groups; or 8 bits with 8-bit inputs."""
        if isinstance(scheme, Float):
            return True
        if not isinstance(scheme, Integer) or layer.kind != "linear" or scheme.group_size == "tensor":
            return False
        if scheme.input is not None:
            input_params = scheme.input == IntegerInput(8, "token")
            return input_params and (scheme.bits, scheme.group_size, scheme.symmetric) == (8, "channel", True)
        fits = scheme.group_size == "channel" or whole_groups(layer, int(scheme.group_size))
        return scheme.bits in (2, 3, 4, 5, 6, 8) and fits
