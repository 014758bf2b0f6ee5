"""The packed model in one file, which `mpsearch.packed.model.load` reads: nothing else is needed but the network's code."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

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

    def decode(self, path: Path, model: nn.Module) -> dict[str, Tensor]:
        """Layer name -> float32 weight, output channels first."""
        modules = packed.packed_modules(packed.load(path, model)).values()
        return {module.owners[0]: module.quantized().dequantize() for module in modules}
