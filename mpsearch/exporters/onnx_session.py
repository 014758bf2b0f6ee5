"""ONNX Runtime: a session as a module, and its own decoding of the weights in a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpsearch.errors import InputError, one_line
from mpsearch.exporters.base import ModelCall
from mpsearch.exporters.onnx_trace import named_inputs
from mpsearch.exporters.onnx_weights import CODES
from mpsearch.tree import map_tensors

IDENTITY = "identity"


class RuntimeModule(nn.Module):
    """A model in another runtime, with the inputs and outputs of the float `model`, from which it learns their structure."""

    def __init__(self, session: Any, model: nn.Module) -> None:
        super().__init__()
        self.session = session
        self.float_model = (model.eval(),)  # no submodule
        self.structure: Any = None

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the float model returns, with the runtime's tensors."""
        (model,) = self.float_model
        if self.structure is None:
            self.structure = model(*args, **kwargs)
        inputs = named_inputs(model, ModelCall(args, kwargs))
        device = next(iter(inputs.values())).device
        outputs = iter(self.session([tensor.detach().cpu().numpy() for tensor in inputs.values()]))
        return map_tensors(lambda tensor: torch.from_numpy(np.array(next(outputs))).to(device), self.structure)


class Session:
    """An `InferenceSession` with as many threads as PyTorch uses: arrays in the order of the graph's inputs -> its outputs."""

    def __init__(self, file: Path | bytes) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        given = file if isinstance(file, bytes) else str(file)
        try:
            self.session = onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # of the runtime: a damaged file, an operator that it lacks
            name = "the graph" if isinstance(file, bytes) else file
            raise InputError(f"ONNX Runtime cannot open {name}: {one_line(error)}") from error
        self.names = [value.name for value in self.session.get_inputs()]

    def __call__(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """See the class."""
        outputs: list[np.ndarray] = self.session.run(None, dict(zip(self.names, arrays, strict=True)))
        return outputs


def decoded(proto: Any) -> dict[str, Tensor]:
    """Layer name -> float32 weight as the graph holds it, of the layers of a file, computed by ONNX Runtime."""
    from onnx import helper, numpy_helper

    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    made_by = {name: node for node in proto.graph.node for name in node.output}
    weights = {}
    for name in [name.removesuffix(".weight") for name in stored if name.endswith(".weight")]:
        weights[name] = torch.from_numpy(numpy_helper.to_array(stored[f"{name}.weight"]).copy())
    for name in [name.removesuffix(f".{CODES}") for name in stored if name.endswith(f".{CODES}")]:
        reader = next(node for node in proto.graph.node if f"{name}.{CODES}" in node.input)
        feeds: dict[str, np.ndarray] = {}
        nodes = [made_by[f"{name}.weight"]] if f"{name}.weight" in made_by else [_of_identity(reader)]
        if reader.op_type == "MatMulInteger":
            scale, columns = made_by[f"{name}.factor"].input[0], stored[f"{name}.{CODES}"].dims[0]
            feeds[IDENTITY] = np.eye(columns, dtype=np.uint8)
            nodes += [
                helper.make_node("Cast", [reader.output[0]], ["float"], to=1),
                helper.make_node("Mul", ["float", scale], ["weight"]),
            ]
        elif reader.op_type == "MatMulNBits":
            columns = next(attribute.i for attribute in reader.attribute if attribute.name == "K")
            feeds[IDENTITY] = np.eye(columns, dtype=np.float32)
        others = {output: node for output, node in made_by.items() if output not in nodes[0].output}
        nodes = [*(before for node in nodes for before in _ancestors(node, others)), *nodes]
        values = torch.from_numpy(_computed(proto, nodes, feeds, stored))
        weights[name] = values.T if reader.op_type.startswith("MatMul") else values
    return weights


def _of_identity(product: Any) -> Any:
    """A node like `product` that multiplies an identity matrix."""
    from onnx import NodeProto

    node = NodeProto()
    node.CopyFrom(product)
    node.input[0] = IDENTITY
    if node.op_type == "MatMulInteger":
        node.input[2] = ""  # the zero point of the input
    return node


def _ancestors(node: Any, made_by: Mapping[str, Any]) -> list[Any]:
    """The nodes that compute a node's inputs, in order."""
    before = []
    for name in node.input:
        if name in made_by:
            before += [other for other in (*_ancestors(made_by[name], made_by), made_by[name]) if other not in before]
    return before


def _computed(proto: Any, nodes: list[Any], feeds: dict[str, np.ndarray], stored: Mapping[str, Any]) -> np.ndarray:
    """What ONNX Runtime computes with some nodes of a graph."""
    import onnxruntime
    from onnx import helper

    used = {name for node in nodes for name in node.input} & stored.keys()
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in feeds.items()
    ]
    outputs = [helper.make_tensor_value_info(nodes[-1].output[0], 1, None)]
    graph = helper.make_graph(nodes, "weight", inputs, outputs, [stored[name] for name in sorted(used)])
    model = helper.make_model(graph, opset_imports=proto.opset_import, ir_version=proto.ir_version)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    values: np.ndarray = session.run(None, feeds)[0]
    return values
