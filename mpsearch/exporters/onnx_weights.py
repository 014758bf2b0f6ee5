"""Quantized weights in an ONNX graph, in the place of float initializers.

A weight is stored as integer codes and scales, and computed by standard operators from these constants alone:
`Reshape((Cast(codes) - zero_point) * Cast(scale))`, of a transposed convolution with its channels exchanged. ONNX Runtime
computes them once, when it loads the file: inputs are then multiplied as fast as by a float model. With `DequantizeLinear` in
their place it would do so at every call (1.32; it keeps that operator for its own fusions, and a convolution then misses its
blocked layout). Linear layers whose inputs have a static 8-bit scale become `QuantizeLinear` and `MatMulInteger`, integer
kernels of ONNX Runtime; with `packed` those of blocks become `com.microsoft.MatMulNBits`, whose weights stay packed in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpsearch.exporters.onnx_graph import GraphEditor, made, packed_bits
from mpsearch.exporters.onnx_inputs import SCALE, ZERO, input_grid, quantized, weight_codes
from mpsearch.layer import LayerSpec, in_layout, n_swapped
from mpsearch.schemes.base import QuantizedTensor
from mpsearch.schemes.floating import Float
from mpsearch.schemes.input import IntegerInput
from mpsearch.schemes.integer import signed_codes

CODES = "codes"  # what the stored tensors of a layer are called, after its name


def store(editor: GraphEditor, layer: LayerSpec, weight: QuantizedTensor, packed: bool) -> None:
    """Put the quantized weight in the place of the layer's float initializer."""
    scheme: Any = weight.scheme
    initializer = f"{layer.name}.weight"
    if isinstance(scheme, Float):
        _store_float(editor, layer, weight.tensors["values"])
        return
    dims = list(editor.constants[initializer].dims)
    editor.drop(initializer)
    codes, scales, zero_points = unpacked(weight)
    if isinstance(scheme.input, IntegerInput):
        _integer_products(editor, layer, weight, initializer, codes, scales)
        return
    if packed and _fits_nbits(layer, scheme, editor, initializer):
        _block_products(editor, layer, scheme, initializer, codes, scales, zero_points)
        return
    store_constant(editor, layer, weight, dims)


