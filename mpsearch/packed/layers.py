"""Modules that run on packed weights in the place of float ones, and the choice of a kernel for a layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpsearch import kernels
from mpsearch.errors import InputError
from mpsearch.graph.surgery import Undo, snapshot
from mpsearch.layer import from_rows
from mpsearch.schemes.base import QuantizedTensor, QuantScheme
from mpsearch.schemes.input import SMALLEST_NORMAL, IntegerInput
from mpsearch.schemes.integer import Integer
from mpsearch.schemes.rotated import Rotated


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer as it is to be packed: the names of the modules that own its weight, and their corrected biases by name."""

    kind: str
    modules: tuple[str, ...]
    weight: QuantizedTensor
    biases: Mapping[str, Tensor] = field(default_factory=dict)

    def on(self, device: torch.device) -> QuantizedLayer:
        """The same with the weight on a device; "meta", where nothing is, leaves it."""
        if device.type == "meta":
            return self
        return replace(self, weight=replace(self.weight, tensors={k: t.to(device) for k, t in self.weight.tensors.items()}))


def kernel_for(kind: str, shape: Sequence[int], scheme: QuantScheme) -> str | None:
    """The op of `mpsearch.kernels` that runs a layer of this kind and shape in this scheme; `None`: none does."""
    if isinstance(scheme, Rotated):
        return kernel_for(kind, shape, scheme.dense) if scheme.takes(kind, tuple(shape)) else None
    op = {"linear": "linear", "conv1d": "conv", "conv2d": "conv", "embedding": "embedding"}.get(kind)
    if op is None or not isinstance(scheme, Integer) or 0 in shape:
        return None
    columns = math.prod(shape[1:])
    if min(columns, scheme.group_size if isinstance(scheme.group_size, int) else columns) > kernels.MOST_GROUP_COLUMNS:
        return None
    if op == "embedding" or scheme.input is None:
        return op
    input = scheme.input
    fits = isinstance(input, IntegerInput) and (
        input.bits < 8 or (input.bits == 8 and (input.symmetric or input.has_static_scale))
    )
    return f"{op}_a8" if fits else None


def check_untraced() -> None:
    """Raise `InputError` while a graph is traced: the kernels are no operations of torch, and would be recorded as constants."""
    if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
        raise InputError(
            "A packed model cannot be traced: torch.jit.trace and torch.onnx.export would record what its kernels returned for "
            "the example as constants. Save it with mpsearch.packed.save, or write another format with mpsearch export."
        )


