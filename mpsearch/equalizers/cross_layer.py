"""Cross-layer equalization (Nagel et al. 2019, "Data-Free Quantization through Weight Equalization and Bias Correction", section
4.1, https://arxiv.org/abs/1906.04721): each channel gets the same range on both its sides, without any data.

With r1 the range of the weights that make a channel and r2 that of those that read it, s = sqrt(r1 / r2) gives both sqrt(r1 r2)
(eq. 11). A layer in the middle of a chain, such as a depthwise one, is on both sides: the pairs are swept until nothing moves.

It helps where many channels share a scale: weights with a scale per tensor or per group of columns, inputs with one for all
channels. Per-row scales make it redundant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpsearch.equalizers.base import LIMIT, Equalizer, Network, by_channel, input_ranges, rows_of
from mpsearch.graph.channel_scaling import by_groups, by_input
from mpsearch.graph.links import Link
from mpsearch.layer import kind_of


@dataclass(frozen=True)
class CrossLayer(Equalizer):
    """Sweeps the pairs until no scale changes by more than `tolerance` of itself, at most `max_sweeps` times.

    Producers are layers only: a norm's weights stay float.
    """

    tolerance: float = 1e-3
    max_sweeps: int = 100

    def usable(self, network: Network) -> Sequence[Link]:
        """The links whose producer is a layer."""
        return [link for link in network.links if kind_of(network.model.get_submodule(link.producer)) is not None]

    def scales(self, network: Network) -> Sequence[Tensor]:
        """sqrt(r1 / r2); 1 where either is 0, as nothing writes to or reads from that channel."""
        rows = rows_of(network)
        modules = {name: network.model.get_submodule(name) for name in rows}
        total = [torch.ones(link.channels) for link in network.links]
        for _ in range(self.max_sweeps):
            moved = 0.0
            for i, link in enumerate(network.links):
                made = rows[link.producer].abs().flatten(1).amax(1)
                read = by_channel(link, {name: input_ranges(modules[name], rows[name]) for name in link.consumers})
                new = torch.where((made > 0) & (read > 0), (made / read).sqrt(), 1.0)
                new = (total[i] * new).clamp(1 / LIMIT, LIMIT) / total[i]
                total[i] = total[i] * new
                rows[link.producer] /= new.view(-1, *[1] * (rows[link.producer].ndim - 1))
                for name, index in link.consumers.items():
                    by_input(modules[name], rows[name]).mul_(by_groups(modules[name], new[index]))
                moved = max(moved, float(new.log().abs().max()))
            if moved <= self.tolerance:
                break
        return total
