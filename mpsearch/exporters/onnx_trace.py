"""The float graph of a model as ONNX, by `torch.onnx.export`: initializers have the names of the parameters."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.errors import InputError, check_memory, one_line
from mpsearch.exporters.base import ModelCall
from mpsearch.exporters.onnx_graph import GraphEditor
from mpsearch.graph.projections import block_fused_paths
from mpsearch.tree import map_tensors, tensors_in

PREFIX = "model."


def named_inputs(model: nn.Module, call: ModelCall) -> dict[str, Tensor]:
    """Input name -> tensor, of a call of the model's forward: parameters in the order of its signature, nested ones numbered."""
    try:
        bound: Mapping[str, Any] = inspect.signature(model.forward).bind(*call.args, **call.kwargs).arguments
    except (TypeError, ValueError):  # a forward that has no such signature
        bound = {**{f"input_{i}": value for i, value in enumerate(call.args)}, **call.kwargs}
    given = _given_names(model, "input_names")
    tensors: dict[str, Tensor] = {}
    for name, value in bound.items():
        leaves = list(tensors_in(value))
        for i, leaf in enumerate(leaves):
            tensors[name if len(leaves) == 1 and not isinstance(value, list | tuple) else f"{name}_{i}"] = leaf
    return dict(zip(given, tensors.values(), strict=True)) if len(given) == len(tensors) else tensors


def _given_names(model: nn.Module, which: str) -> list[str]:
    """Those of the ONNX file that a model was read from; else none."""
    source = getattr(model, "meta", {}).get("onnx")
    return list(getattr(source, which, ()))


def _named_outputs(model: nn.Module, output: Any) -> list[str]:
    given = _given_names(model, "output_names")
    n = len(list(tensors_in(output)))
    if len(given) == n:
        return given
    if isinstance(output, Mapping) and all(isinstance(value, Tensor) for value in output.values()):
        return list(output)
    return ["output"] if n == 1 else [f"output_{i}" for i in range(n)]


class _Flat(nn.Module):
    """Takes the tensors of a call one by one, and returns those of its output."""

    def __init__(self, model: nn.Module, call: ModelCall) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors of the output, in order."""
        rest = iter(tensors)
        args, kwargs = map_tensors(lambda tensor: next(rest), (self.call.args, self.call.kwargs))
        return tuple(tensors_in(self.model(*args, **kwargs)))


@torch.no_grad()
def traced(model: nn.Module, call: ModelCall, *, opset: int) -> Any:
    """The graph (`onnx.ModelProto`) of the float model for a call of at least two samples, with a dynamic batch size.

    Raises
    ------
    InputError
        PyTorch cannot trace the model, or an operator has no form in ONNX: the operator is named.
    """
    inputs = named_inputs(model, call)
    leaves = list(tensors_in((call.args, call.kwargs)))
    outputs = _named_outputs(model, model(*call.args, **call.kwargs))
    by_id = {id(tensor): name for name, tensor in inputs.items()}
    names = [by_id.get(id(leaf), f"input_{i}") for i, leaf in enumerate(leaves)]
    with _silent(), contextlib.ExitStack() as undo:
        undo.callback(block_fused_paths(model))
        flat = _Flat(model, call).eval()
        options: dict[str, Any] = {
            "input_names": names,
            "output_names": outputs,
            "opset_version": opset,
            "optimize": False,
            "verbose": False,
        }
        for with_lengths in (True, False):  # code that depends on the length of a sequence is traced for that length
            shapes = {"tensors": _dynamic(leaves, with_lengths)}
            try:
                program: Any = torch.onnx.export(flat, tuple(leaves), dynamo=True, dynamic_shapes=shapes, **options)
                break
            except Exception as error:  # the model's own code and PyTorch's exporter raise anything
                check_memory(error)
                if not with_lengths:
                    raise InputError(_refused(model, error)) from error
        _fold_constants(program.model, {f"{PREFIX}{name}" for name, _ in model.named_parameters(remove_duplicate=False)})
    proto = program.model_proto
    editor = GraphEditor(proto.graph)
    for name in list(editor.constants):
        editor.rename(name, name.removeprefix(PREFIX))
    editor.constants_from_nodes()
    _fold_padding(editor)
    editor.finish()
    _strip(proto)
    return proto


def _fold_padding(editor: GraphEditor) -> None:
    """Zeros around the input of a convolution become the convolution's own."""
    from onnx import helper

    for node in editor.graph.node:
        pad = editor.made_by(node.input[0]) if node.op_type == "Conv" else None
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if pad is None or pad.op_type != "Pad" or attributes.get("auto_pad", b"NOTSET") != b"NOTSET":
            continue
        mode = next((attribute.s for attribute in pad.attribute if attribute.name == "mode"), b"constant")
        sizes, value = pad.input[1], pad.input[2] if len(pad.input) > 2 else ""
        has_axes = len(pad.input) > 3 and pad.input[3] != ""
        if mode != b"constant" or has_axes or any(name and name not in editor.constants for name in (sizes, value)):
            continue
        added = editor.values(sizes).reshape(2, -1)  # before and after, of each dimension
        if (value and editor.values(value).any()) or added[:, :2].any() or (added < 0).any():
            continue
        pads = added[:, 2:].reshape(-1) + attributes.get("pads", [0] * 2 * (added.shape[1] - 2))
        for attribute in [attribute for attribute in node.attribute if attribute.name == "pads"]:
            node.attribute.remove(attribute)
        node.attribute.append(helper.make_attribute("pads", pads.tolist()))
        node.input[0] = pad.input[0]


