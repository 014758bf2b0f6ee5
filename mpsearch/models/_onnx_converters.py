"""What the package onnx2torch does not convert, or only where it knows shapes; imported when it is there.

A converter is registered at import, as the package's own are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from onnx import TensorProto, defs, helper, shape_inference
from onnx2torch.node_converters.registry import add_converter, get_converter
from onnx2torch.utils.common import OnnxToTorchModule, OperationConverterResult, onnx_mapping_from_node
from torch import Tensor, nn

# Their output has as many dimensions as their first input.
SAME_RANK = {
    *("Add", "Sub", "Mul", "Div", "Relu", "LeakyRelu", "PRelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh", "Cast"),
    *("Identity", "BatchNormalization", "MaxPool", "AveragePool", "GlobalAveragePool", "Pad", "Resize", "Dropout", "Softmax"),
}
CONVOLUTIONS = ("Conv", "ConvTranspose")  # theirs has as many as their weight


class GlobalMaxPool(nn.Module, OnnxToTorchModule):
    """The largest value of each channel, `[n, channels, 1, …]`."""

    def forward(self, x: Tensor) -> Tensor:
        """Of `[n, channels, …]`."""
        return torch.amax(x, dim=tuple(range(2, x.dim())), keepdim=True)


@add_converter(operation_type="GlobalMaxPool", version=1)
def _(node: Any, graph: Any) -> Any:
    return OperationConverterResult(torch_module=GlobalMaxPool(), onnx_mapping=onnx_mapping_from_node(node))


DOMAIN = "mpsearch"  # of operators that take the place of onnx2torch's own


class ReflectPad(nn.Module, OnnxToTorchModule):
    """Padding by reflection of any dimensions; PyTorch's own is of the last one to three."""

    def forward(self, x: Tensor, pads: Tensor, value: Tensor | None = None) -> Tensor:
        """`pads`: of all dimensions before, then of all dimensions after, int64."""
        amounts = pads.tolist()
        for dim, (before, after) in enumerate(zip(amounts[: x.dim()], amounts[x.dim() :], strict=True)):
            if before or after:
                size = x.shape[dim]
                places = torch.arange(-before, size + after, device=x.device).abs()
                x = x.index_select(dim, size - 1 - (size - 1 - places).abs())
        return x


@add_converter(operation_type="Pad", version=1, domain=DOMAIN)
def _(node: Any, graph: Any) -> Any:
    return OperationConverterResult(torch_module=ReflectPad(), onnx_mapping=onnx_mapping_from_node(node))


def replaced(model: Any) -> Any:
    """The model, in place, with our own operators where onnx2torch's cannot run what a node asks for."""
    for node in model.graph.node:
        if node.op_type == "Pad" and any(a.name == "mode" and a.s == b"reflect" for a in node.attribute) and len(node.input) > 1:
            node.domain = DOMAIN
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    return model


def unsupported(model: Any) -> list[str]:
    """The operators of an ONNX model that have no converter, sorted."""
    versions = {opset.domain: opset.version for opset in model.opset_import}
    missing = set()
    for node in model.graph.node:
        domain = "" if node.domain == "ai.onnx" else node.domain
        try:
            get_converter(node.op_type, versions.get(domain, defs.onnx_opset_version()), domain)
        except NotImplementedError:
            missing.add(node.op_type)
    return sorted(missing)


def with_ranks(model: Any) -> Any:
    """The model with the number of dimensions of each batch norm's input, which follows from the nodes before it."""
    try:
        model = shape_inference.infer_shapes(model, data_prop=True)
    except Exception:
        return model
    graph = model.graph
    known = {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}
    weights = {tensor.name: len(tensor.dims) for tensor in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        name = node.input[0] if node.op_type == "BatchNormalization" else None
        if name is None or (name in known and known[name].type.tensor_type.HasField("shape")):
            continue
        rank = _rank(name, producers, known, weights)
        if rank is not None:
            for value in [value for value in graph.value_info if value.name == name]:
                graph.value_info.remove(value)
            graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank))
    return model


def _rank(name: str, producers: dict[str, Any], known: dict[str, Any], weights: dict[str, int]) -> int | None:
    """The number of dimensions of a value; `None` where it does not follow from the nodes before it."""
    seen: set[str] = set()
    while name not in seen:
        seen.add(name)
        if name in known and known[name].type.tensor_type.HasField("shape"):
            return len(known[name].type.tensor_type.shape.dim)
        node = producers.get(name)
        if node is None:
            return None
        if node.op_type in CONVOLUTIONS:
            return weights.get(node.input[1])
        if node.op_type not in SAME_RANK:
            return None
        name = _largest(node.input, weights)
    return None


def _largest(inputs: Iterable[str], weights: dict[str, int]) -> str:
    """The first input that is no weight."""
    inputs = list(inputs)
    return next((name for name in inputs if name not in weights), inputs[0])
