"""AWQ (Lin et al. 2024, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", section 3.2,
https://arxiv.org/abs/2306.00978): weights that meet large inputs are scaled up, so that rounding them hurts less.

With s = mean|x|^alpha for each channel, brought to a geometric middle of 1 as in the authors' code, alpha is the one of a grid
from 0 (nothing changes) towards 1 under which outputs err least when weights are rounded to nearest: the trace of E H E^T with
E = Q(W s) / s - W and H = E[x x^T] of the calibration data (eq. 4 and 5, all outputs at once). The layer that makes the channels
has a say too, with E = s Q(W / s) - W: none where each of its rows has a scale of its own, but a large one where all share one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mpsearch.engine.calibrate import hessian_bytes, hessians
from mpsearch.equalizers.base import Equalizer, Network, by_channel, rows_of
from mpsearch.errors import InputError
from mpsearch.graph.channel_scaling import by_groups, by_input
from mpsearch.graph.links import Link
from mpsearch.layer import kind_of
from mpsearch.quantizers.round_to_nearest import RoundToNearest
from mpsearch.schemes.base import QuantScheme

HESSIAN_MAX_BYTES = 10**9  # held at a time
WORTH = 0.99  # of the error must be left at most: less is rounding of the scales, and channels stay as they are


@dataclass(frozen=True)
class AWQ(Equalizer):
    """`n_grid` values of alpha; the run's schemes all have a say, each by the share of its error that is left."""

    n_grid: int = 20

    def __post_init__(self) -> None:
        if type(self.n_grid) is not int or self.n_grid < 2:
            raise InputError(f"equalizer.n_grid is a whole number above 1; {self.n_grid!r} came.")

    def usable(self, network: Network) -> Sequence[Link]:
        """Those whose consumers all have a Hessian: no transposed convolutions."""
        of = network.model.get_submodule
        return [link for link in network.links if not any("transpose" in str(kind_of(of(name))) for name in link.consumers)]

    def scales(self, network: Network) -> Sequence[Tensor]:
        """The best of the grid for each link, the smallest alpha of equals; 1 where a channel is always 0, or nothing is won."""
        rows, schemes = rows_of(network), list(network.schemes.values())
        means = {name: mean for name, (_, mean) in network.magnitudes().items()}
        found = []
        for link, of_inputs in _with_hessians(network):
            mean = by_channel(link, means, "mean")
            scale = torch.ones(link.channels)
            whole = _errors(network.model, link, of_inputs, rows, schemes, scale)
            best = WORTH * len(whole)
            for step in range(1, self.n_grid):
                tried = torch.where(mean > 0, mean, 1.0) ** (step / self.n_grid)
                tried = tried / (tried.max() * tried.min()).sqrt()
                left = _errors(network.model, link, of_inputs, rows, schemes, tried)
                share = sum(e / w if w else 1.0 for e, w in zip(left, whole, strict=True))
                if share < best:
                    best, scale = share, tried
            found.append(scale)
        return found


def _errors(
    model: nn.Module,
    link: Link,
    of_inputs: Mapping[str, Tensor],
    rows: Mapping[str, Tensor],
    schemes: Sequence[QuantScheme],
    scale: Tensor,
) -> list[float]:
    """In each scheme the mean squared error of all consumers' outputs, then in each that of the producer, if it is a layer."""
    reads = [(model.get_submodule(n), rows[n], scale[index], of_inputs[n]) for n, index in link.consumers.items()]
    errors = [sum(_error(m, weight, scheme, of, 1.0, hessian) for m, weight, of, hessian in reads) for scheme in schemes]
    if link.producer in of_inputs:
        module, weight = model.get_submodule(link.producer), rows[link.producer]
        outputs = (1 / scale).view(-1, *[1] * (weight.ndim - 1))
        errors += [_error(module, weight, scheme, None, outputs, of_inputs[link.producer]) for scheme in schemes]
    return errors


def _error(
    module: nn.Module, rows: Tensor, scheme: QuantScheme, inputs: Tensor | None, outputs: Tensor | float, hessian: Tensor
) -> float:
    """The trace of E H E^T over the groups of a convolution; `hessian` [groups, columns, columns]."""
    factors = 1.0 if inputs is None else by_groups(module, inputs)
    scaled = (by_input(module, rows * outputs) * factors).reshape(rows.shape)
    rounded = RoundToNearest().quantize(scaled, scheme).dequantize() / outputs
    error = (by_input(module, rounded) / factors - by_input(module, rows)).flatten(2)  # [groups, out / groups, columns]
    return float(((error @ hessian) * error).sum())


def _with_hessians(network: Network) -> Iterator[tuple[Link, dict[str, Tensor]]]:
    """Each link with E[x x^T] of its layers' inputs, of as many links at a time as `HESSIAN_MAX_BYTES` holds."""
    waiting = list(network.links)
    while waiting:
        names: list[str] = []
        size, n = 0, 0
        for link in waiting:
            makes = [link.producer] if kind_of(network.model.get_submodule(link.producer)) is not None else []
            size += sum(hessian_bytes(network.model.get_submodule(name)) for name in (*makes, *link.consumers))
            if n and size > HESSIAN_MAX_BYTES:
                break
            names, n = [*names, *makes, *link.consumers], n + 1
        found = hessians(network.model, network.task, names, network.batches)
        yield from ((link, found) for link in waiting[:n])
        waiting = waiting[n:]
