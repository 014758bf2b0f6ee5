"""An allocation's layers as they learn: codes, scales and biases, and the scales of static inputs.

Codes learn as latent weights that are quantized at every step (`fake_quantize.py`). Zero points stay: they are whole numbers, and
what they would learn in a training as short as these does not reach the next. What the schemes store of all this is an engine's
bank again: nothing is learned that would not be stored, to the byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch import kernels
from mpsearch.allocation import Allocation
from mpsearch.engine.engine import QuantEngine
from mpsearch.graph.surgery import Undo, quantize_input, snapshot
from mpsearch.graph.uses import owners_outside
from mpsearch.layer import LayerSpec, from_rows, weight_rows
from mpsearch.schemes.base import QuantizedTensor, QuantScheme
from mpsearch.schemes.codebook import Codebook
from mpsearch.schemes.input import IntegerInput
from mpsearch.schemes.integer import SCALE_DTYPES, Integer
from mpsearch.schemes.rotated import Rotated
from mpsearch.training.fake_quantize import (
    Grid,
    Table,
    Whole,
    fake_quantize,
    fake_quantize_input,
    groups_of,
    rotate_back,
    steps_of,
)

INSIDE = 0.25  # of a step: no latent weight starts farther from its code, or the first steps would undo the quantizer's choice
PACE = 0.1  # of a scale to its weights: at two bits one that moves as fast as they do changes too many codes at once


@dataclass(frozen=True)
class Weight:
    """A layer's stored weight that learns: its scheme's grid, the group of each column, and whether it is that of a rotation."""

    stored: QuantizedTensor  # of a rotated scheme, what that stores densely
    grid: Grid
    groups: Tensor
    rotated: bool

    @classmethod
    def of(cls, stored: QuantizedTensor, device: str) -> Weight | None:
        """`None` for a scheme whose weights stay as they are: floats, and those with outliers."""
        scheme: Any = stored.scheme
        if not learns(scheme):
            return None
        rotated = isinstance(scheme, Rotated)
        if rotated:
            scheme = scheme.dense
            stored = replace(stored, scheme=scheme)
        _, columns, size = scheme.grid(stored.shape)
        grid = Whole(scheme.bits) if isinstance(scheme, Integer) else Table(scheme.table)
        return cls(stored, grid, groups_of(columns, size).to(device), rotated)

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """float32: the grid's values `[rows, columns]`, scales and zero points `[rows, n_groups]`."""
        scheme, tensors, shape = self.stored.scheme, self.stored.tensors, self.stored.shape
        if isinstance(scheme, Codebook):
            codes, scales = scheme.unpacked(tensors, shape)
            return scheme.table.decode(codes), scales, torch.zeros_like(scales)
        assert isinstance(scheme, Integer)
        codes, _, _, _ = scheme.unpacked(tensors, shape)
        rows, columns, _ = scheme.grid(shape)
        scales, found = tensors["scales"].float().reshape(rows, -1), tensors.get("zero_points")
        middle = 2 ** (scheme.bits - 1) if scheme.bits > 1 else 0.5
        zeros = torch.full_like(scales, middle) if found is None else found.float().reshape(scales.shape)
        return codes.reshape(rows, columns).float(), scales, zeros

    def rounded(self, scales: Tensor) -> Tensor:
        """Scales as they are stored, float32."""
        scheme = self.stored.scheme
        if isinstance(scheme, Codebook):
            of_tensor = self.stored.tensors.get("tensor_scale")
            whole = 1.0 if of_tensor is None else of_tensor.to(scales.device)
            return scheme.nearest_scale((scales / whole).clamp(min=0.0)) * whole
        assert isinstance(scheme, Integer)
        return scales.to(SCALE_DTYPES[scheme.scale_dtype]).float()

    def packed(self, matrix: Tensor, scales: Tensor, zeros: Tensor) -> QuantizedTensor:
        """What the scheme stores of a latent matrix under `rounded` scales and zero points."""
        scheme, shape, tensors = self.stored.scheme, self.stored.shape, self.stored.tensors
        steps = steps_of(matrix, scales, zeros, self.groups)
        if isinstance(scheme, Codebook):
            of_tensor = tensors.get("tensor_scale")
            scales = scales.cpu() if of_tensor is None else scales.cpu() / of_tensor
            return scheme.stored(scheme.table.encode(steps).cpu(), scales, of_tensor, self.stored.input_params, shape)
        assert isinstance(scheme, Integer)
        codes, scales = self.grid.nearest(steps).to(torch.uint8).cpu(), scales.to(SCALE_DTYPES[scheme.scale_dtype]).cpu()
        zero_points = None if scheme.symmetric else zeros.to(torch.uint8).cpu()
        return scheme.stored(codes, scales, zero_points, self.stored.input_params, shape)


