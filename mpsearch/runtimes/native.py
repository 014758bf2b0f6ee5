"""mpsearch itself: every scheme runs, on a kernel or dequantized, and nothing is fused."""

from __future__ import annotations

from mpsearch.layer import LayerSpec
from mpsearch.runtimes.base import Runtime
from mpsearch.schemes.base import QuantScheme


class Native(Runtime):
    """Packed weights on this package's kernels."""

    name = "mpsearch"
    what = "everything"

    def runs(self, layer: LayerSpec, scheme: QuantScheme) -> bool:
        """Always."""
        return True
