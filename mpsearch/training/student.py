"""An allocation's layers in training: codes, scales and biases that learn, and the scales of static inputs.

Codes learn as latent weights that are quantized at every step (`fake_quantize.py`). Zero points are integers and do not learn: a
training as short as these would not move them to the next. The result is quantized weights as the schemes store them, in the bank
of an engine: nothing is learned that would not be stored, to the byte.
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
    IntegerGrid,
    LevelGrid,
    column_groups,
    fake_quantize,
    fake_quantize_input,
    rotate_back,
    scaled_steps,
)

# Of a latent weight from its code at the start, in steps: with a larger one the first updates would undo the quantizer's choice.
MAX_OFFSET = 0.25
SCALE_RATE = 0.1  # learning rate of scales relative to weights: at two bits a faster scale changes too many codes at once


@dataclass(frozen=True)
class TrainableWeight:
    """A layer's stored weight, the grid of its scheme, and the group of each column.

    `stored` of a rotated scheme (`rotated`) is in the dense scheme that it stores.
    """

    stored: QuantizedTensor
    grid: Grid
    groups: Tensor
    rotated: bool

    @classmethod
    def create(cls, stored: QuantizedTensor, device: str) -> TrainableWeight | None:
        """`None` for a scheme whose weights do not learn."""
        scheme: Any = stored.scheme
        if not learns(scheme):
            return None
        rotated = isinstance(scheme, Rotated)
        scheme = scheme.dense if rotated else scheme
        _, columns, size = scheme.grid(stored.shape)
        grid = IntegerGrid(scheme.bits) if isinstance(scheme, Integer) else LevelGrid(scheme.table)
        return cls(replace(stored, scheme=scheme), grid, column_groups(columns, size).to(device), rotated)

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """float32: the grid's values `[rows, columns]`, scales and zero points `[rows, n_groups]`."""
        scheme: Any = self.stored.scheme
        tensors, shape = self.stored.tensors, self.stored.shape
        if isinstance(scheme, Codebook):
            codes, scales = scheme.unpacked(tensors, shape)
            return scheme.table.decode(codes), scales, torch.zeros_like(scales)
        codes = scheme.unpacked(tensors, shape)[0]
        rows, columns, _ = scheme.grid(shape)
        scales, zero_points = tensors["scales"].float().reshape(rows, -1), tensors.get("zero_points")
        middle = 2 ** (scheme.bits - 1) if scheme.bits > 1 else 0.5
        zeros = torch.full_like(scales, middle) if zero_points is None else zero_points.float().reshape(scales.shape)
        return codes.reshape(rows, columns).float(), scales, zeros

    def rounded(self, scales: Tensor) -> Tensor:
        """Scales as they are stored, float32."""
        scheme: Any = self.stored.scheme
        if not isinstance(scheme, Codebook):
            return scales.to(SCALE_DTYPES[scheme.scale_dtype]).float()
        unit = self.stored.tensors.get("tensor_scale", torch.ones(())).to(scales.device)
        return scheme.nearest_scale((scales / unit).clamp(min=0.0)) * unit

    def packed(self, matrix: Tensor, scales: Tensor, zeros: Tensor) -> QuantizedTensor:
        """The tensors that the scheme stores of a latent matrix under `rounded` scales and zero points."""
        scheme: Any = self.stored.scheme
        steps, about = scaled_steps(matrix, scales, zeros, self.groups), (self.stored.input_params, self.stored.shape)
        if isinstance(scheme, Codebook):
            unit = self.stored.tensors.get("tensor_scale")
            scales = scales.cpu() if unit is None else scales.cpu() / unit
            return scheme.stored(scheme.table.encode(steps).cpu(), scales, unit, *about)
        codes, scales = self.grid.nearest(steps).to(torch.uint8).cpu(), scales.to(SCALE_DTYPES[scheme.scale_dtype]).cpu()
        return scheme.stored(codes, scales, None if scheme.symmetric else zeros.to(torch.uint8).cpu(), *about)


