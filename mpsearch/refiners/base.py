"""The contract of the refiners: they quantize the layers of an allocation once more, jointly, without labels.

The weight bank quantizes every layer as if all others were float. In an allocation they are not, and a layer can make up for
the errors of those before it. Schemes stay as they are, and with them the size, to the byte; biases change where there are some.

A refiner is a frozen dataclass whose fields are its settings. To add one: write `refiners/<name>.py` with a subclass of `Refiner`
and `conf/refiner/<name>.yaml` with its `_target_` and defaults.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from mpsearch.allocation import Allocation
from mpsearch.engine.engine import QuantEngine
from mpsearch.engine.weight_files import WeightFiles
from mpsearch.layer import LayerSpec
from mpsearch.schemes.base import QuantizedTensor


class Refinement(Protocol):
    """Refines one allocation of an engine after another."""

    def __call__(self, allocation: Allocation, files: WeightFiles | None = None) -> QuantEngine:
        """An engine whose bank has the refined weights and biases of the allocation.

        The engine's model and bank stay as they are. A layer that `files` has is read; all others are written there, so that an
        interrupted refinement is resumed. Every layer of the allocation has its files in the end.
        """


class Refiner(ABC):
    """How an allocation is refined; a frozen dataclass."""

    @abstractmethod
    def start(self, engine: QuantEngine) -> Refinement:
        """What refines allocations of this engine; what does not depend on the allocation is done once."""


Refined = tuple[QuantizedTensor, Mapping[str, Tensor]]
"""A layer's weight, and its biases by module: float32 `[out]`."""


def read_refined(engine: QuantEngine, layer: LayerSpec, scheme: str, files: WeightFiles | None) -> Refined | None:
    """What the files have of a layer; `None` where they have no intact weight, or no biases."""
    if files is None or (biases := files.read_biases(layer.name, scheme)) is None:
        return None
    weight = files.read(layer.name, scheme, engine.space.schemes[scheme], layer.shape)
    return None if weight is None else (weight, biases)


def write_refined(layer: LayerSpec, scheme: str, refined: Refined, files: WeightFiles | None) -> None:
    """Keep a layer's weight and biases in the files, if there are any."""
    if files is not None:
        files.write(layer.name, scheme, refined[0])
        files.write_biases(layer.name, scheme, refined[1])
