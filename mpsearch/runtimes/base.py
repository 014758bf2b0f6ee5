"""The contract of the runtimes: where an allocation is to run, which layers it fuses there, and which schemes it can run.

What is not known to run is not proposed: a profile says what a runtime's sources or manual say it loads, and no more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from mpsearch.layer import LayerSpec
from mpsearch.schemes.base import QuantScheme


class Runtime(ABC):
    """`what` describes what it runs; `shared` are the patterns (`mpsearch.graph.sharing`) of layers that it runs as one."""

    name: ClassVar[str]
    what: ClassVar[str]
    shared: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def runs(self, layer: LayerSpec, scheme: QuantScheme) -> bool:
        """Whether the layer can run in the scheme, which for a float scheme means: is left as it is."""


def whole_groups(layer: LayerSpec, group_size: int) -> bool:
    """Whether a row of the layer's weight is a whole number of groups."""
    columns = layer.numel // layer.shape[0] if layer.shape[0] else 0
    return columns % group_size == 0
