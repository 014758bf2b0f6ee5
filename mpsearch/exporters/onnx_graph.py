"""Editing an ONNX graph: constants and nodes in front of others, behind others, and in the place of others."""

from __future__ import annotations

from typing import Any

import numpy as np

from mpsearch.errors import InputError


class GraphEditor:
    """Adds nodes and initializers in front of a graph, and replaces nodes in it."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.front: list[Any] = []
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        self._replaced: dict[str, list[Any]] = {}  # first output of a node -> what stands for it
        self._behind: dict[str, list[Any]] = {}  # tensor -> nodes right behind what computes it
        self.shared: dict[tuple[Any, ...], str] = {}  # what several layers read -> its name

    def constant(self, name: str, values: np.ndarray, bits: int | None = None) -> str:
        """An initializer, added unless one of the name exists; `bits` 2 or 4: integers, packed, signed or not as `values` are."""
        from onnx import TensorProto, helper, numpy_helper

        if name not in self.constants:
            if bits in (2, 4):
                signed = values.dtype == np.int8
                kind = getattr(TensorProto, f"{'' if signed else 'U'}INT{bits}")
                tensor = helper.make_tensor(name, kind, values.shape, packed_bits(values, bits), raw=True)
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

    def behind(self, tensor: str, operator: str, inputs: list[str], output: str) -> str:
        """A node right behind what computes a tensor, and behind others that were added there; returns its output."""
        self._behind.setdefault(tensor, []).append(made(operator, inputs, output))
        return output

    def code(self, value: int) -> str:
        """A constant of uint8."""
        return self.constant(f"code_{value}", np.array(value, dtype=np.uint8))

    def constants_from_nodes(self) -> None:
        """Make initializers of `Constant` nodes that hold a tensor."""
        for node in [node for node in self.graph.node if node.op_type == "Constant" and node.attribute[0].name == "value"]:
            tensor = node.attribute[0].t
            tensor.name = node.output[0]
            self.add(tensor)
            self.graph.node.remove(node)

    def made_by(self, tensor: str) -> Any | None:
        """The node that computes a tensor; `None` for inputs and initializers."""
        return next((node for node in self.graph.node if tensor in node.output), None)

    def is_output(self, tensor: str) -> bool:
        """Whether the graph returns a tensor."""
        return any(value.name == tensor for value in self.graph.output)

    def values(self, name: str) -> np.ndarray:
        """Those of an initializer."""
        from onnx import numpy_helper

        array: np.ndarray = numpy_helper.to_array(self.constants[name])
        return array

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
        nodes = [*self.front, *(node for value in self.graph.input for node in self._behind.get(value.name, ()))]
        for node in self.graph.node:
            nodes += self._replaced.get(node.output[0], [node])
            nodes += [added for name in node.output for added in self._behind.get(name, ())]
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


def packed_bits(values: np.ndarray, bits: int) -> bytes:
    """Codes of 2 or 4 bits in bytes, the first in the lowest bits."""
    per_byte = 8 // bits
    flat = values.reshape(-1).view(np.uint8) & (2**bits - 1)
    flat = np.pad(flat, (0, -len(flat) % per_byte)).reshape(-1, per_byte)
    shifts = (np.arange(per_byte) * bits).astype(np.uint8)
    return np.bitwise_or.reduce(flat << shifts, axis=1).astype(np.uint8).tobytes()
