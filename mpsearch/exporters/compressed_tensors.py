"""Folders of Hugging Face models in the format of compressed-tensors, which vLLM, SGLang and transformers open.

Layers in a float scheme keep their names in the files; a quantized one gets the tensors of its format
(`compressed_tensors_forms`), and each scheme a group in `quantization_config`. Everything that the source folder holds otherwise
(embeddings, norms, tokenizer) is written in the dtype that it has there, where that keeps its values. Experts are written one by
one, under the names of the checkpoint.

Tied embeddings that are searched are written twice, and `tie_word_embeddings` becomes false: formats of packed codes have no tie.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.errors import InputError, one_line
from mpsearch.exporters.base import Exporter, Picked
from mpsearch.exporters.compressed_tensors_forms import FP8, INT8, PACKED, form_of, has_form, stored, tensor_scales
from mpsearch.exporters.hf_checkpoint import Checkpoint, Origin, origins, read_shards, source_of, write_shards
from mpsearch.exporters.hf_contents import Contents
from mpsearch.files import write_atomically
from mpsearch.graph.projections import expose_projections
from mpsearch.layer import LayerSpec
from mpsearch.models.huggingface import huggingface
from mpsearch.packed.model import Weights

logger = logging.getLogger("mpsearch")
EXPERTS = ".experts."
ALL_EXPERTS = r"re:.*\.experts\.\d+\..*"


class CompressedTensors(Exporter):
    """Writes `config.json`, `model.safetensors` (above 2 GB: shards and an index) and the tokenizer to `compressed_tensors/`."""

    own_folder = "compressed_tensors"
    runtime = "transformers"

    def check_installed(self) -> None:
        """See `Exporter.check_installed`."""
        _import_package()

    def check(self, model: nn.Module) -> None:
        """See `Exporter.check`."""
        source_of(model, "exporter=compressed_tensors")

    def export(self, picked: Picked, engine: Weights, folder: Path) -> Path:
        """The path of `config.json`."""
        checkpoint = Checkpoint(engine.model, "exporter=compressed_tensors")
        _import_package()
        file = _File(checkpoint, engine, picked)
        write_shards(file.tensors(), folder)
        checkpoint.copy_others(folder)
        config = checkpoint.config()
        config["quantization_config"] = file.configuration()
        if file.unties:
            config["tie_word_embeddings"] = False
        write_atomically(folder / "config.json", json.dumps(config, indent=2) + "\n")
        return folder / "config.json"

    def decode(self, path: Path, model: nn.Module) -> dict[str, Tensor]:
        """Layer -> float32 weight, by the package's own decompressor (`CompressedTensorsDequantizer`)."""
        dense, quantized = _decompressed(path.parent), _targets(json.loads(path.read_text(encoding="utf-8")))
        rows: dict[str, list[tuple[int, Tensor]]] = {}
        for name, origin in origins(expose_projections(model)).items():
            if name in dense and not origin.is_stack and origin.parts[0].name.endswith(".weight"):
                part, layer = origin.parts[0], name.removesuffix(".weight")
                value = dense[name].t() if origin.is_transposed and layer not in quantized else dense[name]
                rows.setdefault(part.name.removesuffix(".weight"), []).append((part.rows.start, value.float()))
        return {name: torch.cat([v for _, v in sorted(parts, key=lambda part: part[0])]) for name, parts in rows.items()}

    def load(self, path: Path, model: nn.Module) -> nn.Module:
        """The folder in transformers; see `open`."""
        return self.open(path, model)

    def open(self, path: Path, model: nn.Module) -> nn.Module:
        """The folder as transformers loads it, by the package compressed-tensors.

        What transformers cannot load in float32 though the package decompresses it and vLLM reads it (see `_is_loadable`) is
        decompressed by the package and given to transformers as float weights; then too the package quantizes the inputs.
        """
        config = json.loads(path.read_text(encoding="utf-8"))
        conv1d, embeddings = set(), set()
        for name, origin in origins(expose_projections(model)).items():
            conv1d |= {name} if origin.is_transposed and not origin.is_stack else set()
            owner = model.get_submodule(origin.parts[0].name.rpartition(".")[0])
            embeddings |= {name} if isinstance(owner, nn.Embedding) else set()
        if _is_loadable(config["quantization_config"]["config_groups"], conv1d | embeddings):
            return huggingface(path.parent)
        return _from_decompressed(path.parent, model, config, conv1d)


