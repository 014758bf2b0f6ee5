"""The products of a model's layers, seen where they happen: `F.linear` and `F.conv*` with a module's own weight and bias, and
products with a layer's weight outside of its modules (`mpsearch.graph.uses`).

What is seen are the call's own arguments, so that a module which pads its input first, or does anything else before or after the
product, is understood as well as torch's own. A weight that is changed before the product (standardized, say) is another tensor,
and its product is none of the module's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mpsearch.graph.surgery import hooked
from mpsearch.graph.uses import MATMULS, Use, watched_uses

PATCH_BYTES = 2**26
CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
ARGUMENTS: dict[Any, tuple[str, ...]] = {
    F.linear: CONV[:3],
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), CONV),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), TRANSPOSED),
}


@dataclass(frozen=True)
class Product:
    """One call: its input (of a convolution `[n, channels, *space]`), its output, and how it was made; `kernel` () is linear."""

    input: Tensor
    output: Tensor
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    groups: int
    transposed: bool

    @classmethod
    def of(cls, given: Mapping[str, Any], output: Tensor, transposed: bool) -> Product:
        """From the arguments of the call."""
        kernel = tuple(given["weight"].shape[2:])
        n = len(kernel)
        stride, dilation = _each(given.get("stride", 1), n), _each(given.get("dilation", 1), n)
        padding = given.get("padding", 0)
        if padding == "same":
            wide = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            pads = tuple((w // 2, w - w // 2) for w in wide)
        else:
            pads = tuple((p, p) for p in _each(0 if padding == "valid" else padding, n))
        x, output = given["input"].detach(), output.detach()
        if n and x.ndim == n + 1:  # without a batch
            x, output = x[None], output[None]
        return cls(x, output, kernel, stride, dilation, pads, given.get("groups", 1), transposed)

    @property
    def rows(self) -> int:
        """Output channels."""
        return self.output.shape[1 if self.kernel else -1]

    @property
    def count(self) -> int:
        """Output positions, of all samples."""
        return self.output.numel() // self.rows

    def patches(self) -> Iterator[Tensor]:
        """float32 `[groups, positions, columns]`, a few samples at a time: what meets each column; of a transposed none."""
        x = self.input.float()
        if not self.kernel:
            flat = x.reshape(-1, x.shape[-1])
            yield from (part[None] for part in flat.split(max(PATCH_BYTES // (4 * flat.shape[1]), 1)))
        elif not self.transposed:
            one = 4 * x[0].numel() * math.prod(self.kernel)
            for part in x.split(max(PATCH_BYTES // one, 1)):
                columns = torch.stack([window.flatten(2) for window in self._windows(part)], dim=2)
                n, channels, offsets, positions = columns.shape
                grouped = columns.reshape(n, self.groups, channels // self.groups * offsets, positions)
                yield grouped.permute(1, 0, 3, 2).reshape(self.groups, n * positions, -1)

    def column_means(self, x: Tensor) -> Tensor:
        """float32 `[groups, columns]`: the mean over batch and output positions of what meets each column; `x` as the input."""
        if not self.kernel:
            return x.reshape(-1, x.shape[-1]).mean(0, keepdim=True)
        x = x.mean(0, keepdim=True)
        windows = self._landings(x[0]) if self.transposed else self._windows(x)
        return torch.stack([window.flatten(2).mean((0, 2)) for window in windows], dim=1).reshape(self.groups, -1)

    def _windows(self, x: Tensor) -> Iterator[Tensor]:
        """For each kernel offset what meets it at every output position: `[n, channels, *out]`."""
        x = F.pad(x, [end for pair in reversed(self.padding) for end in pair])
        spans = [range(0, d * k, d) for k, d in zip(self.kernel, self.dilation, strict=True)]
        lengths = [n - (k - 1) * d for n, k, d in zip(x.shape[2:], self.kernel, self.dilation, strict=True)]
        for offsets in itertools.product(*spans):
            window = tuple(slice(o, o + n, s) for o, n, s in zip(offsets, lengths, self.stride, strict=True))
            yield x[(slice(None), slice(None), *window)]

    def _landings(self, x: Tensor) -> Iterator[Tensor]:
        """The same of a transposed one and a mean input `[channels, *space]`: input position n reaches output position
        n * stride + offset * dilation - padding, where that is not cropped; summed, over the number of output positions."""
        out = self.output.shape[2:]
        places = list(zip(x.shape[1:], self.stride, self.dilation, self.padding, out, strict=True))
        for offsets in itertools.product(*map(range, self.kernel)):
            part = x
            for axis, ((n, s, d, (p, _), size), offset) in enumerate(zip(places, offsets, strict=True), start=1):
                lands = torch.arange(n, device=x.device) * s + offset * d - p
                part = part.index_select(axis, ((lands >= 0) & (lands < size)).nonzero()[:, 0])
            yield (part.flatten(1).sum(1) / math.prod(out))[None, :, None]


def _each(value: int | Sequence[int], n: int) -> tuple[int, ...]:
    found = (value,) if isinstance(value, int) else tuple(value)
    return found * n if len(found) == 1 else found


def _product_of(use: Use) -> Product | None:
    """The product with the whole weight that a use is; `None` for any other."""
    if use.func in ARGUMENTS:
        given = dict(zip(ARGUMENTS[use.func], use.args, strict=False)) | dict(use.kwargs)
        is_whole = _is_same_view(given["weight"], use.weight)
        return Product.of(given, use.output, ARGUMENTS[use.func] is TRANSPOSED) if is_whole else None
    if use.func in (*MATMULS, torch.addmm) and use.weight.dim() == 2 and not use.kwargs:
        x, weight = use.args[-2:]
        is_whole = isinstance(weight, Tensor) and weight.dim() == 2 and _is_same_view(weight.t(), use.weight)
        return Product.of({"input": x, "weight": use.weight}, use.output, False) if is_whole else None
    return None


def _is_same_view(x: Tensor, weight: Tensor) -> bool:
    return x.data_ptr() == weight.data_ptr() and x.shape == weight.shape and x.stride() == weight.stride()


See = Callable[[str, Product, Tensor], Tensor | None]


@contextmanager
def watched(model: nn.Module, names: Sequence[str], see: See) -> Iterator[None]:
    """While the block runs, `see(name, product, output)` gets each product; what it returns takes the output's place.

    `names` are those of modules, whose products are those with their own weight and bias while they run, and of weights
    (`LayerSpec.weight_name`), whose products are those outside of the modules that own them.
    """
    modules = dict(model.named_modules())
    running: dict[int, list[tuple[str, Any]]] = {}

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = func(*args, **(kwargs or {}))
            if func in ARGUMENTS:
                given = dict(zip(ARGUMENTS[func], args, strict=False)) | (kwargs or {})
                name, module = (running.get(id(given["weight"])) or [("", None)])[-1]
                if module is not None and given.get("bias") is module.bias:
                    seen = see(name, Product.of(given, output, ARGUMENTS[func] is TRANSPOSED), output)
                    return output if seen is None else seen
            return output

    def enter(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: running.setdefault(id(module.weight), []).append((name, module))

    def leave(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if calls := running.get(id(module.weight)):  # none where another hook raised before `enter` ran
            calls.pop()

    def see_use(name: str, use: Use) -> Tensor | None:
        product = _product_of(use)
        return None if product is None else see(name, product, use.output)

    called = [name for name in names if name in modules]
    before, after = [(modules[name], enter(name)) for name in called], [(modules[name], leave) for name in called]
    weights = {name: model.get_parameter(name) for name in names if name not in modules}
    with hooked(before, after, always_call=True), Watch(), watched_uses(model, weights, see_use):
        yield
