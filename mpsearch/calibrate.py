"""Run the calibration data once and keep what quantizers and bias correction need of every layer's input: its moments.

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

from mpsearch.layer import LayerSpec
from mpsearch.progress import phase
from mpsearch.quantizers.base import InputMoments
from mpsearch.tasks.base import Task

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@torch.no_grad()
def calibrate(
    model: nn.Module, task: Task, layers: Sequence[LayerSpec], batches: Sequence[tuple[Any, Tensor]]
) -> dict[str, InputMoments]:
    """Layer name -> moments of its input; embeddings, whose input is indices, are left out."""
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    weights: dict[str, int] = {}
    hooks = []

    def hook_for(layer: LayerSpec) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach()
            n = x.shape[0]
            mean, second = (_column_means(module, power).double() * n for power in (x, x.square()))
            if layer.name in sums:
                mean, second = mean + sums[layer.name][0], second + sums[layer.name][1]
            sums[layer.name] = (mean, second)
            weights[layer.name] = weights.get(layer.name, 0) + n

        return hook

    for layer in layers:
        for name in layer.modules:
            module = model.get_submodule(name)
            if not isinstance(module, nn.Embedding):
                hooks.append(module.register_forward_pre_hook(hook_for(layer)))
    try:
        with phase("calibrate", len(batches)) as advance:
            for inputs, _ in batches:
                task.forward(model, inputs)
                advance("")
    finally:
        for handle in hooks:
            handle.remove()
    return {name: InputMoments(*((total / weights[name]).float() for total in both)) for name, both in sums.items()}


def _column_means(module: nn.Module, x: Tensor) -> Tensor:
    """float32 `[groups, columns]`: the mean over batch and output positions of what meets each column of the weight."""
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1]).mean(0, keepdim=True)
    assert isinstance(module, CONVS + TRANSPOSED), module
    groups, kernel = module.groups, module.kernel_size
    x = x.mean(0)  # [channels, *space]
    if isinstance(module, TRANSPOSED):
        # Each input reaches each kernel offset once, so an output position sees on average (inputs / outputs) of the mean;
        # what padding crops at the border is not taken off.
        out = [
            (n - 1) * s - 2 * p + d * (k - 1) + o + 1
            for n, s, p, d, k, o in zip(
                x.shape[1:], module.stride, module.padding, module.dilation, kernel, module.output_padding, strict=True
            )
        ]
        share = x.flatten(1).sum(1) / math.prod(out)
        return share.reshape(groups, -1, 1).expand(-1, -1, math.prod(kernel)).reshape(groups, -1)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x[None], module._reversed_padding_repeated_twice, mode=mode)[0]
    spans = [range(0, d * k, d) for k, d in zip(kernel, module.dilation, strict=True)]
    lengths = [n - (k - 1) * d for n, k, d in zip(x.shape[1:], kernel, module.dilation, strict=True)]
    columns = []
    for offsets in itertools.product(*spans):
        window = tuple(slice(o, o + n, s) for o, n, s in zip(offsets, lengths, module.stride, strict=True))
        columns.append(x[(slice(None), *window)].flatten(1).mean(1))
    return torch.stack(columns, dim=1).reshape(groups, -1)
