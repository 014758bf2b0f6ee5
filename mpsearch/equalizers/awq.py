"""AWQ (Lin et al. 2024, "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", section 3.2,
https://arxiv.org/abs/2306.00978): weights that meet large inputs are scaled up, so that rounding them hurts less.

With s = mean|x|^alpha for each channel, brought to a geometric middle of 1 as in the authors' code, alpha is the one of a grid
from 0 (nothing changes) towards 1 under which the consumers' outputs err least when their weights are rounded to nearest: the
trace of E H E^T with E = Q(W s) / s - W and H = E[x x^T] of the calibration data (eq. 4 and 5, all outputs at once).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mpsearch.calibrate import hessian_bytes, hessians
from mpsearch.equalization import by_groups, by_input
from mpsearch.equalizers.base import Equalizer, Network, by_channel, rows_of
from mpsearch.errors import InputError
from mpsearch.layer import kind_of
from mpsearch.links import Link
from mpsearch.quantizers.round_to_nearest import RoundToNearest
from mpsearch.schemes.base import QuantScheme

HESSIAN_MAX_BYTES = 10**9  # held at a time


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
        """The best of the grid for each link, the smallest alpha of equals; 1 where a channel is always 0."""
        rows, schemes = rows_of(network), list(network.schemes.values())
        means = {name: mean for name, (_, mean) in network.magnitudes().items()}
        found = []
        for link, of_inputs in _with_hessians(network):
            mean = by_channel(link, means, "mean")
            best, scale = float(len(schemes)), torch.ones(link.channels)
            whole = self._errors(network, link, of_inputs, rows, schemes, scale)
            for step in range(1, self.n_grid):
                tried = torch.where(mean > 0, mean, 1.0) ** (step / self.n_grid)
                tried = tried / (tried.max() * tried.min()).sqrt()
                left = self._errors(network, link, of_inputs, rows, schemes, tried)
                share = sum(e / w if w else 1.0 for e, w in zip(left, whole, strict=True))
                if share < best:
                    best, scale = share, tried
            found.append(scale)
        return found

    def _errors(
        self,
        network: Network,
        link: Link,
        of_inputs: dict[str, Tensor],
        rows: dict[str, Tensor],
        schemes: Sequence[QuantScheme],
        scale: Tensor,
    ) -> list[float]:
        """Of each scheme the mean squared error of all consumers' outputs, their weights scaled and rounded to nearest."""
        return [
            sum(
                _error(network.model.get_submodule(name), rows[name], scheme, scale[index], of_inputs[name])
                for name, index in link.consumers.items()
            )
            for scheme in schemes
        ]


def _error(module: nn.Module, rows: Tensor, scheme: QuantScheme, scale: Tensor, hessian: Tensor) -> float:
    """The trace of E H E^T over the groups of a convolution; `hessian` [groups, columns, columns]."""
    factors = by_groups(module, scale)
    scaled = (by_input(module, rows) * factors).reshape(rows.shape)
    rounded = RoundToNearest().quantize(scaled, scheme).dequantize()
    error = (by_input(module, rounded) / factors - by_input(module, rows)).flatten(2)  # [groups, out / groups, columns]
    return float(((error @ hessian) * error).sum())


def _with_hessians(network: Network) -> Iterator[tuple[Link, dict[str, Tensor]]]:
    """Each link with E[x x^T] of its consumers' inputs, of as many links at a time as `HESSIAN_MAX_BYTES` holds."""
    waiting = list(network.links)
    while waiting:
        names: list[str] = []
        size, n = 0, 0
        for link in waiting:
            size += sum(hessian_bytes(network.model.get_submodule(name)) for name in link.consumers)
            if n and size > HESSIAN_MAX_BYTES:
                break
            names, n = [*names, *link.consumers], n + 1
        found = hessians(network.model, network.task, names, network.batches)
        yield from ((link, found) for link in waiting[:n])
        waiting = waiting[n:]
