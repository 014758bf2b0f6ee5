"""The contract of the runtimes: where an allocation is to run, the layers that are fused there, and the schemes that can run.

A scheme that is not known to run is not proposed: a profile contains only what a runtime's sources or manual say it loads.

To add a runtime: write `runtimes/<name>.py` with a subclass of `Runtime`, and `conf/runtime/<name>.yaml` with its `_target_`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from mpsearch.layer import LayerSpec
from mpsearch.schemes.base import QuantScheme
from mpsearch.schemes.floating import Float
from mpsearch.schemes.input import IntegerInput
from mpsearch.schemes.integer import Integer

TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
KINDS = ("linear", "conv1d", "conv2d", "conv3d", "embedding", *TRANSPOSED)  # of layers whose weight is a constant of a graph


class Runtime(ABC):
    """A profile of a runtime.

    Attributes
    ----------
    name
        Its name in reports and error messages.
    what
        A phrase for what it runs.
    shared
        Patterns (`mpsearch.graph.sharing`) of layers that it runs as one.
    exporter
        The exporter whose files it opens.
    """

    name: ClassVar[str]
    what: ClassVar[str]
    shared: ClassVar[tuple[str, ...]] = ()
    exporter: ClassVar[str] = "native"

    @abstractmethod
    def runs(self, layer: LayerSpec, scheme: QuantScheme) -> bool:
        """Whether the layer can run in the scheme; a float scheme leaves the layer as it is."""


class ConstantWeights(Runtime):
    """A runtime of graphs, which computes float32 weights from constants, so that layers of any kind may have them.

    Attributes
    ----------
    widths
        Bits of the integers that a constant may hold.
    """

    widths: ClassVar[tuple[int, ...]]

    def runs(self, layer: LayerSpec, scheme: QuantScheme) -> bool:
        """Integers of `widths` per tensor, per row or in whole groups, 16-bit floats, and 8-bit weights with `runs_input`."""
        if isinstance(scheme, Float):
            return scheme.format == "float32" or layer.kind in KINDS
        if not isinstance(scheme, Integer) or layer.kind not in KINDS:
            return False
        if scheme.input is not None:
            weight = (scheme.bits, scheme.symmetric, scheme.group_size) == (8, True, "channel")
            return weight and isinstance(scheme.input, IntegerInput) and self.runs_input(layer, scheme.input)
        fits = isinstance(scheme.group_size, str) or whole_groups(layer, scheme.group_size)
        return scheme.bits in self.widths and fits

    @abstractmethod
    def runs_input(self, layer: LayerSpec, x: IntegerInput) -> bool:
        """Whether the layer, with symmetric 8-bit weights and a scale per row, runs with this input."""


def whole_groups(layer: LayerSpec, group_size: int) -> bool:
    """Whether the columns of the layer's weight are a multiple of the group size."""
    columns = layer.numel // layer.shape[0] if layer.shape[0] else 0
    return columns % group_size == 0
