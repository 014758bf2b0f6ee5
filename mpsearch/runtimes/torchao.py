"""torchao by `FqnToConfig`: one configuration per module (torchao/quantization/quant_api.py, torchao 0.18).

Weights alone: `IntxWeightOnlyConfig`, 2 to 8 bits, per-row or per-group scales, with zero points or without, in Linear layers and
embeddings. Inputs of 8 bits, per-token scales: `Int8DynamicActivationInt8WeightConfig`, symmetric 8-bit weights with per-row
scales. `Int8DynamicActivationIntxWeightConfig` is left out: torchao's own reader of safetensors files does not know its tensors
(`ALLOWED_CLASSES`). Modules are configured one by one, so nothing is fused.
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
    what = "Linear layers and embeddings at 2 to 8 bits, per row or in whole groups; Linear layers at 8 bits with 8-bit inputs"
    exporter = "torchao"

    def runs(self, layer: LayerSpec, scheme: QuantScheme) -> bool:
        """Linear layers and embeddings: 2 to 8 bits per row or in whole groups; Linear layers at 8 bits with 8-bit inputs."""
        if isinstance(scheme, Float):
            return True
        kinds = ("linear", "embedding") if scheme.input_format is None else ("linear",)
        if not isinstance(scheme, Integer) or layer.kind not in kinds or scheme.group_size == "tensor" or scheme.bits < 2:
            return False
        if scheme.input == IntegerInput(8, "token"):
            return (scheme.bits, scheme.group_size, scheme.symmetric) == (8, "channel", True)
        fits = scheme.group_size == "channel" or whole_groups(layer, int(scheme.group_size))
        return scheme.input is None and fits
