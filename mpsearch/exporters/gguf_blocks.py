"""Weights as the blocks of GGUF files: our codes in ggml's layout, without being quantized again.

Layouts by ggml/src/ggml-common.h: `block_q4_0`, `block_q5_0`, `block_q8_0`, `block_mxfp4`. In all of them the first half of a
block's codes is in the low nibbles of its bytes, the second in the high ones.

A scheme of another package file takes part with an attribute `ggml_type` (a name of `gguf.GGMLQuantizationType`) and a method
`ggml_blocks(tensors, shape)`, which returns uint8 `[rows, bytes]`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.layer import LayerSpec
from mpsearch.schemes.base import QuantizedTensor, QuantScheme
from mpsearch.schemes.codebook import MXFP4
from mpsearch.schemes.floating import Float
from mpsearch.schemes.integer import Integer

Stored = tuple[np.ndarray, str]
"""An array, and the name of its ggml type."""

BLOCK = 32  # weights
FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
INTEGERS = {4: "Q4_0", 5: "Q5_0", 8: "Q8_0"}


def ggml_type(scheme: QuantScheme) -> str | None:
    """The name of the ggml type that stores the scheme's codes and scales exactly; `None`: there is none."""
    if isinstance(scheme, Float):
        return FLOATS[scheme.format]
    if scheme == MXFP4:
        return "MXFP4"
    if isinstance(scheme, Integer):
        layout = (scheme.group_size, scheme.symmetric, scheme.scale_dtype, scheme.input)
        return INTEGERS.get(scheme.bits) if layout == (BLOCK, True, "float16", None) else None
    named: str | None = getattr(scheme, "ggml_type", None)
    return named


def check_blocks(layer: LayerSpec, name: str, scheme: QuantScheme) -> None:
    """Raise `InputError` for a layer whose weight has no form in a GGUF file."""
    if ggml_type(scheme) is None or layer.kind not in ("linear", "embedding"):
        raise InputError(
            f"Layer '{layer.name}' ({layer.kind}) in scheme '{name}' ({scheme.describe()}) has no form in GGUF files; expected "
            "Linear layers and embeddings in a type of ggml, as Q4_0: 4-bit symmetric integers with a float16 scale per 32 "
            "weights. Search with runtime=llama_cpp."
        )


def ordered_blocks(weight: QuantizedTensor, order: Tensor | None) -> Stored:
    """The weight with its rows in this order, int64 `[rows]`; `None`: as they are."""
    kind, rows = ggml_type(weight.scheme), blocks(weight)
    assert kind is not None  # `check_blocks`
    return (rows if order is None else rows[order.numpy()]), kind


def blocks(weight: QuantizedTensor) -> np.ndarray:
    """The weight `[rows, columns]` in its `ggml_type`: uint8 `[rows, bytes]`; floats as they are (bfloat16 as uint8)."""
    scheme: Any = weight.scheme
    if isinstance(scheme, Float):
        values = weight.tensors["values"].cpu()
        return values.view(torch.uint8).numpy() if scheme.format == "bfloat16" else values.numpy()
    if isinstance(scheme, Integer):
        codes, scales, _, _ = scheme.unpacked(weight.tensors, weight.shape)
        return _integers(codes.cpu().numpy(), scales.cpu().numpy(), scheme.bits)
    if scheme == MXFP4:
        codes, _ = scheme.unpacked(weight.tensors, weight.shape)
        exponents = weight.tensors["scales"].cpu().numpy()[..., None]
        return _joined(exponents, _nibbles(_blocked(codes.cpu().numpy())))
    made: np.ndarray = scheme.ggml_blocks(weight.tensors, weight.shape)
    return made


def _integers(codes: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    blocked, scale_bytes = _blocked(codes), scales[..., None].view(np.uint8)
    if bits == 8:
        return _joined(scale_bytes, blocked ^ 0x80)  # from offset 128 to two's complement
    if bits == 4:
        return _joined(scale_bytes, _nibbles(blocked))
    fifth = np.packbits(blocked >> 4, axis=-1, bitorder="little")
    return _joined(scale_bytes, fifth, _nibbles(blocked & 0x0F))


def _blocked(codes: np.ndarray) -> np.ndarray:
    return codes.reshape(len(codes), -1, BLOCK)


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """uint8 `[rows, blocks, 16]`."""
    half = BLOCK // 2
    return codes[..., :half] | codes[..., half:] << 4


def _joined(*parts: np.ndarray) -> np.ndarray:
    joined = np.concatenate(parts, axis=-1)
    return np.ascontiguousarray(joined.reshape(len(joined), -1))
