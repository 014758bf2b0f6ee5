"""Clip search: each group takes the clipped range with the least squared error.

The error is weighted by the second moment of the input where calibration gives it. For a layer y = W x with independent inputs,
E|dy|^2 = sum_j dW_j^2 E[x_j^2]: the error of the layer's output is minimized (the diagonal of the objective of GPTQ, Frantar et
al. 2023, eq. 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.quantizers.base import CodedScheme, Codes, Quantizer, clip_ratios, kernel_codes
from mpsearch.quantizers.block_steps import searched_blocks
from mpsearch.schemes.codebook import Codebook
from mpsearch.schemes.k_quant import KQuant

MOST_RATIO = 2.0


@dataclass(frozen=True)
class ClipSearch(Quantizer):
    """Search over clip ratios; robust and fast, with or without data.

    A symmetric code has one level more on one side (-2 -1 0 1 for two bits); the search also tries the scale's other sign, so
    that this level is on the side that needs it.

    The levels of a codebook are not evenly spaced, so that a group may have a smaller error with its largest weight on an inner
    level (Cook et al. 2025, "Four Over Six", https://arxiv.org/abs/2512.02010): there the ratios are 1, and then from 2 down, or
    the powers of two among them where the scale is one.

    The blocks of llama.cpp have a search of their own, which fits scales and minima to the codes of each range.

    Parameters
    ----------
    n_candidates, min_ratio
        How many ratios of a group's range are tried, from 1 down to `min_ratio`.
    """

    n_candidates: int = 80
    min_ratio: float = 0.1

    def __post_init__(self) -> None:
        if self.n_candidates < 2 or not 0 < self.min_ratio < 1:
            raise InputError(
                f"Clip search needs n_candidates >= 2 and 0 < min_ratio < 1; got {self.n_candidates} and {self.min_ratio}."
            )

    def codes(self, matrix: Tensor, scheme: CodedScheme, group_size: int, importance: Tensor | None) -> Codes:
        """The codes of the best ratio of each group."""
        if isinstance(scheme, Codebook):
            return kernel_codes(matrix, scheme, group_size, self._codebook_ratios(scheme), importance)
        ratios = clip_ratios(self.n_candidates, self.min_ratio, both_signs=scheme.symmetric and scheme.bits > 1)
        return kernel_codes(matrix, scheme, group_size, ratios, importance)

    def _block_codes(self, matrix: Tensor, scheme: KQuant, importance: Tensor | None) -> Codes:
        return searched_blocks(matrix, scheme, importance)

    def _codebook_ratios(self, scheme: Codebook) -> Tensor:
        if scheme.scale == "e8m0":
            powers = MOST_RATIO * torch.exp2(-torch.arange(float(self.n_candidates)))
            return torch.cat([torch.ones(1), powers[powers >= self.min_ratio]])
        return torch.cat([torch.ones(1), torch.linspace(MOST_RATIO, self.min_ratio, self.n_candidates - 1)])
