"""Outliers: a few weights in float16 in addition to a dense tensor of few bits, which is quantized as if they were 0.

SpQR (Dettmers et al. 2023, https://arxiv.org/abs/2306.03078) keeps those weights that cost most when they are rounded. Here they
are a fixed share of each layer. Candidates are the largest weights, whose ranges the others share, and those with the largest
errors, weighted by importance, of the whole tensor and again of the best so far. For each the rest is quantized anew, and the one
with the least weighted error is taken. A quantizer that compensates for errors in other weights leaves the outliers out: they
have no error, and their codes are overwritten.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.schemes.base import FindCodes, Layout, QuantizedTensor
from mpsearch.schemes.dense import DenseScheme, WrappedScheme
from mpsearch.schemes.histogram import Histogram

SPAN = 2**16  # weights that a 16-bit position tells apart


@dataclass(frozen=True)
class Outliers(WrappedScheme):
    """A `share` of the weights in float16 with their positions, all others as in `dense`.

    An outlier takes 4 bytes: its value, and its position among the 65,536 weights of its span; each span takes 4 more, the number
    of its outliers. Its code stays in the dense tensor, so that this keeps its layout.

    Parameters
    ----------
    dense
        An `Integer` or a `Codebook`.
    share
        Outliers as a share of the weights, above 0 and below 1.

    Examples
    --------
    Weight `[64, 3, 3, 3]` with `share=0.01`: 17 outliers of 1,728 weights, 72 bytes more than `dense` alone.
    """

    dense: DenseScheme
    share: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.share, bool) or not isinstance(self.share, int | float) or not 0 < self.share < 1:
            raise InputError(
                f"share, the part of the weights that are outliers, must be above 0 and below 1; got {self.share!r}."
            )

    def count(self, shape: tuple[int, ...]) -> int:
        """Number of outliers of a weight of `shape`: `share` of its weights, rounded."""
        return round(self.share * math.prod(shape))

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """That of `dense`, 4 bytes per outlier and 4 per span."""
        count = self.count(shape)
        return {
            **self.dense.layout(shape),
            "outliers": (torch.float16, (count,)),
            "outlier_positions": (torch.uint16, (count,)),
            "outlier_counts": (torch.int32, (-(-math.prod(shape) // SPAN),)),
        }

    def check(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> None:
        """Also `InputError` where a position lies outside the weight."""
        super().check(tensors, shape)
        counts = tensors["outlier_counts"]
        if bool((counts < 0).any()) or int(counts.long().sum()) != self.count(shape):
            raise InputError(f"'outlier_counts' must be 0 or more, {self.count(shape)} together; got {counts.tolist()[:8]}")
        positions = self._positions(tensors)
        if len(positions) and int(positions.max()) >= math.prod(shape):
            raise InputError(f"'outlier_positions' must be below {math.prod(shape):,}; got {int(positions.max()):,}")

    def quantize(
        self, weight: Tensor, find_codes: FindCodes, importance: Tensor | None, histogram: Histogram | None = None
    ) -> QuantizedTensor:
        """The outliers, and `dense` of the rest by the quantizer; an outlier beyond float16 is an `InputError`."""
        mask = torch.zeros_like(weight, dtype=torch.bool)
        quantized = self.dense.quantize(weight, find_codes, importance, histogram)
        if self.count(tuple(weight.shape)):
            mask, quantized = self._best(weight, quantized, find_codes, importance, histogram)
        positions = mask.flatten().nonzero()[:, 0]
        values = weight.flatten()[positions].half()
        if not torch.isfinite(values).all():
            raise InputError(f"An outlier of {float(weight.abs().max()):g} does not fit in float16. Scale the weights down.")
        sparse = {
            "outliers": values,
            "outlier_positions": (positions % SPAN).to(torch.uint16),
            "outlier_counts": torch.bincount(positions // SPAN, minlength=math.ceil(weight.numel() / SPAN)).int(),
        }
        return QuantizedTensor(self, tuple(weight.shape), {**quantized.tensors, **sparse})

    def _best(
        self,
        weight: Tensor,
        whole: QuantizedTensor,
        find_codes: FindCodes,
        importance: Tensor | None,
        histogram: Histogram | None,
    ) -> tuple[Tensor, QuantizedTensor]:
        """The mask of the outliers (bool, shaped like `weight`) and the dense tensor of the rest; `whole` has no outliers."""
        matrix = weight.reshape(len(weight), -1)
        weights = torch.ones_like(matrix)
        if importance is not None:
            weights = importance.repeat_interleave(len(matrix) // len(importance), dim=0)

        def errors_of(quantized: QuantizedTensor) -> Tensor:
            return (quantized.dequantize().reshape(matrix.shape) - matrix).square() * weights

        def candidate(scores: Tensor) -> tuple[float, Tensor, Tensor, QuantizedTensor]:
            """With the largest `scores` as outliers: total error, each weight's error if it were none, mask and dense tensor."""
            mask = torch.zeros_like(matrix, dtype=torch.bool)
            mask.view(-1)[scores.flatten().topk(self.count(tuple(weight.shape))).indices] = True
            rest, rest_weights = torch.where(mask, 0.0, matrix).reshape(weight.shape), torch.where(mask, 0.0, weights)
            quantized = self.dense.quantize(rest, partial(find_codes, fixed=mask), rest_weights, histogram)
            errors = errors_of(quantized)
            return errors[~mask].double().sum().item(), errors, mask, quantized

        candidates = [candidate(scores) for scores in (errors_of(whole), matrix.abs(), matrix.square() * weights)]
        candidates.append(candidate(min(candidates, key=lambda tried: tried[0])[1]))
        _, _, mask, quantized = min(candidates, key=lambda tried: tried[0])
        return mask.reshape(weight.shape), quantized

    def dequantize(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """The dense weight with the outliers at their positions."""
        flat = self.dense.dequantize(tensors, shape).flatten()
        return flat.index_copy(0, self._positions(tensors), tensors["outliers"].float()).reshape(shape)

    @staticmethod
    def _positions(tensors: Mapping[str, Tensor]) -> Tensor:
        """int64 `[n_outliers]`: the index of each outlier in the flattened weight."""
        counts, positions = tensors["outlier_counts"], tensors["outlier_positions"]
        spans = torch.arange(len(counts), device=counts.device).repeat_interleave(counts, output_size=len(positions))
        return SPAN * spans + positions.long()

    def describe(self) -> str:
        """For example "3-bit integer, symmetric, per-channel float16 scale; 1% of the weights in float16"."""
        return f"{self.dense.describe()}; {100 * self.share:g}% of the weights in float16"
