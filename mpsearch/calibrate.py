"""Run the calibration data once and keep what quantizers and bias correction need of every layer's input: its moments
and its largest magnitude.

The mean and the second moment of each input value that meets a column of the weight matrix. For a convolution that is each
(channel, kernel offset), padding counted as the zeros it is; both are linear in the (squared) input, so that the batch can be
averaged first and no patch matrix is ever made.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpsearch.layer import LayerSpec, rows_shape, runs_as_usual
from mpsearch.progress import phase
from mpsearch.quantizers.base import InputMoments
from mpsearch.tasks.base import Task
from mpsearch.trace import tensors_in

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@torch.no_grad()
def calibrate(
    model: nn.Module, task: Task, layers: Sequence[LayerSpec], batches: Sequence[tuple[Any, Tensor]]
) -> dict[str, InputMoments]:
    """Module name -> moments of its input, float32 on the CPU.

    Left out are embeddings, whose input is indices, and modules that run a `forward` of their own (a convolution that
    standardizes its weight, say): their output is not what weight and input alone say.
    """
    sums: dict[str, InputMoments] = {}
    hooks = []

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            x = next(tensors_in((args, kwargs))).detach()
            count = output.numel() // rows_shape(module)[0]
            mean, second = (_column_means(module, y).double().cpu() for y in (x, x.square()))
            found = InputMoments(mean, second, count, x.abs().max().item())
            sums[name] = InputMoments.pooled([sums[name], found]) if name in sums else found

        return hook

    for name in (name for layer in layers for name in layer.modules):
        module = model.get_submodule(name)
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
    return {n: InputMoments(m.mean.float(), m.second_moment.float(), m.count, m.largest) for n, m in sums.items()}


def _column_means(module: nn.Module, x: Tensor) -> Tensor:
    """float32 `[groups, columns]`: the mean over batch and output positions of what meets each column of the weight."""
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1]).mean(0, keepdim=True)
    assert isinstance(module, CONVS + TRANSPOSED), module
    groups, kernel = module.groups, module.kernel_size
    x = x.mean(0)  # [channels, *space]
    if isinstance(module, TRANSPOSED):
        return _transposed_means(module, x)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x[None], module._reversed_padding_repeated_twice, mode=mode)[0]
    spans = [range(0, d * k, d) for k, d in zip(kernel, module.dilation, strict=True)]
    lengths = [n - (k - 1) * d for n, k, d in zip(x.shape[1:], kernel, module.dilation, strict=True)]
    columns = []
    for offsets in itertools.product(*spans):
        window = tuple(slice(o, o + n, s) for o, n, s in zip(offsets, lengths, module.stride, strict=True))
        columns.append(x[(slice(None), *window)].flatten(1).mean(1))
    return torch.stack(columns, dim=1).reshape(groups, -1)


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