def store_constant(editor: GraphEditor, layer: LayerSpec, weight: QuantizedTensor, dims: Sequence[int]) -> None:
    """A weight that is computed in float32 from its codes and scales alone; `dims` are those of the float one."""
    scheme: Any = weight.scheme
    codes, scales, zero_points = unpacked(weight)
    name, n_groups, shape = layer.name, scales.shape[1], tuple(weight.shape)
    tensor = codes.reshape(shape[0], n_groups, -1)
    value = editor.node("Cast", [editor.constant(f"{name}.{CODES}", tensor, scheme.bits)], f"{name}.float", to=1)
    if zero_points is not None:
        zero = editor.constant(f"{name}.{ZERO}", zero_points[:, :, None], 8)
        value = editor.node("Sub", [value, editor.node("Cast", [zero], f"{name}.float_zero", to=1)], f"{name}.shifted")
    scale = editor.constant(f"{name}.{SCALE}", scales[:, :, None])
    if scales.dtype != np.float32:
        scale = editor.node("Cast", [scale], f"{name}.float_scale", to=1)
    value = editor.node("Mul", [value, scale], f"{name}.scaled")
    if groups := n_swapped(layer, dims):
        split = _reshaped(editor, value, (groups, shape[0] // groups, *shape[1:]), f"{name}.split")
        value = editor.node("Transpose", [split], f"{name}.exchanged", perm=[0, 2, 1, *range(3, 1 + len(shape))])
    _reshaped(editor, value, dims, f"{name}.weight")


def _reshaped(editor: GraphEditor, value: str, shape: Sequence[int], name: str) -> str:
    dims = editor.constant("shape_" + "x".join(map(str, shape)), np.array(shape, dtype=np.int64))
    return editor.node("Reshape", [value, dims], name)


def _store_float(editor: GraphEditor, layer: LayerSpec, values: Tensor) -> None:
    """A weight in float32, or in float16 or bfloat16 and computed in float32."""
    from onnx import TensorProto, helper

    name = f"{layer.name}.weight"
    values = in_layout(layer, values, editor.constants[name].dims).contiguous()
    if values.dtype == torch.float32:
        editor.set_values(name, values.numpy())
        return
    editor.drop(name)
    kind = TensorProto.FLOAT16 if values.dtype == torch.float16 else TensorProto.BFLOAT16
    raw = values.view(torch.int16).numpy().tobytes()
    editor.add(helper.make_tensor(f"{layer.name}.{CODES}", kind, list(values.shape), raw, raw=True))
    editor.node("Cast", [f"{layer.name}.{CODES}"], name, to=1)


def unpacked(weight: QuantizedTensor, signed: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Codes `[rows, columns]`, scales and zero points as they are stored.

    Codes are int8 around 0 where the scheme is symmetric and `signed`, else uint8.
    """
    scheme: Any = weight.scheme
    codes, scales, zero_points, _ = scheme.unpacked(weight.tensors, weight.shape)
    stored: Tensor = weight.tensors["scales"]
    values = (signed_codes(codes, scheme.bits) if zero_points is None and signed else codes).numpy()
    return values, scales.to(stored.dtype).numpy(), None if zero_points is None else zero_points.numpy()


def _integer_products(
    editor: GraphEditor, layer: LayerSpec, weight: QuantizedTensor, initializer: str, codes: np.ndarray, scales: np.ndarray
) -> None:
    """`MatMulInteger` of codes, in the place of each product with the weight."""
    name = layer.name
    scale = editor.constant(f"{name}.{SCALE}", scales[:, 0])
    if scales.dtype != np.float32:
        scale = editor.node("Cast", [scale], f"{name}.float_scale", to=1)
    products = [(node, x, bias, input_grid(editor, name, weight, x)) for node, x, bias in _products(editor, initializer)]
    values = weight_codes(codes, [grid for *_, grid in products])
    stored = editor.constant(f"{name}.{CODES}", values.T)
    zero = [editor.code(128)] if values.dtype == np.uint8 else []
    factor = editor.node("Mul", [scale, f"{name}.input_{SCALE}"], f"{name}.factor")
    for node, x, bias, grid in products:
        out = node.output[0]
        nodes = [
            made("MatMulInteger", [quantized(editor, x, grid), stored, grid.zero, *zero], f"{out}.integer"),
            made("Cast", [f"{out}.integer"], f"{out}.float", to=1),
            made("Mul", [f"{out}.float", factor], f"{out}.product" if bias else out),
            *([made("Add", [f"{out}.product", bias], out)] if bias else []),
        ]
        editor.replace(node, nodes)


def _fits_nbits(layer: LayerSpec, scheme: Any, editor: GraphEditor, initializer: str) -> bool:
    size = getattr(scheme, "group_size", None)
    block = isinstance(size, int) and size >= 16 and size & (size - 1) == 0
    products = {node.output[0] for node, _, _ in _products(editor, initializer)}
    reads = {user.output[0] for node in editor.users(initializer) for user in _readers(editor, node)}
    return layer.kind == "linear" and block and scheme.bits in (2, 4, 8) and bool(products) and reads == products


def _readers(editor: GraphEditor, node: Any) -> list[Any]:
    return editor.users(node.output[0]) if node.op_type == "Transpose" else [node]


def _block_products(
    editor: GraphEditor,
    layer: LayerSpec,
    scheme: Any,
    initializer: str,
    codes: np.ndarray,
    scales: np.ndarray,
    zero_points: np.ndarray | None,
) -> None:
    """`MatMulNBits`, whose codes are unsigned; without zero points these are the middle code."""
    name, (n, k), bits = layer.name, layer.shape, scheme.bits
    unsigned = codes if zero_points is not None else (codes.astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    blocks = unsigned.reshape(n, -1, scheme.group_size)
    packed = np.frombuffer(packed_bits(blocks, bits), dtype=np.uint8) if bits < 8 else blocks
    inputs = [editor.constant(f"{name}.{CODES}", packed.reshape(n, blocks.shape[1], -1))]
    scale = editor.constant(f"{name}.{SCALE}", scales)
    inputs.append(scale if scales.dtype == np.float32 else editor.node("Cast", [scale], f"{name}.float_scale", to=1))
    if zero_points is not None:
        padded = np.pad(zero_points, ((0, 0), (0, -zero_points.shape[1] % (8 // bits))))
        values = np.frombuffer(packed_bits(padded, bits), dtype=np.uint8) if bits < 8 else padded
        inputs.append(editor.constant(f"{name}.{ZERO}", values.reshape(n, -1)))
    attributes = {"K": k, "N": n, "bits": bits, "block_size": scheme.group_size}
    for node, x, bias in _products(editor, initializer):
        out = node.output[0]
        product = made("MatMulNBits", [x, *inputs], f"{out}.product" if bias else out, **attributes)
        editor.replace(node, [product, *([made("Add", [f"{out}.product", bias], out)] if bias else [])])


def _products(editor: GraphEditor, initializer: str) -> list[tuple[Any, str, str]]:
    """(node, its input, its bias or "") of each product of an input with the transposed weight."""
    products = []
    for node in editor.users(initializer):
        if node.op_type == "Gemm" and node.input[1] == initializer:
            products.append((node, node.input[0], node.input[2] if len(node.input) > 2 else ""))
        for user in _readers(editor, node) if node.op_type == "Transpose" else []:
            if user.op_type == "MatMul" and user.input[1] == node.output[0]:
                products.append((user, user.input[0], ""))
    return products
