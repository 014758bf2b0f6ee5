"""Our own format: `allocation.json` for people and programs, `allocation.safetensors` with the packed tensors it speaks of.

`load_allocation` reads them and makes of the float model, without data, the very one that was scored, to the last bit, or the
packed one that was confirmed.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from mpsearch.engine import QuantEngine, quantize_input
from mpsearch.equalization import FILE, Equalization, load_equalization
from mpsearch.errors import InputError
from mpsearch.evaluation import Evaluation
from mpsearch.exporters.base import Exporter, Picked
from mpsearch.files import write_atomically
from mpsearch.fold import Pair, apply_folds
from mpsearch.layer import from_rows, weights_sha256
from mpsearch.packed import pack
from mpsearch.packed_layer import QuantizedLayer
from mpsearch.projections import expose_projections
from mpsearch.schemes.base import QuantizedTensor, scheme_from_fields

FORMAT, VERSION = "mpsearch-allocation", 1


class Native(Exporter):
    """Writes `allocation.json` and `allocation.safetensors`; their schema is in the README."""

    def export(self, picked: Picked, engine: QuantEngine, folder: Path) -> Path:
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
                    **{name: tensor.item() for name, tensor in quantized.of_input.items()},
                    "biases": sorted(biases),
                }
        data, equalization = save_tensors(tensors), picked.equalization
        allocation = {
            "format": FORMAT,
            "version": VERSION,
            "size_bytes": picked.evaluation.size_bytes,
            "average_bits": picked.evaluation.average_bits,
            "fraction": picked.evaluation.fraction,
            "scores": {split: _score(e, picked.quality_name) for split, e in picked.scores.items()},
            "float_scores": {split: _score(e, picked.quality_name) for split, e in picked.baselines.items()},
            "model_sha256": picked.model_sha256,
            "folded_batch_norms": [list(pair) for pair in picked.folds],
            "equalization": equalization
            and {"equalizer": equalization.equalizer, "file": FILE, "sha256": equalization.sha256, **equalization.names},
            "tensors": {"file": "allocation.safetensors", "sha256": hashlib.sha256(data).hexdigest()},
            "layers": layers,
        }
        folder.mkdir(parents=True, exist_ok=True)
        if equalization is not None:
            equalization.save(folder / FILE)
        temporary = folder / ".allocation.safetensors.tmp"
        temporary.write_bytes(data)
        temporary.replace(folder / "allocation.safetensors")
        write_atomically(folder / "allocation.json", json.dumps(allocation, indent=1) + "\n")
        return folder / "allocation.json"


@dataclass(frozen=True)
class ExportedAllocation:
    """An allocation as exported: `data` is the JSON, `tensors` the packed tensors, `equalization` what was done before."""

    data: dict[str, Any]
    tensors: dict[str, Tensor]
    equalization: Equalization | None = None

    @property
    def schemes(self) -> dict[str, str]:
        """Layer -> scheme name."""
        return {name: layer["scheme"]["name"] for name, layer in self.data["layers"].items()}

    @torch.no_grad()
    def apply(self, model: nn.Module) -> nn.Module:
        """Fold, equalize and quantize the float `model` in place, as the search scored it; returns it in eval mode.

        `InputError` where its weights are not those that were searched.
        """
        self._check(model)
        apply_folds(expose_projections(model.eval()), self.folds)
        if self.equalization is not None:
            self.equalization.apply(model)
        for layer in self.layers():
            owner: Any = model.get_submodule(layer.modules[0])
            owner.weight.copy_(from_rows(owner, layer.weight.dequantize()))
            for name in layer.modules:
                quantize_input(model.get_submodule(name), layer.weight)
            for name, bias in layer.biases.items():
                biased: Any = model.get_submodule(name)
                biased.bias.copy_(bias)
        return model

    def pack(self, model: nn.Module) -> nn.Module:
        """Make of the float `model`, in place, the packed one that was confirmed; returns it in eval mode.

        It runs on packed weights and holds no others: `mpsearch.packed.save` writes it. `InputError` as in `apply`.
        """
        self._check(model)
        return pack(model, self.layers(), self.folds, self.equalization)

    @property
    def folds(self) -> list[Pair]:
        """The (layer, batch norm) pairs to fold."""
        return [(layer, norm) for layer, norm in self.data["folded_batch_norms"]]

    def layers(self) -> list[QuantizedLayer]:
        """Every layer with its stored weight."""
        found = []
        for name, layer in self.data["layers"].items():
            scheme = scheme_from_fields({key: value for key, value in layer["scheme"].items() if key != "name"})
            stored = {key: self.tensors[f"{name}.{key}"] for key in layer["tensors"]}
            weight = QuantizedTensor(scheme, tuple(layer["shape"]), stored)
            biases = {module: self.tensors[f"{module}.bias"] for module in layer["biases"]}
            found.append(QuantizedLayer(layer["kind"], tuple(layer["modules"]), weight, biases))
        return found

    def _check(self, model: nn.Module) -> None:
        found = weights_sha256(model)
        if found != self.data["model_sha256"]:
            raise InputError(
                f"This allocation is for a model with checksum {self.data['model_sha256'][:12]}…; this one has {found[:12]}…. "
                "Load the same float weights, unfolded and unquantized."
            )


def load_allocation(path: Path | str) -> ExportedAllocation:
    """Read an `allocation.json` and the tensors beside it; `InputError` where either is missing, damaged or of another format."""
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise InputError(f"{path} is no allocation of mpsearch: its format is not '{FORMAT}'.")
        if data["version"] != VERSION:
            raise InputError(f"{path} has version {data['version']}; this mpsearch reads version {VERSION}.")
        if missing := {"layers", "model_sha256", "folded_batch_norms"} - set(data):
            raise KeyError(*sorted(missing))
        stored = (path.parent / data["tensors"]["file"]).read_bytes()
        if hashlib.sha256(stored).hexdigest() != data["tensors"]["sha256"]:
            raise InputError(f"{path.parent / data['tensors']['file']} is not the file that {path.name} was written with.")
        equalization = _equalization(path.parent, data["equalization"]) if data.get("equalization") else None
        return ExportedAllocation(data, load_tensors(stored), equalization)
    except IsADirectoryError:
        raise InputError(f"{path} is a folder. Give the allocation.json in it.") from None
    except FileNotFoundError as error:
        raise InputError(f"{error.filename} does not exist. Give the allocation.json that mpsearch export wrote.") from None
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError, SafetensorError) as error:
        raise InputError(f"{path} is damaged ({type(error).__name__}: {error}). Export it again.") from None


def _equalization(folder: Path, about: dict[str, Any]) -> Equalization:
    found = load_equalization(folder / about["file"])
    if found.sha256 != about["sha256"]:
        raise InputError(f"{folder / about['file']} is not the file that the allocation was written with. Export it again.")
    return found


def _score(evaluation: Evaluation, quality_name: str) -> dict[str, Any]:
    return {
        "loss": evaluation.loss,
        "cross_entropy": evaluation.cross_entropy,
        quality_name: evaluation.quality,
        f"{quality_name}_low": evaluation.quality_low,
        f"{quality_name}_high": evaluation.quality_high,
        "n_samples": evaluation.n_samples,
    }
