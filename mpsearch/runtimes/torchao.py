"""torchao by `FqnToConfig`: one configuration per module (torchao/quantization/quant_api.py).

Weights alone: `IntxWeightOnlyConfig`, per-row or per-group scales. Inputs of 8 bits, per-token scales:
`Int8DynamicActivationInt8WeightConfig`, symmetric 8-bit weights with per-row scales. Modules are configured one by one, so
nothing is fused. Only Linear layers are known to be supported; widths are those that its tests and documentation name.
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
    what = "Linear layers at 2, 3, 4, 5, 6 or 8 bits, per row or in whole groups, or at 8 bits with 8-bit inputs"

    def runs(self, layer: LayerSpec, scheme: QuantScheme) -> bool:
        """Linear layers: 2, 3, 4, 5, 6 or 8 bits per row or in whole groups; or 8 bits with 8-bit inputs."""
        if isinstance(scheme, Float):
            return True
        if not isinstance(scheme, Integer) or layer.kind != "linear" or scheme.group_size == "tensor":
            return False
        if scheme.input is not None:
            weight = (scheme.bits, scheme.group_size, scheme.symmetric) == (8, "channel", True)
            return weight and scheme.input == IntegerInput(8, "token")
        fits = scheme.group_size == "channel" or whole_groups(layer, int(scheme.group_size))
        return scheme.bits in (2, 3, 4, 5, 6, 8) and fits