def _strip(proto: Any) -> None:
    """Remove what describes where each node is from (its stack trace, longer than the weights of a small network)."""
    graph = proto.graph
    del graph.value_info[:]
    for part in (proto, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        part.doc_string = ""
        del part.metadata_props[:]


def _dynamic(leaves: Sequence[Tensor], with_lengths: bool) -> tuple[dict[int, Any], ...]:
    """The dimensions that may differ: the batch size and, of token ids and what goes with them, the length."""
    dim = torch.export.Dim
    n = next((len(leaf) for leaf in leaves if leaf.dim()), 0)
    ids = [leaf for leaf in leaves if not leaf.is_floating_point() and leaf.dim() > 1]
    lengths = {size for leaf in ids for size in leaf.shape[1:]} if with_lengths else set()
    dynamic = []
    for leaf in leaves:
        sizes: dict[int, Any] = {i: dim.AUTO for i, size in enumerate(leaf.shape) if i and size in lengths and leaf.dim() < 4}
        dynamic.append({**({0: dim.DYNAMIC} if leaf.dim() and len(leaf) == n > 1 else {}), **sizes})
    return tuple(dynamic)


def _fold_constants(graph: Any, parameters: set[str]) -> None:
    """Compute constants in an `onnx_ir.Model`, except from parameters, which stay as they are."""
    from onnxscript import optimizer

    def should_fold(node: Any) -> bool | None:
        return False if any(value is not None and value.name in parameters for value in node.inputs) else None

    for _ in range(2):
        optimizer.fold_constants_ir(graph, should_fold=should_fold)
    optimizer.remove_unused_nodes(graph)


def _refused(model: nn.Module, error: Exception) -> str:
    text = " ".join(one_line(e) for e in _causes(error))
    operators = re.findall(r"No ONNX function found for (?:<OpOverload\(op=')?([\w.:]+)|(?:operator|op) '?(aten[\w.:]+)", text)
    named = next((a or b for a, b in operators), "")
    what = f"its operator {named} has no form in ONNX" if named else f"PyTorch cannot trace it ({one_line(error)[:300]})"
    return f"The {type(model).__name__} cannot be written as ONNX: {what}. Use exporter=native, or change the model's forward."


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the progress and the warnings of PyTorch's exporter."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
