"""Read an allocation that `exporters.native` wrote, check it, and apply it to the float model.

`allocation.json` holds a digest over its own content, and those of the files that it names. They find damage and careless edits;
a digest is no signature, so load files of a source that you trust.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from mpsearch.errors import InputError
from mpsearch.files import read_regular
from mpsearch.files.strict_json import JsonObject, canonical, parse
from mpsearch.files.tensor_file import SHA256, check_regular, sibling
from mpsearch.graph.channel_scaling import Equalization, load_equalization
from mpsearch.graph.fold import Pair, apply_folds
from mpsearch.graph.projections import expose_projections
from mpsearch.graph.surgery import quantize_input
from mpsearch.layer import from_rows, set_values, weights_sha256
from mpsearch.packed.layers import QuantizedLayer
from mpsearch.packed.model import pack
from mpsearch.packed.stored import StoredLayer, check_fits, check_used

FORMAT, VERSION = "mpsearch-allocation", 2
KEYS = (
    *("format", "version", "size_bytes", "other_bytes", "average_bits", "fraction", "scores", "float_scores", "model_sha256"),
    *("folded_batch_norms", "equalization", "tensors", "layers", SHA256),
)
LAYER_KEYS = ("kind", "shape", "modules", "group", "scheme", "size_bytes", "tensors", "biases")
REMEDY = "Give the allocation.json that mpsearch export wrote, or export it again."


@dataclass(frozen=True)
class ExportedAllocation:
    """An allocation as exported: `data` is the JSON, `tensors` the packed tensors, `equalization` how channels were scaled."""

    data: dict[str, Any]
    tensors: dict[str, Tensor]
    stored: tuple[StoredLayer, ...]
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
        apply_folds(model, self.folds)
        if self.equalization is not None:
            self.equalization.apply(model)
        for layer in self.layers():
            owner: Any = model.get_submodule(layer.modules[0])
            set_values(owner.weight, from_rows(owner, layer.weight.dequantize()))
            for name in layer.modules:
                quantize_input(model.get_submodule(name), layer.weight)
            for name, bias in layer.biases.items():
                biased: Any = model.get_submodule(name)
                set_values(biased.bias, bias)
        return model

    def pack(self, model: nn.Module) -> nn.Module:
        """Replace the layers of the float `model` by packed ones, in place; returns it in eval mode.

        It runs on packed weights and holds no others: `mpsearch.packed.model.save` writes it. `InputError` as in `apply`.
        """
        self._check(model)
        return pack(model, self.layers(), self.folds, self.equalization)

    @property
    def folds(self) -> list[Pair]:
        """The (layer, batch norm) pairs to fold."""
        return [(layer, norm) for layer, norm in self.data["folded_batch_norms"]]

    def layers(self) -> list[QuantizedLayer]:
        """Every layer with its stored weight and corrected biases."""
        return [
            QuantizedLayer(
                layer.kind,
                layer.modules,
                layer.weight({key: self.tensors[f"{layer.name}.{key}"] for key in layer.keys}),
                {module: self.tensors[f"{module}.bias"] for module in layer.about.texts("biases")},
            )
            for layer in self.stored
        ]

    def _check(self, model: nn.Module) -> None:
        digest = weights_sha256(model)
        if digest != self.data["model_sha256"]:
            raise InputError(
                f"This allocation is for a model with checksum {self.data['model_sha256'][:12]}…; this one has {digest[:12]}…. "
                "Load the same float weights, unfolded and unquantized."
            )
        check_fits(expose_projections(model.eval()), self.stored, "The allocation")


def load_allocation(path: Path | str) -> ExportedAllocation:
    """Read an `allocation.json` and the files that it names in the same folder.

    Checked are the JSON, that every stored tensor is used once and is what its scheme stores, all sizes, and all digests.
    `InputError`, which names the file and the place, where anything is missing, damaged or of another format.
    """
    path = Path(path)
    check_regular(path, REMEDY)
    about = JsonObject(parse(read_regular(path), path, REMEDY), path, REMEDY)
    if about.data.get("format") != FORMAT:
        raise InputError(f"{path} is no allocation of mpsearch: its format is not '{FORMAT}'. {REMEDY}")
    if about.data.get("version") != VERSION:
        raise InputError(f"{path} has version {about.data.get('version')}; this mpsearch reads {VERSION}. Export it again.")
    about.only(KEYS)
    about.pairs("folded_batch_norms")
    described = about.object("layers")
    layers = tuple(_read_layer(name, described.object(name)) for name in described.data)
    sizes = [layer.size_bytes for layer in layers]
    if about.integer("size_bytes") != sum(sizes) + about.integer("other_bytes"):
        raise about.damaged(
            f"size_bytes is {about.integer('size_bytes'):,}, but its {len(layers)} layers have {sum(sizes):,} bytes and the "
            f"other parameters {about.integer('other_bytes'):,}: a layer was deleted or changed"
        )
    tensors = _tensors(about)
    _check_tensors(about, layers, tensors)
    if sha256(about.data) != about.text(SHA256):
        raise about.damaged("its content does not match its digest")
    about.text("model_sha256")
    return ExportedAllocation(about.data, tensors, layers, _equalization(about) if about.data["equalization"] else None)


def sha256(data: Mapping[str, Any]) -> str:
    """Hex digest of an allocation's JSON but for this digest itself."""
    return hashlib.sha256(canonical({key: value for key, value in data.items() if key != SHA256}).encode()).hexdigest()


