"""A folder in the format compressed-tensors, which vLLM, SGLang and transformers load.

It is the Hugging Face folder of the model, with `quantization_config` in `config.json`, and with codes and scales in
place of the quantized layers' weights: `pack-quantized` for weights alone, `int-quantized` where inputs are 8-bit integers with
per-token scales, `mixed-precision` where both occur. Each group of the configuration lists its layers by name. The packing is
that of the package compressed-tensors. Zero points are left out: transformers 5.24 with compressed-tensors 0.20 expects another
shape of them than the package packs, so that no reader here could check them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from mpsearch.errors import InputError
from mpsearch.exporters.base import Exporter, Picked
from mpsearch.files import file_errors, write_atomically
from mpsearch.graph.experts import SplitExperts
from mpsearch.layer import LayerSpec, kind_of
from mpsearch.models.huggingface import check_folder, huggingface
from mpsearch.packed.model import Weights
from mpsearch.schemes.base import QuantizedTensor, QuantScheme
from mpsearch.schemes.floating import Float
from mpsearch.schemes.input import IntegerInput
from mpsearch.schemes.integer import Integer

COPIED = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "preprocessor_config.json"),
)
SHARD = "5GB"  # largest file of tensors
PACKED, INT8 = "pack-quantized", "int-quantized"


class CompressedTensors(Exporter):
    """Writes `config.json`, `model.safetensors` (above 5 GB: shards and an index) and the tokenizer to `compressed_tensors/`."""

    own_folder = "compressed_tensors"
    runtime = "transformers"

    def check_installed(self) -> None:
        """See `Exporter.check_installed`."""
        _import_package()

    def export(self, picked: Picked, engine: Weights, folder: Path) -> Path:
        """The path of `config.json`."""
        source = _source(engine.model)
        _import_package()
        chosen = [(layer, picked.evaluation.allocation[group.name]) for group in engine.space.groups for layer in group.layers]
        quantized = {layer.name: name for layer, name in chosen if not isinstance(engine.space.schemes[name], Float)}
        for layer, name in chosen:
            if layer.name in quantized:
                _check(layer, name, engine.space.schemes[name])
        tensors = dict(engine.model.state_dict())
        dtypes = _stored_dtypes(source)
        tensors = {name: _as_stored(tensor, dtypes.get(name)) for name, tensor in tensors.items() if name in dtypes}
        for layer, name in chosen:
            weight = engine.quantized(layer.name, name)
            for module, bias in engine.biases(layer.name, name).items():
                tensors[f"{module}.bias"] = bias
            if layer.name in quantized:
                del tensors[f"{layer.name}.weight"]
                tensors.update({f"{layer.name}.{key}": value for key, value in _stored(weight).items()})
            else:
                tensors[f"{layer.name}.weight"] = weight.tensors["values"] if "values" in weight.tensors else weight.dequantize()
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        config["quantization_config"] = _configuration(quantized, engine.space.schemes, engine.model)
        with file_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            from huggingface_hub import save_torch_state_dict

            save_torch_state_dict(tensors, folder, max_shard_size=SHARD, metadata={"format": "pt"})
            for name in COPIED:
                if (source / name).is_file():
                    shutil.copyfile(source / name, folder / name)
        write_atomically(folder / "config.json", json.dumps(config, indent=2) + "\n")
        return folder / "config.json"

    def load(self, path: Path, model: nn.Module) -> nn.Module:
        """The folder as transformers loads it, by the package compressed-tensors; `model` is not used."""
        return huggingface(path.parent)

    def decode(self, path: Path, model: nn.Module) -> dict[str, Tensor]:
        """Layer name -> float32 weight `[out, in]`, as compressed-tensors decompresses it; `model` is not used."""
        loaded: Any = huggingface(path.parent)
        loaded.hf_quantizer.compressor.decompress_model(loaded)
        return {name: module.weight.detach().float() for name, module in loaded.named_modules() if kind_of(module) is not None}


def _source(model: nn.Module) -> Path:
    """The folder that the model was loaded from; `InputError` where it is no whole model of transformers."""
    source = Path(str(getattr(model, "name_or_path", "")))
    if not source.parts or not hasattr(model, "config"):
        raise InputError(
            "exporter=compressed_tensors writes models of Hugging Face transformers; got a "
            f"{type(model).__name__}. Search with model=hf model.path=FOLDER, or use exporter=native."
        )
    check_folder(source)
    for name, module in model.named_modules():
        if isinstance(module, SplitExperts) or (isinstance(module, nn.Linear) and hasattr(module, "nf")):
            raise InputError(
                f"'{name}' is stored in another layout than a Linear layer (experts in one tensor, or a Conv1D), which "
                "exporter=compressed_tensors does not write yet. Use exporter=native."
            )
    return source


def _check(layer: LayerSpec, name: str, scheme: QuantScheme) -> None:
    """Raise `InputError` for a layer that the format cannot hold."""
    is_packed = isinstance(scheme, Integer) and scheme.symmetric and scheme.input is None and scheme.bits >= 2
    is_packed = is_packed and getattr(scheme, "group_size", "tensor") != "tensor"
    if layer.kind != "linear" or len(layer.modules) > 1 or not (is_packed or _is_int8(scheme)):
        raise InputError(
            f"Layer '{layer.name}' ({layer.kind}{', tied' if len(layer.modules) > 1 else ''}) in scheme '{name}' "
            f"({scheme.describe()}) has no form in compressed-tensors; expected Linear layers in symmetric integers of 2 to 8 "
            "bits, per row or group, without quantized inputs, or in 8 bits with 8-bit inputs and per-token scales. Search with "
            "runtime=vllm."
        )


def _is_int8(scheme: QuantScheme) -> bool:
    if not isinstance(scheme, Integer) or not isinstance(scheme.input, IntegerInput):
        return False
    x = scheme.input
    weight = scheme.bits == 8 and scheme.symmetric and scheme.group_size == "channel"
    return weight and x.bits == 8 and x.symmetric and x.scale == "token"


def _stored(weight: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors of a layer, by the names that they have after the layer's own."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    scheme: Any = weight.scheme
    codes, scales, _, _ = scheme.unpacked(weight.tensors, weight.shape)
    middle = 2 ** (scheme.bits - 1)
    signed = (codes.to(torch.int16) - middle).to(torch.int8)
    tensors = {"weight_scale": scales.contiguous()}
    if scheme.input is not None:
        return {**tensors, "weight": signed}
    return {**tensors, "weight_packed": pack_to_int32(signed, scheme.bits), "weight_shape": torch.tensor(weight.shape)}


def _configuration(quantized: Mapping[str, str], schemes: Mapping[str, QuantScheme], model: nn.Module) -> dict[str, Any]:
    """`quantization_config`: a group for each scheme that occurs, and the Linear layers without one."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    groups = {}
    for name in sorted(set(quantized.values())):
        scheme: Any = schemes[name]
        size = None if scheme.group_size == "channel" else scheme.group_size
        strategy = "channel" if size is None else "group"
        weights = QuantizationArgs(num_bits=scheme.bits, symmetric=True, strategy=strategy, group_size=size)
        inputs = QuantizationArgs(num_bits=8, symmetric=True, strategy="token", dynamic=True) if scheme.input else None
        targets = [layer for layer, chosen in quantized.items() if chosen == name]
        form = INT8 if scheme.input else PACKED
        groups[name] = QuantizationScheme(targets=targets, weights=weights, input_activations=inputs, format=form)
    formats = {group.format for group in groups.values()}
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    config = QuantizationConfig(
        config_groups=groups,
        quantization_status="compressed",
        format=formats.pop() if len(formats) == 1 else "mixed-precision",
        ignore=[name for name in linear if name not in quantized],
    )
    written: dict[str, Any] = json.loads(config.model_dump_json())
    return written


def _stored_dtypes(source: Path) -> dict[str, torch.dtype]:
    """The dtype of each tensor that the folder's files hold."""
    dtypes = {}
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            dtypes.update({name: tensors.get_tensor(name).dtype for name in tensors.keys()})  # noqa: SIM118
    return dtypes


def _as_stored(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor in the dtype that it was stored in, where that loses nothing."""
    narrow = tensor if dtype is None else tensor.to(dtype)
    return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor


def _import_package() -> None:
    try:
        import compressed_tensors  # noqa: F401
    except ImportError:
        raise InputError(
            "exporter=compressed_tensors needs the package compressed-tensors: pip install 'mpsearch[compressed_tensors]'."
        ) from None
