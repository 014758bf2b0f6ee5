"""OpenVINO on a CPU, from the files of `exporters.openvino`.

Constants of 2, 3, 4, 6 or 8 bits in layers of any kind, and 16-bit floats (checked by running them: openvino 2026.4). Linear
layers and convolutions of 8-bit weights with a static 8-bit scale of their input run in integers, with and without zero points.
"""

from __future__ import annotations

from mpsearch.layer import LayerSpec
from mpsearch.runtimes.base import TRANSPOSED, ConstantWeights
from mpsearch.schemes.input import IntegerInput


class OpenVINO(ConstantWeights):
    """OpenVINO on a CPU."""

    name = "openvino"
    what = (
        "Linear layers, convolutions and embeddings at 2, 3, 4, 6 or 8 bits, per tensor, per row or in whole groups, or in "
        "16-bit floats, and Linear layers and convolutions at 8 bits, symmetric, per row, with static 8-bit inputs"
    )
    exporter = "openvino"
    widths = (2, 3, 4, 6, 8)

    def runs_input(self, layer: LayerSpec, x: IntegerInput) -> bool:
        """Linear layers and convolutions that are not transposed: static 8-bit inputs."""
        return (x.bits, x.scale) == (8, "static") and layer.kind not in ("embedding", *TRANSPOSED)