class _File(Contents):
    """What is written of a point: its tensors and its configuration."""

    def __init__(self, checkpoint: Checkpoint, engine: Weights, picked: Picked) -> None:
        super().__init__(checkpoint, engine, picked)
        if self.unties:
            logger.warning("vLLM 0.33 reads packed embeddings; transformers 5.24 does not.")
        for name, origin in checkpoint.origins.items():
            used = [(self.owner[part.name], s) for part in origin.parts if (s := self.scheme(part.name)) is not None]
            _check(name, origin, used)
        weights = {name: engine.quantized(name, scheme) for name, scheme in self.quantized.items()}
        nvfp4 = {name: weight for name, weight in weights.items() if "tensor_scale" in weight.tensors}
        self.tensor_scales = tensor_scales(nvfp4, [layer for layer, _ in self.chosen.values()])

    def tensors(self) -> Iterator[dict[str, Tensor]]:
        """The tensors of one module of the files after another."""
        for name, origin, value in self.entries():
            if value is not None:
                yield {name: value}
                continue
            part, module = origin.parts[0], name.removesuffix(".weight")
            scale = self.tensor_scales.get(self.owner[part.name].name, 1.0)
            tensors = stored(self.weight(part.name), part.rows, scale)
            yield {f"{module}.{key}": tensor.clone() for key, tensor in tensors.items()}

    def configuration(self) -> dict[str, Any]:
        """`quantization_config`: a group for each scheme that occurs, and the Linear layers without one."""
        from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

        targets: dict[str, list[str]] = {}
        linear, ignored = {id(m) for m in self.engine.model.modules() if isinstance(m, nn.Linear)}, []
        for name, origin in self.checkpoint.origins.items():
            state = origin.parts[0].name
            module, scheme = name.removesuffix(".weight"), self.scheme(state)
            if scheme is not None:
                targets.setdefault(scheme[0], []).append(module)
            elif state.endswith(".weight") and not origin.is_stack:
                owner = self.engine.model.get_submodule(state.removesuffix(".weight"))
                ignored += [module] if id(owner) in linear else []
        groups = {}
        for name, modules in sorted(_with_experts(targets, ignored).items()):
            form = form_of(self.schemes[name])
            assert form is not None
            inputs = None if form.inputs is None else QuantizationArgs(**form.inputs)
            weights = QuantizationArgs(**form.weights)
            groups[name] = QuantizationScheme(targets=modules, weights=weights, input_activations=inputs, format=form.format)
        formats = {group.format for group in groups.values()}
        config = QuantizationConfig(
            config_groups=groups,
            quantization_status="compressed",
            format=formats.pop() if len(formats) == 1 else "mixed-precision",
            ignore=ignored,
        )
        written: dict[str, Any] = json.loads(config.model_dump_json())
        return written


def _check(name: str, origin: Origin, used: list[tuple[LayerSpec, Any]]) -> None:
    """Raise `InputError` for a tensor of the files that the format cannot hold in the schemes of its layers."""
    for layer, (scheme_name, scheme) in used:
        form = form_of(scheme)
        why = ""
        if origin.is_stack:
            why = f"the experts of '{name}' are one tensor in the checkpoint, which compressed-tensors does not quantize"
        elif origin.is_transposed and form is not None and not form.format.endswith("pack-quantized"):
            why = "of a Conv1D vLLM takes packed codes only"
        elif EXPERTS in name and form is not None and form.inputs is not None:
            why = "transformers runs experts with float inputs"
        elif not has_form(layer, scheme):
            why = (
                "expected Linear layers in 2 to 8 bits per row or in whole groups, FP8, MXFP4 or NVFP4, or an embedding in 2, 4 "
            )
            why += "or 8 bits, symmetric"
        if why:
            raise InputError(
                f"Layer '{layer.name}' ({layer.kind}) in scheme '{scheme_name}' ({scheme.describe()}) has no form in "
                f"compressed-tensors: {why}. Search with runtime=vllm, or pin the layer to another scheme."
            )


