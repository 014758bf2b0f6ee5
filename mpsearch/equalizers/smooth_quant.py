"""SmoothQuant (Xiao et al. 2023, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
section 4, https://arxiv.org/abs/2211.10438): the difficulty of quantizing a layer's input is moved, in part, to its weights.

Inputs are quantized with one scale per token, or one for everything, and a few channels are a hundred times larger than the rest;
weights are even. With s = max|x|^alpha / max|w|^(1 - alpha) for each channel (eq. 4) both have the same range at alpha = 0.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpsearch.equalizers.base import Equalizer, Network, by_channel, input_ranges, rows_of
from mpsearch.errors import InputError
from mpsearch.graph.links import Link


@dataclass(frozen=True)
class SmoothQuant(Equalizer):
    """`alpha` from 0 to 1 is the share that is moved to the weights. `InputError` in a run that quantizes no input."""

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if type(self.alpha) not in (int, float) or not 0 <= self.alpha <= 1:
            raise InputError(f"equalizer.alpha must be a number from 0 to 1; got {self.alpha!r}.")

    def usable(self, network: Network) -> Sequence[Link]:
        """All links, if any scheme quantizes inputs."""
        if all(scheme.input_format is None for scheme in network.schemes.values()):
            raise InputError(
                f"SmoothQuant is for quantized inputs, and no scheme of this run ({', '.join(network.schemes)}) quantizes any. "
                "Add one such as w8a8, or use equalizer=awq."
            )
        return network.links

    def scales(self, network: Network) -> Sequence[Tensor]:
        """Eq. 4; 1 where a channel is always 0, or nothing reads it."""
        rows = rows_of(network)
        largest = {name: largest for name, (largest, _) in network.magnitudes().items()}
        scales = []
        for link in network.links:
            ranges = {name: input_ranges(network.model.get_submodule(name), rows[name]) for name in link.consumers}
            x, w = by_channel(link, largest), by_channel(link, ranges)
            scales.append(torch.where((x > 0) & (w > 0), x**self.alpha / w ** (1 - self.alpha), 1.0))
        return scales
