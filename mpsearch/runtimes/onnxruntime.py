"""ONNX Runtime on a CPU, from the files of `exporters.onnx`.

Weights of 2, 4 or 8 bits and 16-bit floats are constants that ONNX Runtime computes in float32 when it loads the file, so that
layers of any kind may have them (checked by running them: onnxruntime 1.32; 2 bits need opset 25). ONNX has no integers of 1, 3,
5, 6 or 7 bits. Linear layers of 8 bits with a static 8-bit scale of their input run in integers (`MatMulInteger`). Convolutions
with such inputs run in integers where all that reads their output is quantized too (`QLinearConv`, see
`exporters.onnx_convolutions`); others, as those in front of a residual addition, multiply rounded inputs in float32.
"""

from __future__ import annotations

from mpsearch.layer import LayerSpec
from mpsearch.runtimes.base import TRANSPOSED, ConstantWeights
from mpsearch.schemes.input import IntegerInput


class ONNXRuntime(ConstantWeights):
    """ONNX Runtime on a CPU."""

    name = "onnxruntime"
    what = (
        "Linear layers, convolutions and embeddings at 2, 4 or 8 bits, per tensor, per row or in whole groups, or in 16-bit "
        "floats, and Linear layers and convolutions at 8 bits, symmetric, per row, with static 8-bit inputs"
    )
    exporter = "onnx"
    widths = (2, 4, 8)

    def runs_input(self, layer: LayerSpec, x: IntegerInput) -> bool:
        """Linear layers and convolutions that are not transposed: static 8-bit inputs."""
        return (x.bits, x.scale) == (8, "static") and layer.kind not in ("embedding", *TRANSPOSED)
