"""Networks given as ONNX files, converted to modules by the package onnx2torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from mpsearch.errors import InputError, one_line
from mpsearch.models.without_torchvision import without_torchvision

INSTALL = "pip install 'mpsearch[onnx]', and pip install --no-deps onnx2torch"  # which asks for torchvision


@dataclass(frozen=True)
class OnnxSource:
    """What a module was converted from: `meta["onnx"]` of the module, which its copies keep.

    Attributes
    ----------
    path
        The file.
    input_names, output_names
        Those of its graph.
    modules
        First output of a node -> name of the module that onnx2torch made of the node.
    """

    path: Path
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    modules: Mapping[str, str]


def onnx_model(path: str | Path) -> nn.Module:
    """The network of an ONNX file as a module, in eval mode; it takes the graph's inputs in their order.

    Its `meta["onnx"]` is an `OnnxSource`.

    Parameters
    ----------
    path
        A file with float32 weights inside.

    Raises
    ------
    InputError
        The file is absent or damaged, an operator has no converter (it is named), or the packages are not installed.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"There is no ONNX file {file}. Set model.path.")
    try:
        import onnx

        with without_torchvision():
            from onnx2torch import convert
            from onnx2torch.onnx_graph import OnnxGraph

            from mpsearch.models._onnx_converters import replaced, unsupported, with_ranks
    except ImportError as error:
        raise InputError(f"model=onnx needs onnx and onnx2torch ({one_line(error)}): {INSTALL}.") from None
    try:
        graph = onnx.load(str(file))
        onnx.checker.check_model(graph)
    except Exception as error:  # a damaged file can raise anything
        raise InputError(f"{file} cannot be read as an ONNX network: {one_line(error)}") from error
    _constants_to_initializers(graph.graph)
    if missing := unsupported(graph):
        raise InputError(
            f"{file} has operators for which onnx2torch has no converter: {', '.join(missing)}. Give the network as a PyTorch "
            "module (model=custom), or export it without them."
        )
    graph = replaced(with_ranks(graph))
    try:
        model: Any = convert(graph)
    except NotImplementedError as error:
        raise InputError(
            f"{file} cannot be converted by onnx2torch: {one_line(error)} Give the network as a PyTorch module (model=custom)."
        ) from error
    except Exception as error:
        raise InputError(f"{file} cannot be converted by onnx2torch: {type(error).__name__}: {one_line(error)}") from error
    weights = {tensor.name for tensor in graph.graph.initializer}
    inputs = tuple(value.name for value in graph.graph.input if value.name not in weights)
    outputs = tuple(value.name for value in graph.graph.output)
    modules = {node.output_values[0]: name for name, node in OnnxGraph(graph.graph).nodes.items()}
    model.meta["onnx"] = OnnxSource(file.resolve(), inputs, outputs, modules)
    module: nn.Module = model.eval()
    return module


def _constants_to_initializers(graph: Any) -> None:
    """Weights that exporters wrote as nodes (Paddle, Keras), where onnx2torch does not look for them, become initializers."""
    tensors: dict[str, Any] = {}
    for node in list(graph.node):
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            tensor = node.attribute[0].t
        elif node.op_type == "Identity" and node.input[0] in tensors:
            tensor = tensors[node.input[0]]
        else:
            continue
        stored = graph.initializer.add()
        stored.CopyFrom(tensor)
        stored.name = node.output[0]
        tensors[stored.name] = stored
        graph.node.remove(node)
