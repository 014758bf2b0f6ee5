"""Convolutions with quantized inputs in an ONNX graph, such that ONNX Runtime multiplies integers where it can.

ONNX Runtime makes an integer kernel (`QLinearConv`) of a convolution whose input and weight are dequantized and whose output is
quantized. A scheme quantizes inputs alone. But where all that reads the output of a convolution, behind `Relu`, `Clip` and
`MaxPool`, are convolutions that quantize it with one scale, rounding may move up to the convolution: these operators are
monotone, so that the codes stay the same, and a bound of values becomes a bound of codes. Other convolutions, as those in front
of a residual addition, multiply the rounded input by float32 weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mpsearch.exporters.onnx_graph import GraphEditor
from mpsearch.exporters.onnx_inputs import SCALE, InputGrid, bounds, dequantized, input_grid, weight_codes
from mpsearch.exporters.onnx_weights import CODES, store_constant, unpacked
from mpsearch.layer import LayerSpec
from mpsearch.schemes.base import QuantizedTensor

Stored = Sequence[tuple[LayerSpec, QuantizedTensor]]


class _Path(NamedTuple):
    """The nodes from a convolution to the input of others."""

    convolution: Any
    nodes: list[Any]


def store_convolutions(editor: GraphEditor, layers: Stored) -> None:
    """Put the weights of convolutions with quantized inputs in the place of the float ones, and round their inputs."""
    readers: dict[str, list[tuple[Any, InputGrid]]] = {}
    for layer, weight in layers:
        for node in editor.users(f"{layer.name}.weight"):
            readers.setdefault(node.input[0], []).append((node, input_grid(editor, layer.name, weight, node.input[0])))
    quantized = {node.output[0]: node for nodes in readers.values() for node, _ in nodes}
    paths = {tensor: path for tensor, nodes in readers.items() if (path := _path(editor, tensor, nodes, quantized))}
    for tensor, nodes in readers.items():
        if tensor in paths:
            value = _rounded_before(editor, paths[tensor], nodes[0][1])
        for node, grid in nodes:
            node.input[0] = value if tensor in paths else dequantized(editor, tensor, grid)
    in_integers = {path.convolution.output[0] for path in paths.values()}
    grids = {node.output[0]: grid for nodes in readers.values() for node, grid in nodes}
    for layer, weight in layers:
        initializer = f"{layer.name}.weight"
        outputs = {node.output[0] for node in editor.users(initializer)}
        editor.drop(initializer)
        if outputs <= in_integers:
            _integer_weight(editor, layer, weight, [grids[output] for output in outputs])
        else:
            store_constant(editor, layer, weight, layer.shape)


def _path(editor: GraphEditor, tensor: str, nodes: list[tuple[Any, InputGrid]], quantized: dict[str, Any]) -> _Path | None:
    """How a convolution of `quantized` leads to `tensor`, where nothing else reads what is between; `None`: none does."""
    if len({(grid.step, grid.zero_point) for _, grid in nodes}) > 1:
        return None
    readers = [node.output[0] for node, _ in nodes]
    between: list[Any] = []
    while True:
        if editor.is_output(tensor) or [node.output[0] for node in editor.users(tensor)] != readers:
            return None
        if tensor in quantized:
            return _Path(quantized[tensor], between[::-1])
        node = editor.made_by(tensor)
        if node is None or bounds(editor, node) is None:
            return None
        between.append(node)
        tensor, readers = node.input[0], [node.output[0]]


def _rounded_before(editor: GraphEditor, path: _Path, grid: InputGrid) -> str:
    """The input of the path's readers, where the output of its convolution is rounded; the grid has the bounds of all nodes."""
    value = dequantized(editor, path.convolution.output[0], grid, exactly=True)
    for node in path.nodes:
        if node.op_type == "MaxPool":
            node.input[0] = value
            value = dequantized(editor, node.output[0], grid)
    return value


def _integer_weight(editor: GraphEditor, layer: LayerSpec, weight: QuantizedTensor, grids: list[InputGrid]) -> None:
    """Codes that ONNX Runtime does not turn into float32, as it takes them for its kernel; it rounds the bias to 32 bits."""
    codes, scales, _ = unpacked(weight)
    name, rows = layer.name, len(codes)
    values = weight_codes(codes, grids).reshape(tuple(weight.shape))
    inputs = [editor.constant(f"{name}.{CODES}", values), editor.constant(f"{name}.{SCALE}", scales[:, 0])]
    if scales.dtype != np.float32:
        inputs[1] = editor.node("Cast", [inputs[1]], f"{name}.float_scale", to=1)
    if values.dtype == np.uint8:
        size = editor.constant(f"shape_{rows}", np.array([rows], dtype=np.int64))
        inputs.append(editor.node("Expand", [editor.code(128), size], f"{name}.codes_zero_point"))
    editor.node("DequantizeLinear", inputs, f"{name}.weight", axis=0)
