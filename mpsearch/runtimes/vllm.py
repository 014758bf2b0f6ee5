"""vLLM, by way of compressed-tensors, as of vLLM 0.33 (vllm/model_executor/layers/quantization/compressed_tensors).

Weights alone, 2 to 8 bits: `CompressedTensorsWNA16` with per-row scales or one per 32, 64 or 128 weights of a row
(`MARLIN_SUPPORTED_GROUP_SIZES`; 4 and 8 bits run on Marlin, the other widths on Humming), with zero points or without. Inputs of
4 or 8 bits with per-token scales: `CompressedTensorsWNA8Int` and `WNA4Int`, the same weights; `CompressedTensorsW8A8Int8`,
symmetric 8-bit weights with per-row or per-tensor scales, also with a static scale of the input. Floats, weights alone:
`CompressedTensorsW8A16Fp8`, E4M3 with per-row or per-tensor float32 scales, `CompressedTensorsW4A4Mxfp4`, and NVFP4
(`CompressedTensorsW4A4Fp4`); with inputs: `CompressedTensorsW8A8Fp8` in E4M3, per-token scales or a static one,
`CompressedTensorsW8A8Mxfp8`, and NVFP4. On GPUs that multiply MXFP4 vLLM rounds the inputs of MXFP4 layers too. Embeddings stay
float: vLLM reads packed ones (`CompressedTensorsEmbeddingWNA16Int`), but transformers does not open a folder that has them.

It runs q, k and v as one matrix, gate and up as another, and the experts of a block in one kernel: fused layers in different
schemes do not load (vllm-project/vllm issues 7086 and 41457, intel/auto-round issue 2174). Experts with quantized inputs are left
out: no reader on a CPU runs them.
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

FUSED = ("*.q_proj|*.k_proj|*.v_proj", "*.gate_proj|*.up_proj")  # layers that it runs as one matrix, which has one tensor scale
E4M3_INPUTS = (None, LevelInput("e4m3", "token"), LevelInput("e4m3", "static"))
MXFP8 = Codebook("e4m3", 32, "e8m0", LevelInput("e4m3", "mx"))
NVFP4 = (Codebook("e2m1", 16, "e4m3"), Codebook("e2m1", 16, "e4m3", LevelInput("e2m1", "nv")))


class VLLM(Runtime):
    """vLLM on a GPU."""

    name = "vllm"
    what = (
        "Linear layers at 2 to 8 bits per row or in whole groups of 32, 64 or 128, also with 4- or 8-bit inputs, in E4M3 with "
        "per-row or per-tensor float32 scales, also with E4M3 inputs, in MXFP4, MXFP8 or NVFP4"
    )
    exporter = "compressed_tensors"
    shared = (*FUSED, "*.experts.**")

    def runs(self, layer: LayerSpec, scheme: QuantScheme) -> bool:
        """Linear layers: 2 to 8 bits per row or in whole groups, FP8, MXFP4, MXFP8, NVFP4."""
        if isinstance(scheme, Float):
            return True
        if ".experts." in layer.name and scheme.input_format is not None:
            return False
        if layer.kind != "linear":
            return False
        if isinstance(scheme, Codebook):
            fp8 = (scheme.levels, scheme.scale) == ("e4m3", "float32") and scheme.group_size in ("channel", "tensor")
            blocks = scheme in (MXFP4, MXFP8, *NVFP4) and whole_groups(layer, int(scheme.group_size))
            return (fp8 and scheme.input in E4M3_INPUTS) or blocks
        return isinstance(scheme, Integer) and _multiplies(layer, scheme)


def _multiplies(layer: LayerSpec, scheme: Integer) -> bool:
    x = scheme.input
    if x is not None and not (isinstance(x, IntegerInput) and x.symmetric):
        return False
    if (
        isinstance(x, IntegerInput)
        and x.bits == 8
        and scheme.bits == 8
        and scheme.symmetric
        and isinstance(scheme.group_size, str)
    ):
        return x.scale != "tensor"
    if isinstance(x, IntegerInput) and (x.scale != "token" or x.bits not in (4, 8)):
        return False
    fits = scheme.group_size == "channel" or (scheme.group_size in (32, 64, 128) and whole_groups(layer, int(scheme.group_size)))
    return scheme.bits >= 2 and fits
