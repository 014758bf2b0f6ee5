"""OpenVINO on a CPU, from the files of `exporters.openvino`.

Constants of 2, 3, 4, 6 or 8 bits in layers of any kind, and 16-bit floats (checked by running them: openvino 2026.4); inputs with
a static symmetric 8-bit scale for Linear layers and convolutions of 8-bit weights. With zero points, outputs were off by 2 %.
"""

from __future__ import annotations

from mpsearch.layer import LayerSpec
from mpsearch.runtimes.base import Runtime, whole_groups
from mpsearch.schemes.base import QuantScheme
from mpsearch.schemes.floating import Float
from mpsearch.schemes.input import IntegerInput
from mpsearch.schemes.integer import Integer

KINDS = ("linear", "conv1d", "conv2d", "conv3d", "embedding")


class OpenVINO(Runtime):
    """OpenVINO on a CPU."""

    name = "openvino"
    what = (
        "Linear layers, convolutions and embeddings at 2, 3, 4, 6 or 8 bits, per tensor, per row or in whole groups, or in "
        "16-bit floats, and Linear layers and convolutions at 8 bits, symmetric, per row, with static symmetric 8-bit inputs"
    )
    exporter = "openvino"

    def runs(self, layer: LayerSpec, scheme: QuantScheme) -> bool:
        """2, 3, 4, 6 or 8 bits in whole groups; except embeddings, also with static 8-bit inputs; 16-bit floats."""
        if isinstance(scheme, Float):
            return scheme.format == "float32" or layer.kind in KINDS
        if not isinstance(scheme, Integer) or layer.kind not in KINDS:
            return False
        if scheme.input is not None:
            weight = (scheme.bits, scheme.symmetric, scheme.group_size) == (8, True, "channel")
            x = scheme.input
            static = isinstance(x, IntegerInput) and (x.bits, x.scale, x.symmetric) == (8, "static", True)
            return weight and static and layer.kind != "embedding"
        fits = isinstance(scheme.group_size, str) or whole_groups(layer, scheme.group_size)
        return scheme.bits in (2, 3, 4, 6, 8) and fits