class Student:
    """Every tensor that learns is `start + unit * latent`, the latent 0 at first; `latents` are what an optimizer is given.

    Weights in schemes without a grid keep their stored values; their biases learn too.
    """

    def __init__(self, engine: QuantEngine, allocation: Allocation) -> None:
        self.base = engine
        members = {group.name: group.layers for group in engine.space.groups}
        self.layers = [(layer, scheme) for group, scheme in allocation.items() for layer in members[group]]
        self.latents: dict[str, Tensor] = {}
        self._start: dict[str, Tensor] = {}
        self._unit: dict[str, Tensor] = {}
        self._stored = {(layer.name, scheme): engine.quantized(layer.name, scheme) for layer, scheme in self.layers}
        self._weights: dict[str, Weight] = {}
        self._zeros: dict[str, Tensor] = {}
        self._biases: dict[int, str] = {}  # a bias may be shared: parameter -> the name under which it learns
        for layer, scheme in self.layers:
            stored = self._stored[layer.name, scheme]
            weight = Weight.of(stored, engine.device)
            if weight is not None:
                self._add_weight(layer, weight)
            if _input_learns(stored.scheme) and layer.kind != "embedding":
                scale = stored.tensors["input_scale"].to(engine.device)
                self._add(f"{layer.name}.input_scale", scale, scale)
            corrected = engine.biases(layer.name, scheme)
            for name, bias in self._module_biases(layer):
                self._biases[id(bias)] = f"{name}.bias"
                start = corrected.get(name, bias.detach().float()).to(engine.device)
                self._add(f"{name}.bias", start, start.square().mean().sqrt())

    def _add(self, name: str, start: Tensor, unit: Tensor) -> None:
        self._start[name], self._unit[name] = start, torch.where(unit == 0, 1.0, unit)
        self.latents[name] = torch.zeros_like(start, requires_grad=True)

    def _add_weight(self, layer: LayerSpec, weight: Weight) -> None:
        """Latent weights are the float ones, moved no further than their stored code needs."""
        values, scales, zeros = (part.to(self.base.device) for part in weight.parts())
        module: Any = self.base.model.get_submodule(layer.name)
        matrix = weight_rows(module).float()
        matrix = (kernels.rotate(matrix) if weight.rotated else matrix).reshape(values.shape)
        below, above = weight.grid.gaps(values)
        steps = steps_of(matrix, scales, zeros, weight.groups).clamp(values - INSIDE * below, values + INSIDE * above)
        scale = scales[:, weight.groups]
        start = torch.where(scale == 0, matrix, (steps - zeros[:, weight.groups]) * scale)
        self._weights[layer.name], self._zeros[layer.name] = weight, zeros
        self._add(f"{layer.name}.weight", start, matrix.square().mean().sqrt())
        self._add(f"{layer.name}.scales", scales, PACE * scales.abs())

    def _module_biases(self, layer: LayerSpec) -> list[tuple[str, Tensor]]:
        modules: list[tuple[str, Any]] = [(name, self.base.model.get_submodule(name)) for name in layer.modules]
        return [(name, module.bias) for name, module in modules if getattr(module, "bias", None) is not None]

    def value(self, name: str) -> Tensor:
        """What is trained under this name, with its gradient."""
        return self._start[name] + self._unit[name] * self.latents[name]

    def _parts(self, layer: str) -> tuple[Tensor, Tensor, Tensor]:
        """Matrix, scales and zero points, the scales as they are stored, the gradient straight through that rounding."""
        exact = self.value(f"{layer}.scales")
        rounded = self._weights[layer].rounded(exact.detach()) + (exact - exact.detach())
        return self.value(f"{layer}.weight"), rounded, self._zeros[layer]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The model runs on these weights and biases, and its inputs are quantized, while the block runs."""
        with ExitStack() as undo:
            for layer, scheme in self.layers:
                stored = self._stored[layer.name, scheme]
                modules: list[Any] = [self.base.model.get_submodule(module) for module in layer.modules]
                if layer.name in self._weights:
                    weight = self._weights[layer.name]
                    rows = fake_quantize(*self._parts(layer.name), weight.groups, weight.grid).reshape(stored.shape)
                    rows = rotate_back(rows) if weight.rotated else rows
                else:
                    rows = stored.dequantize().to(self.base.device)
                weight_of_modules = from_rows(modules[0], rows)
                for holder, name in owners_outside(self.base.model, modules[0].weight, modules):
                    undo.callback(snapshot(holder))
                    delattr(holder, name)
                    setattr(holder, name, weight_of_modules)
                for module in modules:
                    undo.callback(snapshot(module))
                    undo.callback(self._quantize_input(layer, module, stored))
                    del module.weight
                    module.weight = weight_of_modules
                    if (bias := getattr(module, "bias", None)) is not None:
                        del module.bias
                        module.bias = self.value(self._biases[id(bias)])
            yield

    def _quantize_input(self, layer: LayerSpec, module: nn.Module, stored: QuantizedTensor) -> Undo:
        """As the scheme says: straight through, or by the scale that learns."""
        how: Any = stored.scheme.input_format
        if f"{layer.name}.input_scale" not in self.latents:
            return quantize_input(
                module, stored, lambda x, n: how.fake_quantize(x.detach(), n, stored.input_params) + (x - x.detach())
            )
        scale, zero_point = self.value(f"{layer.name}.input_scale"), stored.tensors.get("input_zero_point", torch.zeros(1))
        return quantize_input(module, stored, lambda x, n: fake_quantize_input(x, scale, zero_point.to(x), how, n))

    @torch.no_grad()
    def engine(self) -> QuantEngine:
        """An engine whose bank holds what has been learned, as the schemes store it."""
        weights, biases = {}, {}
        for layer, scheme in self.layers:
            stored = self._stored[layer.name, scheme]
            if layer.name in self._weights:
                learned_weight = self._weights[layer.name].packed(*self._parts(layer.name))
                stored = replace(learned_weight, scheme=stored.scheme)
            if f"{layer.name}.input_scale" in self.latents:
                learned = {"input_scale": self.value(f"{layer.name}.input_scale").cpu()}
                stored = replace(stored, tensors={**stored.tensors, **learned})
            weights[layer.name, scheme] = stored
            biases[layer.name, scheme] = {
                module: self.value(self._biases[id(bias)]).cpu() for module, bias in self._module_biases(layer)
            }
        return self.base.with_weights(weights, biases)

    @torch.no_grad()
    def set(self, latents: Mapping[str, Tensor]) -> None:
        """Back to these latents."""
        for name, latent in self.latents.items():
            latent.copy_(latents[name])


def learns(scheme: QuantScheme) -> bool:
    """Whether weights in the scheme learn: integers and codebooks, rotated too; with outliers beside, and floats, do not."""
    return isinstance(scheme, Integer | Codebook | Rotated)


def _input_learns(scheme: QuantScheme) -> bool:
    """Whether the scheme stores a scale of its input, which can learn."""
    return isinstance(scheme.input_format, IntegerInput) and scheme.input_format.has_static_scale
