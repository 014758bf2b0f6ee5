"""The graph of a network that was read from an ONNX file, with the parameters that its module has now.

Nodes, tensors, inputs and outputs keep their names, and dimensions that were free stay free. Weights and biases become those of
the modules that onnx2torch made of the nodes; batch norms that were folded into layers become `Identity`.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from mpsearch.errors import InputError, one_line
from mpsearch.exporters.base import ModelCall
from mpsearch.exporters.onnx_graph import GraphEditor
from mpsearch.exporters.onnx_session import Session
from mpsearch.exporters.onnx_trace import named_inputs
from mpsearch.models.onnx_model import OnnxSource
from mpsearch.tree import tensors_in

logger = logging.getLogger("mpsearch")
TOLERANCE = 1e-3  # of the largest output
SMALLEST = 1e-2  # outputs below are compared as if the largest were this


def original_graph(model: nn.Module, call: ModelCall, opset: int) -> Any | None:
    """The file's graph (`onnx.ModelProto`) in `opset` or a later one, with initializers named as the parameters of `model`.

    `None`, after a logged sentence that says why, where the model is not from an ONNX file, or its graph cannot be kept: the
    file is absent, it cannot be converted to the opset, or ONNX Runtime does not compute what the module does for `call`.
    """
    source = getattr(model, "meta", {}).get("onnx")
    if not isinstance(source, OnnxSource) or importlib.util.find_spec("onnxruntime") is None:
        return None
    try:
        proto = _in_opset(source.path, opset)
        _with_parameters(GraphEditor(proto.graph), model, source)
        _check(proto, model, call)
    except Exception as error:  # of the file, of onnx's converter, of ONNX Runtime
        logger.info("The graph of %s cannot be kept (%s): its module is traced.", source.path, one_line(error)[:200])
        return None
    return proto


def _in_opset(path: Path, opset: int) -> Any:
    import onnx
    from onnx import version_converter

    proto = onnx.load(str(path))
    versions = {entry.domain: entry.version for entry in proto.opset_import}
    own = max(versions.get("", 0), versions.get("ai.onnx", 0))
    if own < opset:
        proto = version_converter.convert_version(proto, opset)
    del proto.graph.value_info[:]
    return proto


def _with_parameters(editor: GraphEditor, model: nn.Module, source: OnnxSource) -> None:
    """Give the nodes of layers their modules' weights and biases, in tensors of their own."""
    editor.constants_from_nodes()
    for node in editor.graph.node:
        name = source.modules.get(node.output[0], "")
        module: Any = model.get_submodule(name) if name else None
        if isinstance(module, nn.Identity) and node.op_type == "BatchNormalization":
            node.op_type = "Identity"
            del node.input[1:], node.output[1:], node.attribute[:]
        elif node.op_type in ("Conv", "ConvTranspose") and isinstance(module, _ConvNd):
            _set_parameters(editor, node, name, module)
        elif node.op_type == "Gemm" and isinstance(module, nn.Linear):
            from onnx import helper

            _set_parameters(editor, node, name, module)
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("transB", 1))
    read = {name for node in editor.graph.node for name in node.input} | {value.name for value in editor.graph.output}
    for name in editor.constants.keys() - read:
        editor.drop(name)
    stored = set(editor.constants)
    for value in [value for value in editor.graph.input if value.name in stored or value.name not in source.input_names]:
        editor.graph.input.remove(value)  # files of old versions list their initializers


def _set_parameters(editor: GraphEditor, node: Any, name: str, module: Any) -> None:
    del node.input[1:]
    for kind in ("weight", "bias"):
        parameter: Tensor | None = getattr(module, kind)
        if parameter is not None:
            node.input.append(editor.constant(f"{name}.{kind}", parameter.detach().float().numpy()))


@torch.no_grad()
def _check(proto: Any, model: nn.Module, call: ModelCall) -> None:
    """`InputError` where ONNX Runtime does not compute what the module does."""
    expected = [tensor.numpy() for tensor in tensors_in(model(*call.args, **call.kwargs))]
    got = Session(proto.SerializeToString())([tensor.numpy() for tensor in named_inputs(model, call).values()])
    for ours, theirs in zip(expected, got, strict=True):
        if np.shape(ours) != np.shape(theirs) or np.abs(ours - theirs).max() > TOLERANCE * max(np.abs(ours).max(), SMALLEST):
            raise InputError("its outputs are not those of the module")
