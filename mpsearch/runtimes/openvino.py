"""OpenVINO on a CPU, from the files of `exporters.openvino`.

Constants of 2, 3, 4, 6 or 8 bits in layers of any kind, and 16-bit floats (checked by running them: openvino 2026.4); inputs with
a static symmetric 8-bit scale for Linear layers and 2-D convolutions of 8-bit weights. With zero points outputs were off by 2 %,
and in 1-D convolutions on a CPU with VNNI.
"""

from __future__ import annotations

from mpsearch.layer import LayerSpec
from mpsearch.runtimes.base import ConstantWeights
from mpsearch.schemes.input import IntegerInput


class OpenVINO(ConstantWeights):
    """OpenVINO on a CPU."""

    name = "openvino"
    what = (
        "Linear layers, convolutions and embeddings at 2, 3, 4, 6 or 8 bits, per tensor, per row or in whole groups, or in "
        "16-bit floats, and Linear layers and 2-D convolutions at 8 bits, symmetric, per row, with static symmetric 8-bit inputs"
    )
    exporter = "openvino"
    widths = (2, 3, 4, 6, 8)

    def runs_input(self, layer: LayerSpec, x: IntegerInput) -> bool:
        """Linear layers and 2-D convolutions: static symmetric 8-bit inputs."""
        return (x.bits, x.scale, x.symmetric) == (8, "static", True) and layer.kind in ("linear", "conv2d")
