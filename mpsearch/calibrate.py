"""Run the calibration data once and keep what quantizers, bias correction and static ranges need of every layer's input: its
moments and its histogram.

The mean and the second moment of each input value that meets a column of the weight matrix. For a convolution that is each
(channel, kernel offset), padding counted as the zeros it is; both are linear in the (squared) input, so that the batch can be
averaged first and no patch matrix is ever made.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpsearch import kernels
from mpsearch.errors import InputError
from mpsearch.layer import LayerSpec, check_finite, rows_shape, runs_as_usual
from mpsearch.progress import phase
from mpsearch.quantizers.base import InputMoments
from mpsearch.schemes.histogram import Histogram
from mpsearch.tasks.base import Task
from mpsearch.trace import tensors_in

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
PATCH_BYTES = 2**26
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@torch.no_grad()
def calibrate(
    model: nn.Module,
    task: Task,
    layers: Sequence[LayerSpec],
    batches: Sequence[tuple[Any, Tensor]],
    *,
    rotated: bool = False,
) -> dict[str, InputMoments]:
    """Module name -> moments of its input, float32 on the CPU; `InputError` where one is NaN or infinite.

    With `rotated` also those of the rotated inputs of Linear layers, which rotated schemes ask for.

    Left out are embeddings, whose input is indices, and modules that run a `forward` of their own (a convolution that
    standardizes its weight, say): their output is not what weight and input alone say.
    """
    sums: dict[str, InputMoments] = {}
    hooks = []

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            x = next(tensors_in((args, kwargs))).detach()
            count = output.numel() // rows_shape(module)[0]
            if not torch.isfinite(x).all():
                raise _not_finite(name)
            found = _moments(module, x, count)
            if rotated and isinstance(module, nn.Linear):
                found = replace(found, rotated=_moments(module, kernels.rotate(x), count))
            sums[name] = InputMoments.pooled([sums[name], found]) if name in sums else found

        return hook

    for name in (name for layer in layers for name in layer.modules):
        module: Any = model.get_submodule(name)
        check_finite(name, module.weight.detach())  # else the next layer's input would be to blame
        if not isinstance(module, nn.Embedding) and runs_as_usual(module):
            hooks.append(module.register_forward_hook(hook_for(name), with_kwargs=True))
    try:
        with phase("calibrate", len(batches)) as advance:
            for inputs, _ in batches:
                task.forward(model, inputs)
                advance("")
    finally:
        for handle in hooks:
            handle.remove()
    return {name: _single(moments) for name, moments in sums.items()}


def _moments(module: nn.Module, x: Tensor, count: int) -> InputMoments:
    """Of one input, float64."""
    mean, second = (_column_means(module, y).double().cpu() for y in (x, x.square()))
    return InputMoments(mean, second, count, Histogram.of(x))


def _single(moments: InputMoments) -> InputMoments:
    """In float32."""
    rotated = None if moments.rotated is None else _single(moments.rotated)
    return replace(moments, mean=moments.mean.float(), second_moment=moments.second_moment.float(), rotated=rotated)


@torch.no_grad()
def hessians(model: nn.Module, task: Task, modules: Sequence[str], batches: Sequence[tuple[Any, Tensor]]) -> dict[str, Tensor]:
    """Module name -> E[x x^T] of what meets the columns of its weight, float32 `[groups, columns, columns]` on the CPU.

    Half the Hessian of the mean squared error of a row's output (Frantar et al. 2023, section 3.1), for the modules that are
    reached and whose input meets the weight as rows of patches (no embedding, no transposed convolution, no `forward` of its
    own). Patches are made of a few samples at a time; beside the result, what is held is at most `PATCH_BYTES` and a batch.

    Raises `InputError` where a layer's input is NaN or infinite.
    """
    sums: dict[str, Tensor] = {}
    counts: Counter[str] = Counter()

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            x = next(tensors_in((args, kwargs))).detach()
            for patches in _patches(module, x):
                product = patches.transpose(1, 2) @ patches
                sums[name] = sums[name].add_(product) if name in sums else product
                counts[name] += patches.shape[1]

        return hook

    found = {name: model.get_submodule(name) for name in modules}
    usual = {name: module for name, module in found.items() if isinstance(module, (*CONVS, nn.Linear)) and runs_as_usual(module)}
    hooks = [module.register_forward_hook(hook_for(name), with_kwargs=True) for name, module in usual.items()]
    try:
        with phase("hessians", len(batches)) as advance:
            for inputs, _ in batches:
                task.forward(model, inputs)
                advance("")
    finally:
        for handle in hooks:
            handle.remove()
    for name, total in sums.items():
        if not torch.isfinite(total.div_(counts[name])).all():
            raise _not_finite(name)
    return {name: total.cpu() for name, total in sums.items()}


def _not_finite(layer: str) -> InputError:
    return InputError(f"The calibration data make NaN or infinite inputs of layer '{layer}'. Check the data and the model.")


def hessian_bytes(module: Any) -> int:
    """What `hessians` holds for a module."""
    columns = math.prod(rows_shape(module)[1:])
    return 4 * getattr(module, "groups", 1) * columns**2


def _patches(module: Any, x: Tensor) -> Iterator[Tensor]:
    """float32 `[groups, positions, columns]`, a few samples at a time: what meets each column of the weight."""
    if isinstance(module, nn.Linear):
        rows = x.reshape(-1, x.shape[-1]).float()
        yield from (part[None] for part in rows.split(max(PATCH_BYTES // (4 * rows.shape[1]), 1)))
        return
    ndim = len(module.kernel_size)
    x = x.float() if x.ndim == ndim + 2 else x[None].float()
    one = 4 * x[0].numel() * math.prod(module.kernel_size)
    for part in x.split(max(PATCH_BYTES // one, 1)):
        columns = torch.stack(
            [window.flatten(2) for window in _windows(module, part)], dim=2
        )  # [n, channels, offsets, positions]
        n, channels, offsets, positions = columns.shape
        grouped = columns.reshape(n, module.groups, channels // module.groups * offsets, positions)
        yield grouped.permute(1, 0, 3, 2).reshape(module.groups, n * positions, -1)


def _column_means(module: nn.Module, x: Tensor) -> Tensor:
    """float32 `[groups, columns]`: the mean over batch and output positions of what meets each column of the weight."""
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1]).mean(0, keepdim=True)
    assert isinstance(module, CONVS + TRANSPOSED), module
    x = x.mean(0, keepdim=True)  # [1, channels, *space]
    if isinstance(module, TRANSPOSED):
        return _transposed_means(module, x[0])
    return torch.stack([window.flatten(2).mean((0, 2)) for window in _windows(module, x)], dim=1).reshape(module.groups, -1)


def _windows(module: Any, x: Tensor) -> Iterator[Tensor]:
    """For each kernel offset of a convolution what meets it at every output position: `[n, channels, *out]`."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    kernel = module.kernel_size
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    spans = [range(0, d * k, d) for k, d in zip(kernel, module.dilation, strict=True)]
    lengths = [n - (k - 1) * d for n, k, d in zip(x.shape[2:], kernel, module.dilation, strict=True)]
    for offsets in itertools.product(*spans):
        window = tuple(slice(o, o + n, s) for o, n, s in zip(offsets, lengths, module.stride, strict=True))
        yield x[(slice(None), slice(None), *window)]


def _transposed_means(module: Any, x: Tensor) -> Tensor:
    """Input position n reaches output position n * stride + offset * dilation - padding, where that is not cropped."""
    places = list(
        zip(x.shape[1:], module.stride, module.padding, module.dilation, module.kernel_size, module.output_padding, strict=True)
    )
    out = [(n - 1) * s - 2 * p + d * (k - 1) + o + 1 for n, s, p, d, k, o in places]
    columns = []
    for offsets in itertools.product(*map(range, module.kernel_size)):
        part = x
        for axis, ((n, s, p, d, _, _), offset, size) in enumerate(zip(places, offsets, out, strict=True), start=1):
            lands = torch.arange(n, device=x.device) * s + offset * d - p
            part = part.index_select(axis, ((lands >= 0) & (lands < size)).nonzero()[:, 0])
        columns.append(part.flatten(1).sum(1) / math.prod(out))
    return torch.stack(columns, dim=1).reshape(module.groups, -1)
