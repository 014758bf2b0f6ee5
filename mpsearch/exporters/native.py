"""Our own format: `allocation.json` for people and programs, and the packed tensors that it names in a safetensors file.

`load_allocation` reads them and makes of the float model, without data, the one that was scored, to the last bit, or the packed
one that was confirmed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from mpsearch.evaluation import Evaluation
from mpsearch.exporters.allocation_file import FORMAT, VERSION, load_allocation, sha256
from mpsearch.exporters.base import Exporter, Picked, remove_unreferenced
from mpsearch.files import file_errors, write_atomically
from mpsearch.files.tensor_file import SHA256
from mpsearch.graph.channel_scaling import Equalization
from mpsearch.packed.model import Weights


class Native(Exporter):
    """Writes `allocation.json`, and `allocation-<digest>.safetensors` next to it; `allocation.schema.json` describes the first.

    The tensors' name is that of their content and the JSON is written last, so that a pair that was exported earlier stays whole
    until it is replaced. Tensors that no JSON file of the folder names any more are then removed.
    """

    def export(self, picked: Picked, engine: Weights, folder: Path) -> Path:
        """The path of `allocation.json`."""
        layers: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        space = engine.space
        for group in space.groups:
            scheme = picked.evaluation.allocation[group.name]
            for layer in group.layers:
                quantized, biases = engine.quantized(layer.name, scheme), engine.biases(layer.name, scheme)
                tensors.update({f"{layer.name}.{key}": value.contiguous() for key, value in quantized.tensors.items()})
                tensors.update({f"{module}.bias": bias for module, bias in biases.items()})
                layers[layer.name] = {
                    "kind": layer.kind,
                    "shape": list(layer.shape),
                    "modules": list(layer.modules),
                    "group": group.name,
                    "scheme": {"name": scheme, **space.schemes[scheme].fields()},
                    "size_bytes": quantized.nbytes,
                    "tensors": sorted(quantized.tensors),
                    **{name: tensor.item() for name, tensor in quantized.input_params.items()},
                    "biases": sorted(biases),
                }
        with file_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        allocation = {
            "format": FORMAT,
            "version": VERSION,
            "size_bytes": picked.evaluation.size_bytes,
            "other_bytes": space.other_bits // 8,
            "average_bits": picked.evaluation.average_bits,
            "fraction": picked.evaluation.fraction,
            "scores": {split: _score(e, picked.quality_name) for split, e in picked.scores.items()},
            "float_scores": {split: _score(e, picked.quality_name) for split, e in picked.baselines.items()},
            "model_sha256": picked.model_sha256,
            "folded_batch_norms": [list(pair) for pair in picked.folds],
            "equalization": picked.equalization and _write_equalization(picked.equalization, folder),
            "tensors": _write("allocation", save_tensors(tensors), folder),
            "layers": layers,
        }
        allocation[SHA256] = sha256(allocation)
        path = folder / "allocation.json"
        write_atomically(path, _lines(allocation))
        remove_unreferenced(folder)
        return path

    def load(self, path: Path, model: nn.Module) -> nn.Module:
        """See `ExportedAllocation.apply`."""
        return load_allocation(path).apply(model)

    def files(self, path: Path) -> list[Path]:
        """The JSON and the files that it names."""
        about = load_allocation(path).data
        return [path, *(path.with_name(about[key]["file"]) for key in ("tensors", "equalization") if about[key])]

    def open(self, path: Path, model: nn.Module) -> nn.Module:
        """See `ExportedAllocation.pack`: on the compiled kernels."""
        return load_allocation(path).pack(model)

    def decode(self, path: Path, model: nn.Module) -> dict[str, Tensor]:
        """Layer name -> float32 weight, output channels first; `model` is not used."""
        allocation = load_allocation(path)
        layers = zip(allocation.stored, allocation.layers(), strict=True)
        return {stored.name: layer.weight.dequantize() for stored, layer in layers}


def _lines(allocation: Mapping[str, Any]) -> str:
    """JSON with a line for each key and for each layer: an indented one would take a third more."""
    parts = {key: json.dumps(value, allow_nan=False) for key, value in allocation.items()}
    layers = (f"  {json.dumps(name)}: {json.dumps(layer, allow_nan=False)}" for name, layer in allocation["layers"].items())
    parts["layers"] = "{\n" + ",\n".join(layers) + "\n }"
    return "{\n" + ",\n".join(f" {json.dumps(key)}: {part}" for key, part in parts.items()) + "\n}\n"


def _write(what: str, data: bytes, folder: Path) -> dict[str, str]:
    """Write a file named by its content; its name and digest."""
    digest = hashlib.sha256(data).hexdigest()
    name = f"{what}-{digest[:12]}.safetensors"
    write_atomically(folder / name, data)
    return {"file": name, "sha256": digest}


def _write_equalization(equalization: Equalization, folder: Path) -> dict[str, Any]:
    return {
        "equalizer": equalization.equalizer,
        **_write("equalization", equalization.content, folder),
        **equalization.names,
    }


def _score(evaluation: Evaluation, quality_name: str) -> dict[str, Any]:
    """Numbers that are not finite, as the loss of a model that broke, become null: JSON has no others."""
    score = {
        "loss": evaluation.loss,
        "cross_entropy": evaluation.cross_entropy,
        quality_name: evaluation.quality,
        f"{quality_name}_low": evaluation.quality_low,
        f"{quality_name}_high": evaluation.quality_high,
        "n_samples": evaluation.n_samples,
    }
    return {key: value if math.isfinite(value) else None for key, value in score.items()}
