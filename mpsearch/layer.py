"""The description of a layer, and its weight as a matrix of output channels.

Every weight is handled as a matrix `[rows, columns]`, one row per output channel, so that quantizers, kernels and costs do not
depend on the kind of layer. Only this file knows a module's own layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.errors import InputError
from mpsearch.files.tensor_file import tensors_sha256

# The kinds of module whose weight may be quantized, and their names.
KINDS: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.ConvTranspose3d: "conv_transpose3d",
    nn.Embedding: "embedding",
}


@dataclass(frozen=True)
class Activations:
    """What of one sample's activations is in memory when a layer runs, in bytes; where it is called often, the most of each.

    `live` is all of it with everything in the model's own float format, `without_input` what would stay if the layer's input were
    kept in another format; that input has `values` numbers in `tokens` tokens. `until_next` is the most that is in memory from
    there until the next searched layer runs (of the first layer: also before it).
    """

    live: int
    without_input: int
    values: int
    tokens: int
    until_next: int


@dataclass(frozen=True)
class LayerSpec:
    """One weight tensor that may be quantized.

    `name` is the qualified name of the (first) module that owns it, `shape` has output channels first (a transposed
    convolution's weight is turned round: `[out, in / groups, *kernel]`), `macs` are the multiply-accumulates of one sample,
    `group` names the layers that must share a scheme, `modules` are all modules that own this weight (more than one: tied).
    `activations` are measured on request (`mpsearch.graph.activation_memory`).
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    macs: int
    group: str
    modules: tuple[str, ...]
    activations: Activations | None = None

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def weight_name(self) -> str:
        """The qualified name of the parameter, which stands for its uses outside of `modules` (`mpsearch.graph.uses`)."""
        return f"{self.name}.weight".removeprefix(".")

    @property
    def readers(self) -> tuple[str, ...]:
        """The names under which products with the weight are known: its modules', and its own for uses outside of them."""
        return (*self.modules, self.weight_name)

    @property
    def tokens(self) -> float:
        """How often the weight is multiplied by an input in one sample: the tokens of a Linear layer."""
        return self.macs / self.numel if self.numel else 0.0


@dataclass(frozen=True)
class LayerGroup:
    """Layers that must share a scheme; most groups have one layer and its name."""

    name: str
    layers: tuple[LayerSpec, ...]

    @property
    def numel(self) -> int:
        """Number of weights."""
        return sum(layer.numel for layer in self.layers)


def kind_of(module: nn.Module) -> str | None:
    """The kind of a module whose weight may be quantized, `None` for any other."""
    return next((kind for cls, kind in KINDS.items() if isinstance(module, cls)), None)


def runs_as_usual(module: nn.Module) -> bool:
    """Whether the module runs torch's own `forward` of its kind, and not that of a subclass."""
    return any(type(module).forward is cls.forward for cls in KINDS)


def _is_transposed(module: nn.Module) -> bool:
    return isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)


def weight_rows(module: Any) -> Tensor:
    """The module's weight as `[out, in / groups, *kernel]` (Linear `[out, in]`, Embedding `[entries, features]`).

    A view where the layout already has output channels first. A transposed convolution holds `[in, out / groups, *kernel]`;
    its rows come back as a copy in which row `o` of group `g` holds what reaches output channel `g * out / groups + o`.
    """
    return to_rows(module, module.weight.detach())


def to_rows(module: Any, weight: Tensor) -> Tensor:
    """A tensor in the layout of the module's weight, as `weight_rows`."""
    return _swapped(weight, module.groups) if _is_transposed(module) else weight


def from_rows(module: Any, rows: Tensor) -> Tensor:
    """The inverse of `weight_rows`: `rows` in the module's own layout."""
    return _swapped(rows, module.groups) if _is_transposed(module) else rows


def in_layout(layer: LayerSpec, rows: Tensor, shape: Sequence[int]) -> Tensor:
    """`rows` of the layer as a parameter of this shape holds them, as `from_rows` does for a module."""
    groups = n_swapped(layer, shape)
    return _swapped(rows, groups) if groups else rows


def n_swapped(layer: LayerSpec, shape: Sequence[int]) -> int:
    """Groups within which a parameter of this shape has output and input channels exchanged; 0: its rows come first."""
    return layer.shape[0] // shape[1] if layer.kind.startswith("conv_transpose") else 0


def _swapped(weight: Tensor, groups: int) -> Tensor:
    """Input and output channels of a grouped weight, exchanged within each group."""
    split = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    return split.transpose(1, 2).reshape(groups * weight.shape[1], weight.shape[0] // groups, *weight.shape[2:])


def set_values(parameter: nn.Parameter, values: Tensor) -> None:
    """Give the parameter other values, in memory of its own: a tensor that shares its old memory keeps its values."""
    parameter.data = torch.empty_like(parameter.data).copy_(values)


def rows_shape(module: Any) -> tuple[int, ...]:
    """The shape of `weight_rows(module)`, without the copy."""
    shape = tuple(module.weight.shape)
    if _is_transposed(module):
        return (shape[1] * module.groups, shape[0] // module.groups, *shape[2:])
    return shape


def check_finite(name: str, weight: Tensor) -> None:
    """Raise `InputError` naming the layer where a weight is NaN or infinite."""
    if not torch.isfinite(weight).all():
        bad = int((~torch.isfinite(weight)).sum())
        raise InputError(
            f"Layer '{name}' has {bad} weights of {weight.numel()} that are NaN or infinite. Load a sound checkpoint."
        )


def weights_sha256(model: nn.Module) -> str:
    """Hex digest of all parameters and buffers (names, shapes, dtypes, bytes): tells two models apart, or two states of one."""
    return tensors_sha256(model.state_dict())
