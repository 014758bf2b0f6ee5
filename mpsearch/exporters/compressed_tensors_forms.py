"""The schemes that compressed-tensors has a format for: their entry in `config_groups`, and the tensors of a layer.

Formats and names are those of the package's compressors (`compressed_tensors/compressors`), which pack the codes here too, and of
vLLM's `CompressedTensorsConfig`, which reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.graph.sharing import share
from mpsearch.layer import LayerSpec
from mpsearch.runtimes.vllm import FUSED, MXFP8
from mpsearch.schemes.base import QuantizedTensor, QuantScheme
from mpsearch.schemes.codebook import MXFP4, Codebook
from mpsearch.schemes.input import InputFormat, IntegerInput
from mpsearch.schemes.integer import Integer, signed_codes
from mpsearch.schemes.level_input import LevelInput
from mpsearch.schemes.levels import LEVELS

PACKED, INT8, FP8 = "pack-quantized", "int-quantized", "float-quantized"
NVFP4_FORMAT, MXFP4_FORMAT, MXFP8_FORMAT = "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"


@dataclass(frozen=True)
class Form:
    """How a scheme is written: a format, and the arguments of `QuantizationArgs` for weights and inputs."""

    format: str
    weights: Mapping[str, Any]
    inputs: Mapping[str, Any] | None = None


def form_of(scheme: QuantScheme) -> Form | None:
    """The form of a scheme; `None` where there is none."""
    if isinstance(scheme, Integer):
        return _integer_form(scheme)
    return _codebook_form(scheme) if isinstance(scheme, Codebook) else None


def _integer_form(scheme: Integer) -> Form | None:
    weights = {"num_bits": scheme.bits, "symmetric": scheme.symmetric, **_strategy(scheme.group_size)}
    inputs = _inputs(scheme.input)
    plain = scheme.bits == 8 and scheme.symmetric and scheme.group_size in ("channel", "tensor")
    if plain and inputs is not None and inputs["num_bits"] == 8 and inputs["type"] == "int":
        return Form(INT8, weights, inputs)
    if scheme.group_size == "tensor" or scheme.bits < 2 or (scheme.input is not None and inputs is None):
        return None
    if inputs is not None and (inputs["type"], inputs["dynamic"]) != ("int", True):
        return None
    return Form(PACKED, weights, inputs)


def _codebook_form(scheme: Codebook) -> Form | None:
    inputs = _inputs(scheme.input)
    if scheme.input is not None and inputs is None:
        return None
    if (scheme.levels, scheme.scale) == ("e4m3", "float32") and scheme.group_size in ("channel", "tensor"):
        fits = inputs is None or (inputs["type"], inputs["num_bits"], inputs.get("group_size")) == ("float", 8, None)
        return Form(FP8, _floats(8, **_strategy(scheme.group_size)), inputs) if fits else None
    if scheme == MXFP4:
        return Form(MXFP4_FORMAT, _floats(4, strategy="group", group_size=32, scale_dtype=torch.uint8))
    if scheme == MXFP8:
        return Form(MXFP8_FORMAT, _floats(8, strategy="group", group_size=32, scale_dtype=torch.uint8), inputs)
    if (scheme.levels, scheme.scale, scheme.group_size) == ("e2m1", "e4m3", 16):
        fits = scheme.input in (None, LevelInput("e2m1", "nv"))
        return Form(NVFP4_FORMAT, _nvfp4(), inputs) if fits else None
    return None


def _strategy(group_size: int | str) -> dict[str, Any]:
    return {"strategy": group_size} if isinstance(group_size, str) else {"strategy": "group", "group_size": group_size}


def _floats(num_bits: int, **others: Any) -> dict[str, Any]:
    return {"num_bits": num_bits, "type": "float", "symmetric": True, **others}


def _nvfp4() -> dict[str, Any]:
    scale = torch.float8_e4m3fn
    return _floats(4, strategy="tensor_group", group_size=16, scale_dtype=scale, zp_dtype=scale)


def _inputs(input: InputFormat | None) -> dict[str, Any] | None:
    """The arguments for a quantized input; `None` where it stays float or has no form."""
    if isinstance(input, IntegerInput) and input.symmetric and input.scale in ("token", "static") and input.bits in (4, 8):
        return {"num_bits": input.bits, "type": "int", "symmetric": True, **_per_token(input.scale)}
    if not isinstance(input, LevelInput):
        return None
    if input.levels == "e4m3" and input.scale in ("token", "static"):
        return _floats(8, **_per_token(input.scale))
    if input == LevelInput("e4m3", "mx"):
        return _floats(8, strategy="group", group_size=32, dynamic=True, scale_dtype=torch.uint8, zp_dtype=torch.uint8)
    return {**_nvfp4(), "dynamic": "local"} if input == LevelInput("e2m1", "nv") else None


def _per_token(scale: str) -> dict[str, Any]:
    return {"strategy": "token", "dynamic": True} if scale == "token" else {"strategy": "tensor", "dynamic": False}


def has_form(layer: LayerSpec, scheme: QuantScheme) -> bool:
    """Whether a layer can be written in a scheme: Linear layers in whole groups; embeddings as vLLM looks them up.

    Its kernel for embeddings (`CompressedTensorsEmbeddingWNA16Int`) takes symmetric codes that fill words of 32 bits.
    """
    form, columns = form_of(scheme), layer.shape[1] if len(layer.shape) == 2 else 0
    if form is None or layer.kind not in ("linear", "embedding") or columns % form.weights.get("group_size", 1):
        return False
    if layer.kind == "linear":
        return form.format not in (NVFP4_FORMAT, MXFP4_FORMAT) or columns % 2 == 0
    bits = form.weights["num_bits"]
    plain = (form.format, form.inputs, form.weights["symmetric"]) == (PACKED, None, True)
    return plain and 32 % bits == 0 and columns * bits % 32 == 0


def stored(weight: QuantizedTensor, rows: slice, tensor_scale: float) -> dict[str, Tensor]:
    """The tensors of some rows of a layer, by the names that they have after the layer's own.

    `tensor_scale` is that of the layers which are fused with it in NVFP4, see `tensor_scales`.
    """
    scheme: Any = weight.scheme
    form = form_of(scheme)
    assert form is not None
    codes, scales, *others = scheme.unpacked(weight.tensors, weight.shape)
    codes, scales = codes.reshape(weight.shape)[rows], scales if len(scales) == 1 else scales[rows].contiguous()
    tensors = {} if form.inputs is None or form.format == NVFP4_FORMAT else dict(weight.input_params)
    if scheme.group_size == "tensor":
        scales = scales.flatten()[:1].clone()
    if isinstance(scheme, Integer):
        return {**tensors, "weight_scale": scales, **_integers(scheme, form, codes, others[0] if others else None, rows)}
    if form.format in (FP8, MXFP8_FORMAT):
        scales = scales if form.format == FP8 else weight.tensors["scales"][rows].contiguous()
        return {**tensors, "weight": codes.contiguous().view(torch.float8_e4m3fn), "weight_scale": scales}
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8

    tensors["weight_packed"] = pack_fp4_to_uint8(scheme.table.decode(codes))
    if form.format == MXFP4_FORMAT:
        return {**tensors, "weight_scale": weight.tensors["scales"][rows].contiguous()}
    if form.inputs is not None:
        tensors["input_global_scale"] = 1.0 / weight.input_params["input_scale"]
    block_scales = LEVELS["e4m3"].encode(scales / tensor_scale).view(torch.float8_e4m3fn)
    return {**tensors, "weight_scale": block_scales, "weight_global_scale": torch.tensor([1.0 / tensor_scale])}


def _integers(scheme: Integer, form: Form, codes: Tensor, zero_points: Tensor | None, rows: slice) -> dict[str, Tensor]:
    signed = signed_codes(codes, scheme.bits)
    if form.format == INT8:
        return {"weight": signed}
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    tensors = {"weight_packed": pack_to_int32(signed, scheme.bits), "weight_shape": torch.tensor(codes.shape)}
    if zero_points is not None:
        tensors["weight_zero_point"] = pack_to_int32(signed_codes(zero_points[rows], scheme.bits), scheme.bits, packed_dim=0)
    return tensors


def tensor_scales(weights: Mapping[str, QuantizedTensor], layers: Sequence[LayerSpec]) -> dict[str, float]:
    """NVFP4 layer -> the scale of its tensor: one for layers that vLLM fuses, which takes one of theirs for all.

    Tensor scales are powers of two, so that a block's scale changes its exponent alone. `InputError` where a block's scale does
    not fit in E4M3 with the common tensor scale.
    """
    fused = share([layer for layer in layers if layer.name in weights], FUSED, required=False)
    largest: dict[str, float] = {}
    for layer in fused:
        scale = float(weights[layer.name].tensors["tensor_scale"])
        largest[layer.group] = max(largest.get(layer.group, 0.0), scale)
    common = {layer.name: largest[layer.group] for layer in fused}
    for name, scale in common.items():
        weight: Any = weights[name]
        scales = weight.scheme.unpacked(weight.tensors, weight.shape)[1] / scale
        if not torch.equal(LEVELS["e4m3"].nearest(scales), scales):
            raise InputError(
                f"Layer '{name}' has blocks of weights that are too small for a tensor scale in common with the layers that vLLM "
                "fuses with it. Give these layers another scheme than NVFP4."
            )
    return common