class Student:
    """The network that learns; every tensor that does is `start + unit * latent`, with the latent 0 at first.

    `latents` are what an optimizer is given, by name. Weights in schemes without a grid keep their stored values; their biases
    learn too.
    """

    def __init__(self, engine: QuantEngine, allocation: Allocation) -> None:
        self.base = engine
        members = {group.name: group.layers for group in engine.space.groups}
        self.layers = [(layer, scheme) for group, scheme in allocation.items() for layer in members[group]]
        self.latents: dict[str, Tensor] = {}
        self._affine: dict[str, tuple[Tensor, Tensor]] = {}  # (start, unit)
        self._stored = {layer.name: engine.quantized(layer.name, scheme) for layer, scheme in self.layers}
        self._weights: dict[str, TrainableWeight] = {}
        self._zeros: dict[str, Tensor] = {}
        self._biases: dict[int, str] = {}  # a bias may be shared: parameter -> the name under which it learns
        for layer, scheme in self.layers:
            stored = self._stored[layer.name]
            weight = TrainableWeight.create(stored, engine.device)
            if weight is not None:
                self._add_weight(layer, weight)
            static = isinstance(stored.scheme.input_format, IntegerInput) and stored.scheme.input_format.has_static_scale
            if static and layer.kind != "embedding":
                scale = stored.tensors["input_scale"].to(engine.device)
                self._add(f"{layer.name}.input_scale", scale, scale)
            corrected = engine.biases(layer.name, scheme)
            for name, bias in self._module_biases(layer):
                self._biases[id(bias)] = f"{name}.bias"
                start = corrected.get(name, bias.detach().float()).to(engine.device)
                self._add(f"{name}.bias", start, start.square().mean().sqrt())

    def _add(self, name: str, start: Tensor, unit: Tensor) -> None:
        self._affine[name] = start, torch.where(unit == 0, 1.0, unit)
        self.latents[name] = torch.zeros_like(start, requires_grad=True)

    def _add_weight(self, layer: LayerSpec, weight: TrainableWeight) -> None:
        """Latent weights are the float ones, moved no further than their stored code needs."""
        values, scales, zeros = (part.to(self.base.device) for part in weight.parts())
        matrix = weight_rows(self.base.model.get_submodule(layer.name)).float()
        matrix = (kernels.rotate(matrix) if weight.rotated else matrix).reshape(values.shape)
        below, above = weight.grid.gaps(values)
        steps = scaled_steps(matrix, scales, zeros, weight.groups)
        steps = steps.clamp(values - MAX_OFFSET * below, values + MAX_OFFSET * above)
        scale = scales[:, weight.groups]
        start = torch.where(scale == 0, matrix, (steps - zeros[:, weight.groups]) * scale)
        self._weights[layer.name], self._zeros[layer.name] = weight, zeros
        self._add(f"{layer.name}.weight", start, matrix.square().mean().sqrt())
        self._add(f"{layer.name}.scales", scales, SCALE_RATE * scales.abs())

    def _module_biases(self, layer: LayerSpec) -> list[tuple[str, Tensor]]:
        modules: list[tuple[str, Any]] = [(name, self.base.model.get_submodule(name)) for name in layer.modules]
        return [(name, module.bias) for name, module in modules if getattr(module, "bias", None) is not None]

    def value(self, name: str) -> Tensor:
        """The tensor that is trained under this name, with its gradient."""
        start, unit = self._affine[name]
        return start + unit * self.latents[name]

    def _parts(self, layer: str) -> tuple[Tensor, Tensor, Tensor]:
        """Matrix, scales and zero points, the scales as they are stored, the gradient straight through that rounding."""
        exact = self.value(f"{layer}.scales")
        rounded = self._weights[layer].rounded(exact.detach()) + (exact - exact.detach())
        return self.value(f"{layer}.weight"), rounded, self._zeros[layer]

    @contextmanager
    def installed(self) -> Iterator[None]:
        """While the block runs, the model has these weights and biases, and its inputs are quantized."""
        with ExitStack() as undo:
            for layer, _ in self.layers:
                modules: list[Any] = [self.base.model.get_submodule(module) for module in layer.modules]
                weight = from_rows(modules[0], self._rows(layer.name))
                for holder, name in owners_outside(self.base.model, modules[0].weight, modules):
                    undo.callback(snapshot(holder))
                    delattr(holder, name)
                    setattr(holder, name, weight)
                for module in modules:
                    undo.callback(snapshot(module))
                    undo.callback(self._quantize_input(layer, module))
                    del module.weight
                    module.weight = weight
                    if (bias := getattr(module, "bias", None)) is not None:
                        del module.bias
                        module.bias = self.value(self._biases[id(bias)])
            yield

    def _rows(self, layer: str) -> Tensor:
        """The layer's weight, output channels first, as it is quantized at this step."""
        stored, weight = self._stored[layer], self._weights.get(layer)
        if weight is None:
            return stored.dequantize().to(self.base.device)
        rows = fake_quantize(*self._parts(layer), weight.groups, weight.grid).reshape(stored.shape)
        return rotate_back(rows) if weight.rotated else rows

    def _quantize_input(self, layer: LayerSpec, module: nn.Module) -> Undo:
        """As the scheme says: straight through, or by the scale that learns."""
        stored = self._stored[layer.name]
        input_format: Any = stored.scheme.input_format

        def straight_through(x: Tensor, n_inner: int) -> Tensor:
            return input_format.fake_quantize(x.detach(), n_inner, stored.input_params) + (x - x.detach())

        if f"{layer.name}.input_scale" not in self.latents:
            return quantize_input(module, stored, straight_through)
        scale, zero_point = self.value(f"{layer.name}.input_scale"), stored.tensors.get("input_zero_point", torch.zeros(1))
        return quantize_input(module, stored, lambda x, n: fake_quantize_input(x, scale, zero_point.to(x), input_format, n))

    @torch.no_grad()
    def engine(self) -> QuantEngine:
        """An engine whose bank holds what has been learned, as the schemes store it."""
        weights, biases = {}, {}
        for layer, scheme in self.layers:
            stored = self._stored[layer.name]
            if layer.name in self._weights:
                stored = replace(self._weights[layer.name].packed(*self._parts(layer.name)), scheme=stored.scheme)
            if f"{layer.name}.input_scale" in self.latents:
                scale = self.value(f"{layer.name}.input_scale").cpu()
                stored = replace(stored, tensors={**stored.tensors, "input_scale": scale})
            weights[layer.name, scheme] = stored
            module_biases = self._module_biases(layer)
            biases[layer.name, scheme] = {module: self.value(self._biases[id(b)]).cpu() for module, b in module_biases}
        return self.base.with_weights(weights, biases)

    @torch.no_grad()
    def set(self, latents: Mapping[str, Tensor]) -> None:
        """Take these latents."""
        for name, latent in self.latents.items():
            latent.copy_(latents[name])


def learns(scheme: QuantScheme) -> bool:
    """Whether weights in the scheme learn: integers and codebooks, rotated or not; not floats, and not those with outliers."""
    return isinstance(scheme, Integer | Codebook | Rotated)
