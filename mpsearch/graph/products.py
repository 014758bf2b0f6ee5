"""The products of a model's layers, observed where they happen: `F.linear` and `F.conv*` with a module's own weight and bias, and
products with a layer's weight outside of its modules (`mpsearch.graph.uses`).

The arguments of the call itself are observed, so that a module which pads its input first, or does anything else before or after
the product, is understood as well as torch's own. A weight that is changed before the product (standardized, say) is another
tensor, and its product is none of the module's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpsearch.graph.uses import MATMULS, Use, observe_uses

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
    """One product of an input and a layer's weight.

    Attributes
    ----------
    input, output
        Of a convolution `[n, channels, *space]`, else `[..., features]`.
    kernel, stride, dilation
        One number for each spatial dimension; `()` is a linear layer.
    padding
        (before, after) for each spatial dimension.
    groups, transposed
        As of torch's convolutions.
    """

    input: Tensor
    output: Tensor
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    groups: int
    transposed: bool

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any], output: Tensor, transposed: bool = False) -> Product:
        """The product that a call of a function of `ARGUMENTS` computed."""
        kernel = tuple(arguments["weight"].shape[2:])
        n = len(kernel)
        stride, dilation = (_repeated(arguments.get(name, 1), n) for name in ("stride", "dilation"))
        padding = arguments.get("padding", 0)
        if padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            pads = tuple((t // 2, t - t // 2) for t in total)
        else:
            pads = tuple((p, p) for p in _repeated(0 if padding == "valid" else padding, n))
        x, output = arguments["input"].detach(), output.detach()
        if n and x.ndim == n + 1:  # without a batch
            x, output = x[None], output[None]
        return cls(x, output, kernel, stride, dilation, pads, arguments.get("groups", 1), transposed)

    @property
    def rows(self) -> int:
        """Output channels."""
        return self.output.shape[1 if self.kernel else -1]

    @property
    def count(self) -> int:
        """Output positions, of all samples."""
        return self.output.numel() // self.rows

    def patches(self) -> Iterator[Tensor]:
        """The rows that the weight is multiplied by, a few samples at a time; none of a transposed convolution.

        Yields
        ------
        Tensor
            float32 `[groups, positions, columns]`.
        """
        x = self.input.float()
        if not self.kernel:
            flat = x.reshape(-1, x.shape[-1])
            yield from (part[None] for part in flat.split(max(PATCH_BYTES // (4 * flat.shape[1]), 1)))
        elif not self.transposed:
            sample_bytes = 4 * x[0].numel() * math.prod(self.kernel)
            for part in x.split(max(PATCH_BYTES // sample_bytes, 1)):
                columns = torch.stack([window.flatten(2) for window in self._windows(part)], dim=2)
                n, channels, offsets, positions = columns.shape
                grouped = columns.reshape(n, self.groups, channels // self.groups * offsets, positions)
                yield grouped.permute(1, 0, 3, 2).reshape(self.groups, n * positions, -1)

    def patches_at(self, positions: Tensor) -> Tensor:
        """The rows that the weight is multiplied by at some output positions, which are counted over batch and space.

        Parameters
        ----------
        positions
            int64 `[n]`, from 0 to `count` - 1, on the input's device.

        Returns
        -------
        Tensor
            float32 `[groups, n, columns]`; `ValueError` for a transposed convolution.
        """
        if self.transposed:
            raise ValueError("A transposed convolution does not multiply its weight by patches.")
        if not self.kernel:
            return self.input.reshape(-1, self.input.shape[-1])[positions].float()[None]
        x = F.pad(self.input, [end for pair in reversed(self.padding) for end in pair])
        n, *places = torch.unravel_index(positions, (len(self.output), *self.output.shape[2:]))
        n_dims = len(self.kernel)
        axes: list[Tensor] = []
        for axis, (place, k, s, d) in enumerate(zip(places, self.kernel, self.stride, self.dilation, strict=True)):
            offsets = torch.arange(k, device=x.device).reshape(-1, *[1] * (n_dims - 1 - axis)) * d
            axes.append(place.reshape(-1, *[1] * n_dims) * s + offsets)
        windows = x.movedim(1, -1)[(n.reshape(-1, *[1] * n_dims), *axes)]  # [n, *kernel, channels]
        return windows.movedim(-1, 1).reshape(len(positions), self.groups, -1).transpose(0, 1).float()

    def rows_at(self, x: Tensor, positions: Tensor) -> Tensor:
        """What a tensor shaped like the output holds at some output positions (see `patches_at`): float32 `[n, rows]`."""
        if not self.kernel:
            return x.reshape(-1, x.shape[-1])[positions].float()
        return x.movedim(1, -1)[torch.unravel_index(positions, (len(x), *x.shape[2:]))].float()

    def column_means(self, x: Tensor) -> Tensor:
        """The mean of the values that each column of the weight is multiplied by, over batch and output positions.

        Parameters
        ----------
        x
            float32, shaped like the input.

        Returns
        -------
        Tensor
            float32 `[groups, columns]`.
        """
        if not self.kernel:
            return x.reshape(-1, x.shape[-1]).mean(0, keepdim=True)
        x = x.mean(0, keepdim=True)
        windows = self._transposed_means(x[0]) if self.transposed else self._windows(x)
        return torch.stack([window.flatten(2).mean((0, 2)) for window in windows], dim=1).reshape(self.groups, -1)

    def _windows(self, x: Tensor) -> Iterator[Tensor]:
        """For each kernel offset its input values at every output position: `[n, channels, *out]`."""
        x = F.pad(x, [end for pair in reversed(self.padding) for end in pair])
        spans = [range(0, d * k, d) for k, d in zip(self.kernel, self.dilation, strict=True)]
        lengths = [n - (k - 1) * d for n, k, d in zip(x.shape[2:], self.kernel, self.dilation, strict=True)]
        for offsets in itertools.product(*spans):
            window = tuple(slice(o, o + n, s) for o, n, s in zip(offsets, lengths, self.stride, strict=True))
            yield x[(slice(None), slice(None), *window)]

    def _transposed_means(self, x: Tensor) -> Iterator[Tensor]:
        """For each kernel offset of a transposed convolution the mean over output positions, `[1, channels, 1]`.

        x is the mean input `[channels, *space]`. Input position n reaches output position n * stride + offset * dilation -
        padding, where that is not cropped.
        """
        out = self.output.shape[2:]
        axes = list(zip(x.shape[1:], self.stride, self.dilation, self.padding, out, strict=True))
        for offsets in itertools.product(*map(range, self.kernel)):
            part = x
            for axis, ((n, s, d, (p, _), size), offset) in enumerate(zip(axes, offsets, strict=True), start=1):
                targets = torch.arange(n, device=x.device) * s + offset * d - p
                part = part.index_select(axis, ((targets >= 0) & (targets < size)).nonzero()[:, 0])
            yield (part.flatten(1).sum(1) / math.prod(out))[None, :, None]


def _repeated(value: int | Sequence[int], n: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * n if len(values) == 1 else values


def _product_of(use: Use) -> Product | None:
    """The product that a use is; `None` for one with part of the weight, and within its module with another bias."""
    if use.func in ARGUMENTS:
        arguments = dict(zip(ARGUMENTS[use.func], use.args, strict=False)) | dict(use.kwargs)
        is_own = use.owner is None or arguments.get("bias") is use.owner.bias
        is_whole = is_own and _is_same_view(arguments["weight"], use.weight)
        return Product.from_arguments(arguments, use.output, ARGUMENTS[use.func] is TRANSPOSED) if is_whole else None
    if use.func in (*MATMULS, torch.addmm) and use.owner is None and use.weight.dim() == 2 and not use.kwargs:
        x, weight = use.args[-2:]
        is_whole = isinstance(weight, Tensor) and weight.dim() == 2 and _is_same_view(weight.t(), use.weight)
        return Product.from_arguments({"input": x, "weight": use.weight}, use.output) if is_whole else None
    return None


def _is_same_view(x: Tensor, weight: Tensor) -> bool:
    return x.data_ptr() == weight.data_ptr() and x.shape == weight.shape and x.stride() == weight.stride()


def observe_products(
    model: nn.Module, names: Sequence[str], callback: Callable[[str, Product, Tensor], Tensor | None]
) -> AbstractContextManager[None]:
    """Call `callback(name, product, output)` for each product while the block runs; a tensor it returns replaces the output.

    Parameters
    ----------
    names
        Of modules, whose products are those with their own weight and bias while they run, and of weights
        (`LayerSpec.weight_name`), whose products are those outside of the modules that own them.
    """
    modules = dict(model.named_modules())
    readers: dict[Any, str] = {modules[name]: name for name in names if name in modules}
    weights = {name: model.get_parameter(name) for name in names if name not in modules}
    outside = {id(weight): name for name, weight in weights.items()}

    def observe(use: Use) -> Tensor | None:
        name = outside.get(id(use.weight)) if use.owner is None else readers.get(use.owner)
        product = None if name is None else _product_of(use)
        return None if name is None or product is None else callback(name, product, use.output)

    own = (module.weight for module in readers)
    return observe_uses(model, list({id(weight): weight for weight in (*own, *weights.values())}.values()), observe)