def _read_layer(name: str, about: JsonObject) -> StoredLayer:
    scheme = about.object("scheme")
    scheme.text("name")
    fields = {key: value for key, value in scheme.data.items() if key != "name"}
    layer = StoredLayer.read(name, about, JsonObject(fields, about.path, about.remedy, scheme.place))
    if about.integer("size_bytes") != layer.size_bytes:
        raise about.damaged(f"'{about.place}.size_bytes' must be {layer.size_bytes:,}, got {about.integer('size_bytes'):,}")
    if about.texts("tensors") != layer.keys:
        raise about.damaged(f"'{about.place}.tensors' must be {', '.join(layer.keys)}")
    return layer


def _tensors(about: JsonObject) -> dict[str, Tensor]:
    entry = about.object("tensors")
    file = sibling(Path(about.path), entry.text("file"), REMEDY)
    stored = read_regular(file)
    if hashlib.sha256(stored).hexdigest() != entry.text(SHA256):
        raise InputError(f"{file} is not the file that {Path(about.path).name} was written with. {REMEDY}")
    try:
        return load_tensors(stored)
    except (SafetensorError, KeyError, ValueError) as error:
        raise InputError(f"{file} is no safetensors file ({error}). {REMEDY}") from None


def _check_tensors(about: JsonObject, layers: tuple[StoredLayer, ...], tensors: Mapping[str, Tensor]) -> None:
    used: list[str] = []
    for layer in layers:
        biases = layer.about.texts("biases")
        if not set(biases) <= set(layer.modules):
            raise about.damaged(f"'{layer.about.place}.biases' must be among its modules {', '.join(layer.modules)}")
        used += [f"{layer.name}.{key}" for key in layer.keys] + [f"{name}.bias" for name in biases]
    check_used(about, list(tensors), used)
    for layer in layers:
        weight = layer.weight({key: tensors[f"{layer.name}.{key}"] for key in layer.keys})
        for name, tensor in weight.input_params.items():
            if layer.about.data.get(name) != tensor.item():
                raise about.damaged(f"'{layer.about.place}.{name}' must be {tensor.item()}, got {layer.about.data.get(name)}")
        layer.about.only(LAYER_KEYS, tuple(weight.input_params))
        for name in layer.about.texts("biases"):
            bias = tensors[f"{name}.bias"]
            if bias.dtype != torch.float32 or tuple(bias.shape) != layer.shape[:1]:
                raise about.damaged(f"'{name}.bias' must be float32 [{layer.shape[0]}], got {bias.dtype} {list(bias.shape)}")


def _equalization(about: JsonObject) -> Equalization:
    entry = about.object("equalization")
    file = sibling(Path(about.path), entry.text("file"), REMEDY)
    equalization = load_equalization(file)
    if equalization.sha256 != entry.text(SHA256):
        raise InputError(f"{file} is not the file that {Path(about.path).name} was written with. {REMEDY}")
    if any(entry.data.get(name) != list(modules) for name, modules in equalization.names.items()):
        raise about.damaged("'equalization' names other modules than its file")
    return equalization
