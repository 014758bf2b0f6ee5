"""The contract of the runtimes: where an allocation is to run, the layers that are fused there, and the schemes that can run.

A scheme that is not known to run is not proposed: a profile contains only what a runtime's sources or manual say it loads.

To add a runtime: write `runtimes/<name>.py` with a subclass of `Runtime`, and `conf/runtime/<name>.yaml` with its `_target_`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from mpsearch.layer import LayerSpec
from mpsearch.schemes.base import QuantScheme


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


def whole_groups(layer: LayerSpec, group_size: int) -> bool:
    """Whether the columns of the layer's weight are a multiple of the group size."""
    columns = layer.numel // layer.shape[0] if layer.shape[0] else 0
    return columns % group_size == 0
