"""Folders of Hugging Face models whose weights are tensors of torchao, which transformers opens.

A quantized weight is an `IntxUnpackedToInt8Tensor`, or with symmetric 8-bit inputs an `Int8Tensor`, made of our codes and scales
(nothing is quantized again), and `config.json` has a `FqnToConfig` with one entry for each layer. These tensors take a byte per
weight, whatever the width: torchao packs narrower ones when a program is exported from them (`torch.export`, ExecuTorch).
"""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.errors import InputError
from mpsearch.exporters.base import Exporter, Picked
from mpsearch.exporters.hf_checkpoint import Checkpoint, Origin, origins, source_of, write_shards
from mpsearch.exporters.hf_contents import Contents
from mpsearch.files import write_atomically
from mpsearch.graph.projections import expose_projections
from mpsearch.models.huggingface import huggingface
from mpsearch.packed.model import Weights
from mpsearch.runtimes.torchao import TorchAO
from mpsearch.schemes.base import QuantizedTensor
from mpsearch.schemes.input import IntegerInput
from mpsearch.schemes.integer import Integer, signed_codes

logger = logging.getLogger("mpsearch")


class TorchAOFolder(Exporter):
    """Writes `config.json`, `model.safetensors` (above 2 GB: shards and an index) and the tokenizer to `torchao/`."""

    own_folder = "torchao"
    runtime = "torchao"

    def check_installed(self) -> None:
        """See `Exporter.check_installed`."""
        _import_torchao()

    def check(self, model: nn.Module) -> None:
        """See `Exporter.check`."""
        source_of(model, "exporter=torchao")

    def export(self, picked: Picked, engine: Weights, folder: Path) -> Path:
        """The path of `config.json`."""
        checkpoint = Checkpoint(engine.model, "exporter=torchao")
        _import_torchao()
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
        from transformers import TorchAoConfig

        contents, named, configs, config = Contents(checkpoint, engine, picked), {}, {}, checkpoint.config()
        # What a product with the weight gives: that of the activations, which is the dtype that transformers loads the folder in.
        dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"), torch.float32)
        for name, origin, value in contents.entries():
            if value is None:
                _check(name, origin, contents)
                configs[name.removesuffix(".weight")] = _config(contents.weight(name).scheme)
            named[name] = _tensor(contents.weight(name), dtype) if value is None else value
        narrow = [scheme for scheme in contents.quantized.values() if contents.schemes[scheme].weight_bits < 8]
        if narrow:
            logger.warning(
                "torchao keeps codes of %s bits in a byte each; they take less when a program is exported.", _widths(contents)
            )
        tensors, about = flatten_tensor_state_dict(named)
        write_shards([tensors], folder, about)
        checkpoint.copy_others(folder)
        from torchao.quantization import FqnToConfig

        quantization = TorchAoConfig(FqnToConfig(configs), include_input_output_embeddings=True)
        config["quantization_config"] = json.loads(json.dumps(quantization.to_dict()))
        if contents.unties:
            config["tie_word_embeddings"] = False
        write_atomically(folder / "config.json", json.dumps(config, indent=2) + "\n")
        return folder / "config.json"

    def load(self, path: Path, model: nn.Module) -> nn.Module:
        """The folder as transformers loads it, in float32."""
        _import_torchao()
        return huggingface(path.parent).to(torch.float32)

    def decode(self, path: Path, model: nn.Module) -> dict[str, Tensor]:
        """Layer -> float32 weight, as torchao dequantizes it."""
        loaded, weights = self.open(path, model), {}
        state = loaded.state_dict()
        for name, origin in origins(expose_projections(model)).items():
            part = origin.parts[0].name
            if part.endswith(".weight") and not origin.is_stack and name in state:
                value: Any = state[name]
                in_float32 = (torch.float32,) if type(value).__name__ == "Int8Tensor" else ()  # whose `to` leaves its dtype
                dense = value.dequantize(*in_float32) if hasattr(value, "qdata") else value
                weights[part.removesuffix(".weight")] = (dense.t() if origin.is_transposed else dense).float()
        return weights


def _check(name: str, origin: Origin, contents: Contents) -> None:
    part = origin.parts[0].name
    scheme_name, scheme = contents.scheme(part) or ("", None)
    whole = name == part and not origin.is_stack and not origin.is_transposed
    if scheme is not None and not (whole and TorchAO().runs(contents.owner[part], scheme)):
        raise InputError(
            f"Layer '{contents.owner[part].name}' in scheme '{scheme_name}' ({scheme.describe()}) has no tensor of torchao; "
            f"expected {TorchAO.what}, in modules that are Linear or Embedding. Search with runtime=torchao."
        )


def _tensor(weight: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    """The tensor of torchao with these codes and scales, which is of `dtype` to those who use it."""
    from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

    scheme: Any = weight.scheme
    codes, scales, zero_points, size = scheme.unpacked(weight.tensors, weight.shape)
    signed, scales = signed_codes(codes, scheme.bits), scales.float()
    if scheme.input == IntegerInput(8, "token"):
        from torchao.quantization import PerRow

        inputs = QuantizeTensorToInt8Kwargs(PerRow())
        return Int8Tensor(signed, scales, [1, codes.shape[1]], dtype, act_quant_kwargs=inputs)
    has_offsets = zero_points is not None
    offsets = signed_codes(zero_points, scheme.bits) if has_offsets else torch.zeros_like(scales, dtype=torch.int8)
    return IntxUnpackedToInt8Tensor(signed, scales, offsets, getattr(torch, f"int{scheme.bits}"), (1, size), dtype, None)


def _config(scheme: Any) -> Any:
    """The configuration by which torchao would quantize a layer alike."""
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        IntxWeightOnlyConfig,
        MappingType,
        PerAxis,
        PerGroup,
    )

    if scheme.input == IntegerInput(8, "token"):
        return Int8DynamicActivationInt8WeightConfig()
    granularity = PerAxis(0) if scheme.group_size == "channel" else PerGroup(scheme.group_size)
    mapping = MappingType.SYMMETRIC if scheme.symmetric else MappingType.ASYMMETRIC
    dtype = getattr(torch, f"int{scheme.bits}")
    return IntxWeightOnlyConfig(dtype, granularity, mapping)


def _widths(contents: Contents) -> str:
    widths = {s.bits for name in contents.quantized.values() if isinstance(s := contents.schemes[name], Integer) and s.bits < 8}
    return ", ".join(map(str, sorted(widths)))


def _import_torchao() -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kernels for GPUs that are absent
            import torchao  # noqa: F401
    except ImportError:
        raise InputError("exporter=torchao needs the package torchao: pip install 'mpsearch[torchao]'.") from None
