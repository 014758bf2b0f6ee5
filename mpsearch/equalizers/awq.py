"""AWQ (Lin et al. 2024, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", section 3.2,
https://arxiv.org/abs/2306.00978): weights of channels with large inputs are scaled up, which lowers the error of rounding them.

With s = mean|x|^alpha for each channel, normalized so that sqrt(max s min s) = 1 as in the authors' code, alpha is the one of a
grid from 0 (nothing changes) towards 1 with the smallest output error when weights are rounded to nearest: the trace of E H E^T
with E = Q(W s) / s - W and H = E[x x^T] of the calibration data (eq. 4 and 5, all outputs at once). The error of the producer
counts too, with E = s Q(W / s) - W: it is 0 where each of its rows has its own scale, and large where all rows share one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mpsearch.engine.calibrate import hessian_bytes, hessians
from mpsearch.equalizers.base import Equalizer, Network, by_channel, rows_of
from mpsearch.errors import check_integer
from mpsearch.graph.channel_scaling import by_groups, by_input
from mpsearch.graph.links import Link
from mpsearch.layer import kind_of
from mpsearch.quantizers.round_to_nearest import RoundToNearest
from mpsearch.schemes.base import QuantScheme

HESSIAN_MAX_BYTES = 10**9  # in memory at a time
MOST_LEFT = 0.99  # share of the error that may be left: a smaller gain is rounding of the scales, and channels stay as they are


@dataclass(frozen=True)
class AWQ(Equalizer):
    """Tries `n_grid` values of alpha, judged by the share of the error that is left, averaged over the run's schemes."""

    n_grid: int = 20

    def __post_init__(self) -> None:
        check_integer("equalizer.n_grid", self.n_grid, 2)

    def usable(self, network: Network) -> Sequence[Link]:
        """The links whose consumers all have a Hessian: no transposed convolutions."""
        submodule = network.model.get_submodule
        return [link for link in network.links if not any("transpose" in str(kind_of(submodule(n))) for n in link.consumers)]

    def scales(self, network: Network) -> Sequence[Tensor]:
        """The best of the grid for each link, the smallest alpha of equals; 1 for channels that are always 0."""
        rows = rows_of(network)
        means = {name: mean for name, (_, mean) in network.magnitudes().items()}
        scales = []
        for link, inputs in _with_hessians(network):
            mean = by_channel(link, means, "mean")
            best = torch.ones(link.channels)
            before = _errors(network, link, inputs, rows, best)
            least = MOST_LEFT * len(before)
            for step in range(1, self.n_grid):
                scale = torch.where(mean > 0, mean, 1.0) ** (step / self.n_grid)
                scale = scale / (scale.max() * scale.min()).sqrt()
                after = _errors(network, link, inputs, rows, scale)
                left = sum(a / b if b else 1.0 for a, b in zip(after, before, strict=True))
                if left < least:
                    least, best = left, scale
            scales.append(best)
        return scales


def _errors(network: Network, link: Link, inputs: Mapping[str, Tensor], rows: Mapping[str, Tensor], scale: Tensor) -> list[float]:
    """In each scheme the mean squared error of all consumers' outputs, then in each that of the producer, if it is a layer.

    `inputs` has the Hessians of the layers' inputs, `rows` their weights.
    """
    schemes, submodule = network.schemes.values(), network.model.get_submodule
    reads = [(submodule(name), rows[name], inputs[name], scale[index]) for name, index in link.consumers.items()]
    errors = [sum(_error(*read, 1.0, scheme) for read in reads) for scheme in schemes]
    if link.producer in inputs:
        weight = rows[link.producer]
        outputs = (1 / scale).view(-1, *[1] * (weight.ndim - 1))
        errors += [_error(submodule(link.producer), weight, inputs[link.producer], None, outputs, s) for s in schemes]
    return errors


def _error(
    module: nn.Module, rows: Tensor, hessian: Tensor, inputs: Tensor | None, outputs: Tensor | float, scheme: QuantScheme
) -> float:
    """The trace of E H E^T over the groups of a convolution; `hessian` `[groups, columns, columns]`, `inputs` `[in]`."""
    factors = 1.0 if inputs is None else by_groups(module, inputs)
    scaled = (by_input(module, rows * outputs) * factors).reshape(rows.shape)
    rounded = RoundToNearest().quantize(scaled, scheme).dequantize() / outputs
    error = (by_input(module, rounded) / factors - by_input(module, rows)).flatten(2)  # [groups, out / groups, columns]
    return float(((error @ hessian) * error).sum())


def _with_hessians(network: Network) -> Iterator[tuple[Link, dict[str, Tensor]]]:
    """Each link with E[x x^T] of its layers' inputs, computed for as many links at a time as `HESSIAN_MAX_BYTES` hold."""
    submodule, pending = network.model.get_submodule, list(network.links)
    while pending:
        names: list[str] = []
        size, n = 0, 0
        for link in pending:
            layers = [name for name in (link.producer, *link.consumers) if kind_of(submodule(name)) is not None]
            size += sum(hessian_bytes(submodule(name)) for name in layers)
            if n and size > HESSIAN_MAX_BYTES:
                break
            names, n = [*names, *layers], n + 1
        inputs = hessians(network.model, network.task, names, network.batches)
        yield from ((link, inputs) for link in pending[:n])
        pending = pending[n:]