def _with_experts(targets: Mapping[str, list[str]], ignored: list[str]) -> dict[str, list[str]]:
    """`targets` with a pattern for the experts where all are in one scheme: transformers takes their scheme from a pattern."""
    with_experts = [name for name, modules in targets.items() if any(EXPERTS in module for module in modules)]
    if not with_experts:
        return dict(targets)
    if len(with_experts) > 1 or any(EXPERTS in module for module in ignored):
        logger.warning(
            "Blocks of experts are in different schemes. vLLM reads such files; transformers reads one scheme for all."
        )
        return dict(targets)
    (name,) = with_experts
    others = [module for module in targets[name] if EXPERTS not in module]
    return {**targets, name: [*others, ALL_EXPERTS]}


def _is_loadable(groups: Mapping[str, Any], odd: set[str]) -> bool:
    """Whether transformers loads the groups of a configuration as they are; `odd` are weights of other modules than Linear ones.

    It allocates zero points as they are before packing (`PackedQuantizationCompressor.compress` of a tensor without data),
    so that packed ones do not fit; takes one scheme for all experts, skips a `Conv1D`, and fails at an embedding. MX and NVFP4
    are decompressed to bfloat16, which a model in float32 cannot multiply by.
    """
    experts = [group for group in groups.values() if any(EXPERTS in t or t == ALL_EXPERTS for t in group["targets"])]
    packs = all(group["weights"]["symmetric"] or group["format"] != PACKED for group in groups.values())
    plain = not any(f"{target}.weight" in odd for group in groups.values() for target in group["targets"])
    wide = all(group["format"] in (PACKED, INT8, FP8) for group in groups.values())
    return packs and plain and wide and (not experts or ALL_EXPERTS in experts[0]["targets"])


def _targets(config: Mapping[str, Any]) -> set[str]:
    return {target for group in config["quantization_config"]["config_groups"].values() for target in group["targets"]}


def _decompressed(folder: Path) -> dict[str, Tensor]:
    """Tensor of the files -> float32, by the package."""
    _import_package()
    from compressed_tensors.entrypoints.convert.converters import CompressedTensorsDequantizer

    reader = CompressedTensorsDequantizer(folder, dtype=torch.float32)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for name, group in config["quantization_config"]["config_groups"].items():
        reader.quant_config.config_groups[name].format = group["format"]  # not the one that it infers
    dense: dict[str, Tensor] = {}
    for tensors in read_shards(folder):
        # It computes in the dtype of the scales, which are products of float16 otherwise.
        wide = {name: t.float() if t.dtype == torch.float16 and name.endswith("_scale") else t for name, t in tensors.items()}
        dense |= reader.process(wide)
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in dense.items()}


def _from_decompressed(folder: Path, model: nn.Module, config: Mapping[str, Any], conv1d: set[str]) -> nn.Module:
    """The model of transformers with decompressed weights, whose inputs the package quantizes."""
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from transformers import AutoConfig

    tensors = _decompressed(folder)
    for name in conv1d & {f"{target}.weight" for target in _targets(config)}:
        tensors[name] = tensors[name].t().contiguous()
    about = AutoConfig.from_pretrained(folder)
    del about.quantization_config
    kind: Any = type(model)
    try:
        opened = kind.from_pretrained(None, config=about, state_dict=tensors, dtype=torch.float32)
    except Exception as error:
        raise InputError(f"transformers cannot load {folder}: {one_line(error)}") from error
    groups = {name: g for name, g in config["quantization_config"]["config_groups"].items() if g["input_activations"]}
    if groups:
        inputs = {**config["quantization_config"], "config_groups": {n: {**g, "weights": None} for n, g in groups.items()}}
        apply_quantization_config(opened, QuantizationConfig.model_validate({**inputs, "quantization_status": "frozen"}))
        for name, value in tensors.items():
            if name.endswith(("input_scale", "input_global_scale")):
                opened.get_parameter(name).data.copy_(value)
    opened.config.use_cache = False
    module: nn.Module = opened.eval()
    return module


def _import_package() -> None:
    try:
        import compressed_tensors  # noqa: F401
    except ImportError:
        raise InputError(
            "exporter=compressed_tensors needs the package compressed-tensors: pip install 'mpsearch[compressed_tensors]'."
        ) from None
