"""Entropy clipping: the range with the least KL divergence of the quantized distribution (Migacz 2017, TensorRT).

A histogram P of the weights, with the weights beyond the range in its outermost bins, is compared with Q: the mass of each code,
without the weights beyond the range, spread evenly over the bins of P that round to it. The method was made for
activations; as it compares distributions and not errors, the clip search is to be preferred for weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.quantizers.base import CodedScheme, Codes, Quantizer, kernel_codes
from mpsearch.quantizers.round_to_nearest import RoundToNearest

PER_BIN = 8


@dataclass(frozen=True)
class Entropy(Quantizer):
    """One clip ratio for all groups of a layer.

    A group has too few weights for a histogram of its own: those of all groups are pooled, each over the largest of its group.
    Ranges of fewer bins than levels are not tried.

    Parameters
    ----------
    n_candidates, min_ratio
        How many clip ratios are tried, from 1 down to `min_ratio`.
    n_bins
        Bins of the histogram, or fewer, so that a bin has `PER_BIN` weights on average.
    """

    n_candidates: int = 80
    min_ratio: float = 0.1
    n_bins: int = 2048

    def __post_init__(self) -> None:
        if self.n_candidates < 2 or not 0 < self.min_ratio < 1 or self.n_bins < 2:
            raise InputError(
                "Entropy clipping needs n_candidates >= 2, 0 < min_ratio < 1 and n_bins >= 2; got "
                f"{self.n_candidates}, {self.min_ratio} and {self.n_bins}."
            )

    def codes(self, matrix: Tensor, scheme: CodedScheme, group_size: int, importance: Tensor | None) -> Codes:
        """The codes under the best ratio; `importance` is not used."""
        if not torch.isfinite(matrix).all() or not matrix.any():
            return kernel_codes(matrix, scheme, group_size)  # which counts what is not finite and raises
        parts = [part / part.abs().amax(1, keepdim=True) for part in matrix.split(group_size, dim=1)]
        shares = torch.cat([part.flatten() for part in parts])
        n_bins = max(min(self.n_bins, matrix.numel() // PER_BIN), 2)
        counts = torch.histc(shares[torch.isfinite(shares)].cpu(), n_bins, -1.0, 1.0).double()
        ratios = torch.linspace(1.0, self.min_ratio, self.n_candidates)
        least = ratios[self._divergences(counts, scheme, ratios).argmin()]
        return kernel_codes(matrix, scheme, group_size, least.reshape(1).to(matrix.device))

    def _divergences(self, counts: Tensor, scheme: CodedScheme, ratios: Tensor) -> Tensor:
        """KL(P, Q) in nats for each ratio, of the histogram `counts` between -1 and 1 in the scheme's levels over that range."""
        n, edge = len(counts), ratios[:, None]
        centres = ((torch.arange(n) + 0.5) * (2 / n) - 1).float()
        clipped = torch.cat([-edge, centres.clamp(-edge, edge), edge], dim=1)
        per_row = replace(scheme, group_size="channel")
        quantized = RoundToNearest().quantize(clipped, per_row).dequantize()
        inside = (centres - 1 / n < edge) & (centres + 1 / n > -edge)
        index = torch.arange(n).expand(inside.shape)
        first = torch.where(inside, index, n).amin(1, keepdim=True)
        p = torch.zeros(inside.shape, dtype=torch.float64)
        p.scatter_add_(1, index.clamp(first, n - 1 - first), counts.expand(inside.shape))
        # Along a row values ascend: a new code begins wherever they change.
        code = (quantized[:, 1:-1].diff(dim=1, prepend=quantized[:, 1:2]) != 0).cumsum(1)
        mass, bins = torch.zeros_like(p), torch.zeros_like(p)
        mass.scatter_add_(1, code, torch.where(inside, counts, 0.0))
        bins.scatter_add_(1, code, (p > 0).double())
        q = torch.where(p > 0, (mass / bins.clamp(min=1.0)).gather(1, code), 0.0)
        p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
        divergences = torch.where(p > 0, p * (p / q).log(), 0.0).sum(1)
        has_bins = inside.sum(1) >= code.amax(1) + 1
        return torch.where(has_bins | (ratios == 1), divergences.nan_to_num(nan=torch.inf), torch.inf)
