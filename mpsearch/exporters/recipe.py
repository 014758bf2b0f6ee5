"""The allocation alone, as the configuration of a tool that quantizes by its own algorithms: `exporter=<tool>_recipe`.

| `tool` | what is written | what reads it |
|---|---|---|
| `modelopt` | `modelopt.yaml` | NVIDIA ModelOpt: `mtq.quantize(model, config)` |
| `auto_round` | `auto_round.json` | Intel AutoRound: `AutoRound(model, layer_config=...)` |
| `gptqmodel` | `gptqmodel.json` | GPTQModel: `QuantizeConfig(**config)` |
| `llm_compressor` | `llm_compressor.yaml` | llm-compressor: `oneshot(model, recipe=...)` |
| `aimet` | `aimet.encodings` | AIMET, encodings 2.0.0 of the weights, with the scales of the search |

Layers are named one by one, as the checkpoint of a Hugging Face model names them. `exporter=compressed_tensors` and the like
write the weights of the search, which a recipe does not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from mpsearch.errors import InputError, check_choice
from mpsearch.exporters.base import Exporter, Picked
from mpsearch.exporters.compressed_tensors_forms import PACKED, form_of
from mpsearch.exporters.hf_checkpoint import origins
from mpsearch.files import file_errors, write_atomically
from mpsearch.layer import LayerSpec
from mpsearch.packed.model import Weights
from mpsearch.schemes.base import QuantScheme
from mpsearch.schemes.floating import Float
from mpsearch.schemes.integer import Integer

# What a scheme is for a tool, from its form in compressed-tensors; `None`: the tool has none.
Entry = Callable[[Mapping[str, Any], Mapping[str, Any] | None], dict[str, Any] | None]


@dataclass(frozen=True)
class Chosen:
    """The layers of a point: module name in the checkpoint -> its layer, and the name of its scheme."""

    layers: Mapping[str, LayerSpec]
    names: Mapping[str, str]
    engine: Weights

    def scheme(self, module: str) -> QuantScheme:
        """The scheme of a module."""
        return self.engine.space.schemes[self.names[module]]

    def entries(self, tool: str, entry: Entry) -> dict[str, dict[str, Any] | None]:
        """Module -> its entry, `None` where it stays float; `InputError` where the tool has no such scheme."""
        made: dict[str, dict[str, Any] | None] = {}
        for module in self.names:
            form = form_of(self.scheme(module))
            is_float = isinstance(self.scheme(module), Float)
            made[module] = None if is_float or form is None else entry(form.weights, form.inputs)
            if made[module] is None and not is_float:
                raise self.no_form(module, tool)
        return made

    def no_form(self, module: str, tool: str) -> InputError:
        """What is raised where the tool has no such scheme, or not for such a layer."""
        layer, scheme = self.layers[module], self.scheme(module)
        return InputError(
            f"Layer '{layer.name}' ({layer.kind}) in scheme '{self.names[module]}' ({scheme.describe()}) has no form in {tool}. "
            "Pin it to another scheme, or use exporter=native."
        )


@dataclass(frozen=True)
class Recipe(Exporter):
    """Writes the configuration of `tool`; see the module."""

    tool: str
    holds_weights = False

    def __post_init__(self) -> None:
        check_choice("tool", self.tool, TOOLS)

    def export(self, picked: Picked, engine: Weights, folder: Path) -> Path:
        """The path of the file."""
        layers, names = {}, {}
        in_files = _modules(engine.model)
        for layer, scheme in engine.space.layer_schemes(picked.evaluation.allocation):
            for module in layer.modules:
                for name in in_files.get(module, [module]):
                    layers[name], names[name] = layer, scheme
        file, write = TOOLS[self.tool]
        text = write(Chosen(layers, names, engine))
        with file_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / file, text)
        return folder / file

    def load(self, path: Path, model: nn.Module) -> nn.Module:
        """`InputError`: a recipe holds no weights."""
        raise InputError(
            f"{path} holds no weights: {self.tool} makes them. Export by exporter=native to get those of the search."
        )


def _modules(model: nn.Module) -> dict[str, list[str]]:
    """Module -> its names in the checkpoint of a model of transformers; {} for any other."""
    if not hasattr(model, "config") or not hasattr(model, "name_or_path"):
        return {}
    names: dict[str, list[str]] = {}
    for name, origin in origins(model).items():
        part = origin.parts[0].name
        if part.endswith(".weight") and not origin.is_stack:
            names.setdefault(part.removesuffix(".weight"), []).append(name.removesuffix(".weight"))
    return names


def _modelopt(chosen: Chosen) -> str:
    """`quant_cfg` as a list, of which the last entry that matches counts (modelopt/torch/quantization/config.py)."""
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for module, entry in chosen.entries("ModelOpt", _modelopt_entry).items():
        for kind, settings in (entry or {}).items():
            entries.append({"quantizer_name": f"{module}.{kind}_quantizer", "cfg": settings, "enable": True})
    return yaml.safe_dump({"quant_cfg": entries, "algorithm": "max"}, sort_keys=False)


def _modelopt_entry(weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not weights.get("symmetric"):
        return None
    entry = {"weight": _modelopt_settings(weights)}
    return entry if inputs is None else {**entry, "input": _modelopt_settings(inputs)}


def _modelopt_settings(form: Mapping[str, Any]) -> dict[str, Any]:
    floats = {8: "e4m3", 4: "e2m1"}
    settings: dict[str, Any] = {"num_bits": floats[form["num_bits"]] if form.get("type") == "float" else form["num_bits"]}
    if form["strategy"] == "token":
        return {**settings, "type": "dynamic", "block_sizes": {-1: None}}
    if form["strategy"] in ("channel", "tensor"):
        return {**settings, "axis": 0 if form["strategy"] == "channel" else None}
    blocks: dict[Any, Any] = {-1: form["group_size"]}
    if form.get("type") == "float":
        blocks |= {"type": "dynamic", "scale_bits": "e4m3" if form["strategy"] == "tensor_group" else "e8m0"}
    return {**settings, "block_sizes": blocks}


def _auto_round(chosen: Chosen) -> str:
    """`layer_config` (auto_round/schemes.py: `QuantizationScheme`); 16 bits leave a layer as it is."""
    entries = chosen.entries("AutoRound", _auto_round_entry)
    return json.dumps({module: entry or {"bits": 16} for module, entry in entries.items()}, indent=2) + "\n"


def _auto_round_entry(weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> dict[str, Any] | None:
    entry = dict(zip(("bits", "group_size", "sym", "data_type"), _auto_round_values(weights), strict=True))
    if inputs is not None:
        names = ("act_bits", "act_group_size", "act_sym", "act_data_type")
        entry |= dict(zip(names, _auto_round_values(inputs), strict=True)) | {"act_dynamic": inputs["dynamic"] is not False}
    return entry


def _auto_round_values(form: Mapping[str, Any]) -> tuple[int, int, bool, str]:
    size = form.get("group_size", 0 if form["strategy"] == "tensor" else -1)
    kind = "int"
    if form.get("type") == "float":
        kind = "fp" if "group_size" not in form else "nv_fp" if form["strategy"] == "tensor_group" else "mx_fp"
    return form["num_bits"], size, form["symmetric"], kind


def _gptqmodel(chosen: Chosen) -> str:
    """`dynamic`: the first pattern that matches counts, "-:" leaves a module as it is (gptqmodel/quantization/config.py)."""
    dynamic = {}
    for module, entry in chosen.entries("GPTQModel", _gptqmodel_entry).items():
        pattern = f"^{module.replace('.', chr(92) + '.')}$"
        dynamic[f"{'-' if entry is None else '+'}:{pattern}"] = entry or {}
    return json.dumps({"bits": 4, "group_size": 128, "sym": True, "desc_act": False, "dynamic": dynamic}, indent=2) + "\n"


def _gptqmodel_entry(weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if inputs is not None or weights.get("type") == "float" or weights["num_bits"] not in (2, 3, 4, 8):
        return None
    if weights["strategy"] == "tensor":
        return None
    return {"bits": weights["num_bits"], "group_size": weights.get("group_size", -1), "sym": weights["symmetric"]}


def _llm_compressor(chosen: Chosen) -> str:
    """A stage with one modifier: by GPTQ where only weights are quantized, to integers (llmcompressor/modifiers)."""
    entries = chosen.entries("llm-compressor", lambda weights, inputs: {"weights": dict(weights)})
    targets: dict[str, list[str]] = {}
    for module, entry in entries.items():
        if entry is not None:
            targets.setdefault(chosen.names[module], []).append(module)
    groups, plain = {}, True
    for name, modules in targets.items():
        form = form_of(chosen.engine.space.schemes[name])
        assert form is not None
        plain &= form.format == PACKED and form.inputs is None
        parts = {"weights": _texts(form.weights)} | ({"input_activations": _texts(form.inputs)} if form.inputs else {})
        groups[name] = {"targets": modules, **parts}
    ignored = [module for module, entry in entries.items() if entry is None]
    modifier = "GPTQModifier" if plain else "QuantizationModifier"
    stage = {"quantization_modifiers": {modifier: {"config_groups": groups, "ignore": ignored}}}
    return yaml.safe_dump({"quantization_stage": stage}, sort_keys=False)


def _texts(form: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with dtypes by their names."""
    return {key: str(value) if key.endswith("dtype") else value for key, value in form.items()}


