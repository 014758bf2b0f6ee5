"""Quantized weights in an ONNX graph, in the place of float initializers.

A weight is stored as integer codes and scales, and computed by standard operators from these constants alone:
`Reshape((Cast(codes) - zero_point) * Cast(scale))`. ONNX Runtime computes them once, when it loads the file: inputs are then
multiplied as fast as by a float model. With `DequantizeLinear` in their place it would do so at every call (1.32; it keeps that
operator for its own fusions, and a convolution then misses its blocked layout). Linear layers whose inputs have a static 8-bit
scale become `QuantizeLinear` and `MatMulInteger`, integer kernels of ONNX Runtime; with `packed` those of blocks become
`com.microsoft.MatMulNBits`, whose weights stay packed in memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.layer import LayerSpec
from mpsearch.schemes.base import QuantizedTensor
from mpsearch.schemes.floating import Float
from mpsearch.schemes.input import IntegerInput
from mpsearch.schemes.integer import signed_codes

CODES, SCALE, ZERO = "codes", "scale", "zero_point"  # what the stored tensors of a layer are called, after its name


class GraphEditor:
    """Adds nodes and initializers in front of a graph, and replaces nodes in it."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.front: list[Any] = []
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self._replaced: dict[str, list[Any]] = {}  # first output of a node -> what stands for it
        self._after: dict[str, list[Any]] = {}  # tensor -> nodes right behind what computes it
        self._quantized: dict[tuple[str, float, int], str] = {}

    def constant(self, name: str, values: np.ndarray, bits: int | None = None) -> str:
        """An initializer, added unless one of the name exists; `bits` 2 or 4: integers, packed, signed or not as `values` are."""
        from onnx import TensorProto, helper, numpy_helper

        if name not in self.constants:
            if bits in (2, 4):
                signed = values.dtype == np.int8
                kind = getattr(TensorProto, f"{'' if signed else 'U'}INT{bits}")
                tensor = helper.make_tensor(name, kind, values.shape, _packed(values, bits), raw=True)
            else:
                tensor = numpy_helper.from_array(np.ascontiguousarray(values), name)
            self.add(tensor)
        return name

    def add(self, tensor: Any) -> None:
        """Add an initializer."""
        self.graph.initializer.append(tensor)
        self.constants[tensor.name] = self.graph.initializer[-1]

    def node(self, operator: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """A node in front of all others; returns its output."""
        self.front.append(made(operator, inputs, output, **attributes))
        return output

    def users(self, tensor: str) -> list[Any]:
        """The nodes that read a tensor."""
        return [node for node in self.graph.node if tensor in node.input]

    def replace(self, node: Any, nodes: list[Any]) -> None:
        """Put `nodes` in the place of one."""
        self._replaced[node.output[0]] = nodes

    def quantized(self, tensor: str, scale: str, zero: str, value: tuple[float, int]) -> str:
        """The tensor in 8 bits, once for all layers that read it with the same scale and zero point (`value`)."""
        key = (tensor, *value)
        if key not in self._quantized:
            self._quantized[key] = f"{tensor}.quantized.{scale}"
            self._after.setdefault(tensor, []).append(made("QuantizeLinear", [tensor, scale, zero], self._quantized[key]))
        return self._quantized[key]

    def dequantized(self, tensor: str, scale: str, zero: str, value: tuple[float, int]) -> str:
        """The same, as float32."""
        codes = self.quantized(tensor, scale, zero, value)
        name = f"{codes}.float"
        if all(name not in node.output for node in self._after[tensor]):
            self._after[tensor].append(made("DequantizeLinear", [codes, scale, zero], name))
        return name

    def set_values(self, name: str, values: np.ndarray) -> None:
        """Give an initializer other values; `InputError` where there is none of the name."""
        from onnx import numpy_helper

        if name not in self.constants:
            raise InputError(
                f"'{name}' is no tensor of the ONNX graph. Search with bias_correction=false, or use exporter=native."
            )
        self.constants[name].CopyFrom(numpy_helper.from_array(values, name))

    def rename(self, old: str, new: str) -> None:
        """Rename an initializer, also where it is read."""
        if old == new:
            return
        self.constants[new] = self.constants.pop(old)
        self.constants[new].name = new
        for node in self.graph.node:
            for i, name in enumerate(node.input):
                if name == old:
                    node.input[i] = new

    def drop(self, name: str) -> None:
        """Remove an initializer."""
        self.graph.initializer.remove(self.constants.pop(name))

    def finish(self) -> None:
        """Write all changes; nodes whose outputs nobody reads any more are removed."""
        nodes = [*self.front, *(node for value in self.graph.input for node in self._after.get(value.name, ()))]
        for node in self.graph.node:
            nodes += self._replaced.get(node.output[0], [node])
            nodes += [added for name in node.output for added in self._after.get(name, ())]
        while True:
            read = {name for node in nodes for name in node.input} | {value.name for value in self.graph.output}
            kept = [node for node in nodes if any(name in read for name in node.output)]
            if len(kept) == len(nodes):
                break
            nodes = kept
        del self.graph.node[:]
        self.graph.node.extend(nodes)


def made(operator: str, inputs: list[str], output: str, **attributes: Any) -> Any:
    """A node, named after its output."""
    from onnx import helper

    domain = "com.microsoft" if operator == "MatMulNBits" else ""
    return helper.make_node(operator, inputs, [output], name=output, domain=domain, **attributes)


def store(editor: GraphEditor, layer: LayerSpec, weight: QuantizedTensor, packed: bool) -> None:
    """Put the quantized weight in the place of the layer's float initializer, which has output channels first."""
    scheme: Any = weight.scheme
    initializer = f"{layer.name}.weight"
    if scheme == Float("float32"):
        editor.set_values(initializer, weight.dequantize().numpy())
        return
    editor.drop(initializer)
    if isinstance(scheme, Float):
        _cast(editor, layer.name, weight.tensors["values"])
        return
    codes, scales, zero_points = unpacked(weight)
    shape = tuple(weight.shape)
    if isinstance(scheme.input, IntegerInput):
        if layer.kind == "linear":
            _integer_products(editor, layer, weight, initializer, codes, scales)
            return
        _quantize_inputs(editor, layer, weight, initializer)
    if packed and _fits_nbits(layer, scheme, editor, initializer):
        _block_products(editor, layer, scheme, initializer, codes, scales, zero_points)
        return
    name, n_groups = layer.name, scales.shape[1]
    tensor = codes.reshape(shape[0], n_groups, -1)
    value = editor.node("Cast", [editor.constant(f"{name}.{CODES}", tensor, scheme.bits)], f"{name}.float", to=1)
    if zero_points is not None:
        zero = editor.constant(f"{name}.{ZERO}", zero_points[:, :, None], 8)
        value = editor.node("Sub", [value, editor.node("Cast", [zero], f"{name}.float_zero", to=1)], f"{name}.shifted")
    scale = editor.constant(f"{name}.{SCALE}", scales[:, :, None])
    if scales.dtype != np.float32:
        scale = editor.node("Cast", [scale], f"{name}.float_scale", to=1)
    value = editor.node("Mul", [value, scale], f"{name}.scaled")
    dims = editor.constant("shape_" + "x".join(map(str, shape)), np.array(shape, dtype=np.int64))
    editor.node("Reshape", [value, dims], initializer)


def _cast(editor: GraphEditor, name: str, values: Tensor) -> None:
    """A weight in float16 or bfloat16."""
    from onnx import TensorProto, helper

    kind = TensorProto.FLOAT16 if values.dtype == torch.float16 else TensorProto.BFLOAT16
    raw = values.contiguous().view(torch.int16).numpy().tobytes()
    editor.add(helper.make_tensor(f"{name}.{CODES}", kind, list(values.shape), raw, raw=True))
    editor.node("Cast", [f"{name}.{CODES}"], f"{name}.weight", to=1)


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
    stored = editor.constant(f"{name}.{CODES}", codes.T)
    scale = editor.constant(f"{name}.{SCALE}", scales[:, 0])
    if scales.dtype != np.float32:
        scale = editor.node("Cast", [scale], f"{name}.float_scale", to=1)
    x_scale, x_zero, value = _input_params(editor, name, weight)
    factor = editor.node("Mul", [scale, x_scale], f"{name}.factor")
    for node, x, bias in _products(editor, initializer):
        out = node.output[0]
        nodes = [
            made("MatMulInteger", [editor.quantized(x, x_scale, x_zero, value), stored, x_zero], f"{out}.integer"),
            made("Cast", [f"{out}.integer"], f"{out}.float", to=1),
            made("Mul", [f"{out}.float", factor], f"{out}.product" if bias else out),
            *([made("Add", [f"{out}.product", bias], out)] if bias else []),
        ]
        editor.replace(node, nodes)


def _quantize_inputs(editor: GraphEditor, layer: LayerSpec, weight: QuantizedTensor, initializer: str) -> None:
    """Round the input of each convolution with the weight, by `QuantizeLinear` and `DequantizeLinear`."""
    x_scale, x_zero, value = _input_params(editor, layer.name, weight)
    for node in editor.users(initializer):
        node.input[0] = editor.dequantized(node.input[0], x_scale, x_zero, value)


def _input_params(editor: GraphEditor, name: str, weight: QuantizedTensor) -> tuple[str, str, tuple[float, int]]:
    """The static scale of the input and its zero point, and both values.

    Codes are uint8, for which ONNX Runtime has the faster kernels: symmetric ones are shifted by 128.
    """
    params = weight.input_params
    own = "input_zero_point" in params
    zero = int(params["input_zero_point"]) if own else 128
    scale = editor.constant(f"{name}.input_{SCALE}", params["input_scale"].numpy().reshape(()))
    name = f"{name}.input_{ZERO}" if own else "input_zero_point_128"
    return scale, editor.constant(name, np.array(zero, dtype=np.uint8)), (float(params["input_scale"]), zero)


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
    packed = np.frombuffer(_packed(blocks, bits), dtype=np.uint8) if bits < 8 else blocks
    inputs = [editor.constant(f"{name}.{CODES}", packed.reshape(n, blocks.shape[1], -1))]
    scale = editor.constant(f"{name}.{SCALE}", scales)
    inputs.append(scale if scales.dtype == np.float32 else editor.node("Cast", [scale], f"{name}.float_scale", to=1))
    if zero_points is not None:
        padded = np.pad(zero_points, ((0, 0), (0, -zero_points.shape[1] % (8 // bits))))
        values = np.frombuffer(_packed(padded, bits), dtype=np.uint8) if bits < 8 else padded
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


def _packed(values: np.ndarray, bits: int) -> bytes:
    """Codes of 2 or 4 bits in bytes, the first in the lowest bits."""
    per_byte = 8 // bits
    flat = values.reshape(-1).view(np.uint8) & (2**bits - 1)
    flat = np.pad(flat, (0, -len(flat) % per_byte)).reshape(-1, per_byte)
    shifts = (np.arange(per_byte) * bits).astype(np.uint8)
    return np.bitwise_or.reduce(flat << shifts, axis=1).astype(np.uint8).tobytes()
