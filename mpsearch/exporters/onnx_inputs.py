"""Inputs of layers as 8-bit codes in an ONNX graph.

ONNX Runtime has its fastest kernels for uint8 inputs. On CPUs without instructions for products of bytes (VNNI) those with int8
weights add two products in 16 bits, where `255 * 127 + 255 * 127` saturates. Weights are int8 where codes end at 127, as those
of non-negative inputs with symmetric codes do, and uint8 elsewhere, which is exact on all CPUs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mpsearch.exporters.onnx_graph import GraphEditor
from mpsearch.schemes.base import QuantizedTensor

SCALE, ZERO = "scale", "zero_point"  # what the stored tensors of a layer are called, after its name
MOST_FOR_INT8 = 127


@dataclass(frozen=True)
class InputGrid:
    """How a tensor is rounded to uint8.

    Attributes
    ----------
    scale, zero
        Names of the initializers.
    step, zero_point
        Their values.
    low, high
        The codes that are used.
    """

    scale: str
    zero: str
    step: float
    zero_point: int
    low: int
    high: int

    def bounded(self, editor: GraphEditor, low: float, high: float) -> InputGrid:
        """The codes of values from `low` to `high`; without a zero point where none is negative."""
        offset = 0 if low >= 0 else self.zero_point
        ends = (self.low - self.zero_point, self.high - self.zero_point)
        first, last = (round(float(np.clip(np.float32(end) / np.float32(self.step), *ends))) + offset for end in (low, high))
        zero = self.zero if offset == self.zero_point else editor.code(offset)
        return replace(self, zero=zero, zero_point=offset, low=first, high=last)


def input_grid(editor: GraphEditor, name: str, weight: QuantizedTensor, tensor: str) -> InputGrid:
    """The static grid of a layer whose input is `tensor`; symmetric codes of values that may be negative are shifted by 128."""
    scheme: Any = weight.scheme
    params = weight.input_params
    symmetric = "input_zero_point" not in params
    zero = 128 if symmetric else int(params["input_zero_point"])
    scale = editor.constant(f"{name}.input_{SCALE}", params["input_scale"].numpy().reshape(()))
    stored = editor.code(zero) if symmetric else editor.constant(f"{name}.input_{ZERO}", np.array(zero, dtype=np.uint8))
    most = scheme.input.largest_code
    low, high = (128 - most, 128 + most) if symmetric else (0, most)
    grid = InputGrid(scale, stored, float(params["input_scale"]), zero, low, high)
    return grid.bounded(editor, *value_range(editor, tensor))


def value_range(editor: GraphEditor, tensor: str) -> tuple[float, float]:
    """Bounds of a tensor's values that follow from the nodes before it."""
    low, high = -np.inf, np.inf
    while (node := editor.made_by(tensor)) is not None and (ends := bounds(editor, node)) is not None:
        low, high = (float(np.clip(end, low, high)) for end in ends)  # later nodes bound what earlier ones did
        tensor = node.input[0]
    return low, high


def bounds(editor: GraphEditor, node: Any) -> tuple[float, float] | None:
    """Of the output of a monotone node of one input, which keeps 0 at 0 or at a bound; `None` for other nodes."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    if node.op_type == "MaxPool" and len(node.output) == 1:
        return -np.inf, np.inf
    if node.op_type != "Clip":
        return None
    ends = [-np.inf, np.inf]
    for i, name in enumerate(node.input[1:3]):
        if name and name not in editor.constants:
            return None
        if name:
            ends[i] = float(editor.values(name))
    return ends[0], ends[1]


def quantized(editor: GraphEditor, tensor: str, grid: InputGrid, exactly: bool = False) -> str:
    """The tensor in 8 bits, once for all layers that read it so.

    `QuantizeLinear` saturates at 0 and 255. Codes are limited to those of the grid where these differ by more than one, or
    `exactly`.
    """
    key = (tensor, grid.step, grid.zero_point)
    if key not in editor.shared:
        codes = editor.behind(tensor, "QuantizeLinear", [tensor, grid.scale, grid.zero], f"{tensor}.quantized.{grid.scale}")
        if grid.low > 1 or grid.high < 254 or (exactly and (grid.low, grid.high) != (0, 255)):
            codes = editor.behind(tensor, "Clip", [codes, editor.code(grid.low), editor.code(grid.high)], f"{codes}.clipped")
        editor.shared[key] = codes
    return editor.shared[key]


def dequantized(editor: GraphEditor, tensor: str, grid: InputGrid, exactly: bool = False) -> str:
    """The same, as float32."""
    codes = quantized(editor, tensor, grid, exactly)
    if (codes,) not in editor.shared:
        inputs = [codes, grid.scale, grid.zero]
        editor.shared[(codes,)] = editor.behind(tensor, "DequantizeLinear", inputs, f"{codes}.float")
    return editor.shared[(codes,)]


def weight_codes(codes: np.ndarray, grids: list[InputGrid]) -> np.ndarray:
    """Codes of a weight, int8, as they are multiplied with inputs: int8 or, shifted by 128, uint8."""
    fits = all(grid.high <= MOST_FOR_INT8 for grid in grids)
    return codes if fits else (codes.astype(np.int16) + 128).astype(np.uint8)