class PackedModule(nn.Module):
    """Replaces a float module; its plain attributes (`in_features`, `stride`, ...) are the float module's.

    `owners` are the modules that own the weight, `data` (uint8) is the weight as the kernels read it. `weight` dequantizes it,
    for code that looks at a weight: float32, in the float module's layout.
    """

    own_state = ("bias",)  # parameters and buffers that are not the packed weight's
    bias: Tensor | None
    data: Tensor
    shifted_bias: Tensor | None

    def __init__(self, module: nn.Module, layer: QuantizedLayer, packed: Any, bias: Tensor | None) -> None:
        super().__init__()
        for name, value in vars(module).items():
            if not name.startswith("_"):
                setattr(self, name, value)
        self.kind, self.owners, self.scheme, self.shape = layer.kind, layer.modules, layer.weight.scheme, layer.weight.shape
        self.rotates = isinstance(self.scheme, Rotated)
        # The scheme of the weight and of the input as the kernel reads them.
        self.dense = cast(Integer, self.scheme.dense if isinstance(self.scheme, Rotated) else self.scheme)
        self.packed = packed
        self.input_params = layer.weight.input_params
        self.register_buffer("data", packed.data)
        self.register_buffer("bias", bias)
        self.register_buffer("shifted_bias", None, persistent=False)
        input = self.dense.input
        if not isinstance(input, IntegerInput):
            return
        scale = float(self.input_params["input_scale"]) if self.input_params else None
        zero_point = int(self.input_params.get("input_zero_point", 0))
        self.input_settings: dict[str, Any] = {
            "input_scale": scale,
            "largest_code": input.largest_code,
            "symmetric": input.symmetric,
            "zero_point": zero_point,
        }
        # The kernels multiply int8, a code less its zero point. Of asymmetric 8-bit input that may not fit: they take it less its
        # middle code, and the shift, the same for every value, times the sum of a row of weights is made up for by the bias.
        if input.largest_code > 127 and not isinstance(module, nn.Embedding):
            shift = (input.largest_code // 2 - zero_point) * cast(float, scale)
            self.shifted_bias = shift * self.as_read().dequantize().double().flatten(1).sum(1)

    def unpacked(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes `[rows, columns]`, scales and zero points `[rows, n_groups]`, as they were packed."""
        return kernels.unpack_weight(self.packed)

    def quantized(self) -> QuantizedTensor:
        """The weight as its scheme stores it."""
        return replace(self.as_read(), scheme=self.scheme)

    def as_read(self) -> QuantizedTensor:
        """The weight as the kernel reads it: of a rotated scheme, the rotated one."""
        return self.dense.stored(*self.unpacked(), self.input_params, self.shape)

    @property
    def weight(self) -> Tensor:
        """See the class."""
        return self.quantized().dequantize()

    def kernel_input(self, x: Tensor) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
        """The input, bias and keywords of a kernel that quantizes its input."""
        if self.shifted_bias is not None:
            bias = self.shifted_bias if self.bias is None else self.bias + self.shifted_bias
            return x, bias.float(), self.input_settings
        input = cast(IntegerInput, self.dense.input)
        if input.scale != "tensor" or not x.numel():
            return x, self.bias, self.input_settings
        scale, zero_point = map(float, input.grid(x.min(), x.max()))
        if SMALLEST_NORMAL <= scale < math.inf:
            return x, self.bias, {**self.input_settings, "input_scale": scale, "zero_point": int(zero_point)}
        return torch.full_like(x, 0.0 if scale < SMALLEST_NORMAL else math.nan), self.bias, self.input_settings

    def extra_repr(self) -> str:
        """Shape and scheme."""
        return f"{list(self.shape)}, {self.scheme.describe()}"


class PackedLinear(PackedModule):
    """`nn.Linear` on `kernels.linear`, or `kernels.linear_a8`; its input is rotated first where the scheme says so."""

    def forward(self, input: Tensor) -> Tensor:
        """float32 `[..., in]` -> `[..., out]`."""
        check_untraced()
        if self.rotates:
            input = kernels.rotate(input)
        if self.dense.input is None:
            return kernels.linear(input, self.packed, self.bias)
        x, bias, settings = self.kernel_input(input)
        return kernels.linear_a8(x, self.packed, bias, **settings)


class PackedEmbedding(PackedModule):
    """`nn.Embedding` on `kernels.embedding`: rows are dequantized when they are looked up."""

    def forward(self, input: Tensor) -> Tensor:
        """int `[...]` -> float32 `[..., features]`."""
        check_untraced()
        return kernels.embedding(input, self.packed)


class PackedConv(PackedModule):
    """`nn.Conv1d` or `nn.Conv2d` on `kernels.conv`, or `kernels.conv_a8`."""

    def __init__(self, module: Any, layer: QuantizedLayer, packed: Any, bias: Tensor | None) -> None:
        super().__init__(module, layer, packed, bias)
        # The kernels pad with zeros, alike on both sides; anything else is padded here.
        self.pads_first = module.padding_mode != "zeros" or isinstance(module.padding, str)
        self.sides = module._reversed_padding_repeated_twice
        self.mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        self.geometry = {
            "stride": module.stride,
            "padding": (0,) * len(module.stride) if self.pads_first else module.padding,
            "dilation": module.dilation,
        }

    def unpacked(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `PackedModule`."""
        return kernels.unpack_conv(self.packed)

    def forward(self, input: Tensor) -> Tensor:
        """float32 `[n, in, *space]` or `[in, *space]` -> `[n, out, *space]` or `[out, *space]`."""
        check_untraced()
        batch = input if input.dim() == len(self.shape) else input[None]
        batch = F.pad(batch, self.sides, mode=self.mode) if self.pads_first else batch
        if self.scheme.input_format is None:
            output = kernels.conv(batch, self.packed, self.bias, **self.geometry)
        else:
            x, bias, settings = self.kernel_input(batch)
            output = kernels.conv_a8(x, self.packed, bias, **self.geometry, **settings)
        return output if input.dim() == len(self.shape) else output[0]


def read_from(holder: Any, name: str, module: Any) -> Undo:
    """Make the parameter `name` of `holder` the packed `module`'s weight, dequantized when it is read; returns the undo."""
    undo, cls = snapshot(holder), type(holder)
    delattr(holder, name)
    holder.tied_to = {**vars(holder).get("tied_to", {}), name: module}  # no submodule: the state dict would hold it twice
    holder.__class__ = type(cls.__name__, (cls,), {name: property(lambda self: self.tied_to[name].weight)})
    return undo


class Dequantized:
    """Mixed into the class of a module that no kernel runs: `weight` is dequantized at each access.

    The stored tensors are buffers; the other attributes are as in `PackedModule`.
    """

    kind: str
    owners: tuple[str, ...]
    own_state: tuple[str, ...]
    scheme: QuantScheme
    shape: tuple[int, ...]
    stored: tuple[str, ...]

    def quantized(self) -> QuantizedTensor:
        """The weight as its scheme stores it."""
        return QuantizedTensor(self.scheme, self.shape, {name: getattr(self, f"stored_{name}") for name in self.stored})

    @property
    def weight(self) -> Tensor:
        """float32, in the module's own layout."""
        return from_rows(self, self.quantized().dequantize())
