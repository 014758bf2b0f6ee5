"""vLLM, by way of compressed-tensors.

Weights alone, 4 or 8 bits: `CompressedTensorsWNA16` (`WNA16_SUPPORTED_BITS`), per-row scales or one per 32, 64 or 128 weights of
a row (`MARLIN_SUPPORTED_GROUP_SIZES`); releases that name more widths exist, but which kernels run them is not known. Inputs of 8
bits: `CompressedTensorsW8A8Int8`, symmetric 8-bit weights with per-row or per-tensor scales. Floats, weights alone:
`CompressedTensorsW8A16Fp8`, E4M3 with per-row or per-tensor float32 scales, and `CompressedTensorsW4A16Mxfp4`; with inputs in
E4M3, per-token scales or a static one: `CompressedTensorsW8A8Fp8`. NVFP4 (`CompressedTensorsW4A16Fp4`) is left out: layers that
it fuses must have one scale of the tensor, and layers do not share that here. It runs q, k and v as one matrix, gate and up as
another, and the experts of a block in one kernel: fused layers in different schemes do not load (vllm-project/vllm issues 7086
and 41457, intel/auto-round issue 2174).
"""

from __future__ import annotations

from mpsearch.layer import LayerSpec
from mpsearch.runtimes.base import Runtime, whole_groups
from mpsearch.schemes.base import QuantScheme
from mpsearch.schemes.codebook import MXFP4, Codebook
from mpsearch.schemes.floating import Float
from mpsearch.schemes.input import IntegerInput
from mpsearch.schemes.integer import Integer
from mpsearch.schemes.level_input import LevelInput


class VLLM(Runtime):
    """vLLM on a GPU."""

    name = "vllm"
    what = (
        "Linear layers at 4 or 8 bits, symmetric, per row or in whole groups of 32, 64 or 128, at 8 bits with 8-bit inputs, "
        "in E4M3 with per-row or per-tensor float32 scales, also with E4M3 inputs, or in MXFP4"
    )
    exporter = "compressed_tensors"
    shared = ("*.q_proj|*.k_proj|*.v_proj", "*.gate_proj|*.up_proj", "*.experts.**")

    def runs(self, layer: LayerSpec, scheme: QuantScheme) -> bool:
        """Linear layers: 4 or 8 bits per row or in whole groups of 32, 64 or 128; 8 bits with 8-bit inputs; FP8; MXFP4."""
        if isinstance(scheme, Float):
            return True
        if isinstance(scheme, Codebook) and layer.kind == "linear":
            fp8 = (scheme.levels, scheme.scale) == ("e4m3", "float32") and scheme.group_size in ("channel", "tensor")
            fp8 = fp8 and scheme.input in (None, LevelInput("e4m3", "token"), LevelInput("e4m3", "static"))
            return fp8 or (scheme == MXFP4 and whole_groups(layer, 32))
        if not isinstance(scheme, Integer) or layer.kind != "linear":
            return False
        if scheme.input is not None:
            weight = scheme.bits == 8 and scheme.symmetric and scheme.group_size in ("channel", "tensor")
            x = scheme.input
            return weight and isinstance(x, IntegerInput) and x.bits == 8 and x.symmetric and x.scale != "tensor"
        if scheme.group_size == "channel":
            return scheme.bits in (4, 8) and scheme.symmetric
        return scheme.bits in (4, 8) and scheme.group_size in (32, 64, 128) and whole_groups(layer, int(scheme.group_size))