def _aimet(chosen: Chosen) -> str:
    """Encodings of the weights (QuantizeLinear's attributes and inputs), with the scales of the search."""
    encodings = []
    for module in chosen.names:
        scheme = chosen.scheme(module)
        if isinstance(scheme, Float):
            continue
        layer = chosen.layers[module]
        fits = isinstance(scheme, Integer) and scheme.bits >= 2 and not layer.kind.startswith("conv_transpose")
        if not isinstance(scheme, Integer) or not fits or not (layer.kind == "linear" or isinstance(scheme.group_size, str)):
            raise chosen.no_form(module, "AIMET")
        weight = chosen.engine.quantized(layer.name, chosen.names[module])
        _, scales, zero_points, size = scheme.unpacked(weight.tensors, weight.shape)
        per_row = scales.shape[1] == 1
        about: dict[str, Any] = {
            "name": f"{module}.weight",
            "output_dtype": f"{'int' if scheme.symmetric else 'uint'}{scheme.bits}",
        }
        values = [t.flatten() if per_row else t for t in (scales.float(), zero_points) if t is not None]
        about |= {key: value.tolist() for key, value in zip(("y_scale", "y_zero_point"), values, strict=False)}
        encodings.append({**about, "axis": 0} if per_row else {**about, "axis": 1, "block_size": size})
    return json.dumps({"version": "2.0.0", "encodings": encodings}) + "\n"


TOOLS: dict[str, tuple[str, Callable[[Chosen], str]]] = {
    "modelopt": ("modelopt.yaml", _modelopt),
    "auto_round": ("auto_round.json", _auto_round),
    "gptqmodel": ("gptqmodel.json", _gptqmodel),
    "llm_compressor": ("llm_compressor.yaml", _llm_compressor),
    "aimet": ("aimet.encodings", _aimet),
}
