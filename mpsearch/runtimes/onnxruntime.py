"""ONNX Runtime: `MatMulNBits` for weights alone, QDQ for weights and inputs.

`com.microsoft.MatMulNBits` as `MatMulNBitsQuantizer` writes it: MatMul of 4 or 8 bits, blocks of a power of two from 16. QDQ
as `quantize_static` writes it with `ActivationSymmetric`: symmetric 8-bit weights with per-channel or per-tensor scales, one
static scale for the input. Floats are float32 here: the other formats would need casts that are not documented.
"""

from __future__ import annotations

from mpsearch.layer import LayerSpec
from mpsearch.runtimes.base import Runtime, whole_groups
from mpsearch.schemes.base import QuantScheme
from mpsearch.schemes.floating import Float
from mpsearch.schemes.input import IntegerInput
from mpsearch.schemes.integer import Integer


class ONNXRuntime(Runtime):
    """ONNX Runtime on a CPU."""

    name = "onnxruntime"
    what = (
        "Linear layers at 4 or 8 bits in whole groups of a power of two from 16, and Linear, Conv1d and "
        "Conv2d at 8 bits with static 8-bit inputs"
    )

    def runs(self, layer: LayerSpec, scheme: QuantScheme) -> bool:
        """Linear: 4 or 8 bits in whole blocks; Linear, Conv1d and Conv2d: 8 bits with static 8-bit inputs."""
        if isinstance(scheme, Float):
            return scheme.format == "float32"
        if not isinstance(scheme, Integer):
            return False
        if scheme.input is not None:
            weight = scheme.bits == 8 and scheme.symmetric and scheme.group_size in ("channel", "tensor")
            x = scheme.input
            static = isinstance(x, IntegerInput) and (x.bits, x.scale, x.symmetric) == (8, "static", True)
            return weight and static and layer.kind in ("linear", "conv1d", "conv2d")
        size = scheme.group_size
        block = isinstance(size, int) and size >= 16 and size & (size - 1) == 0 and whole_groups(layer, size)
        return layer.kind == "linear" and scheme.bits in (4, 8) and block
