"""The packed model in one file, which `mpsearch.packed.model.load` reads: nothing else is needed but the network's code."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from mpsearch.exporters.base import Exporter, Picked
from mpsearch.packed import model as packed


class Packed(Exporter):
    """Writes `packed.safetensors`: the stored tensors of every quantized layer, and all other parameters and buffers."""

    def export(self, picked: Picked, engine: packed.Weights, folder: Path) -> Path:
        """The path of `packed.safetensors`."""
        with packed.packed(engine, picked.evaluation.allocation) as model:
            return packed.save(model, folder / "packed.safetensors", picked.folds)

    def load(self, path: Path, model: nn.Module) -> nn.Module:
        """See `mpsearch.packed.model.load`."""
        return packed.load(path, model)
