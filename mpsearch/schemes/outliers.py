"""A few weights in float16 beside a dense tensor of few bits, which is then quantized as if they were 0.

SpQR (Dettmers et al. 2023, https://arxiv.org/abs/2306.03078) keeps those weights that cost most when they are rounded. Here they
are a fixed share of each layer. Which ones is tried out: the largest, whose ranges the others share, and those with the largest
errors, weighted by importance, of the whole tensor and again of the best so far. Each time what is left is quantized anew, and
the choice with the least weighted error stands. A quantizer that makes up for errors in other weights leaves the outliers out:
they have no error, and their codes are overwritten.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.schemes.base import FindCodes, Layout, QuantizedTensor, QuantScheme, scheme_from_fields
from mpsearch.schemes.codebook import Codebook
from mpsearch.schemes.histogram import Histogram
from mpsearch.schemes.input import InputFormat
from mpsearch.schemes.integer import Integer

SPAN = 2**16  # weights that a 16-bit position tells apart


@dataclass(frozen=True)
class Outliers(QuantScheme):
    """A `share` of the weights in float16 at their positions, all others as in `dense`, an `Integer` or a `Codebook`.

    An outlier takes 4 bytes: its value, and its position among the 65,536 weights of its span; each span takes 4 more, the number
    of its outliers. Its code stays in the dense tensor, so that this keeps its layout.

    Example: weight `[64, 3, 3, 3]` with `share=0.01`: 17 outliers of 1,728 weights, 72 bytes more than `dense` alone.
    """

    dense: QuantScheme
    share: float = 0.01

    def __post_init__(self) -> None:
        if isinstance(self.dense, Mapping):  # from what `fields` gave
            object.__setattr__(self, "dense", scheme_from_fields(self.dense))
        if not isinstance(self.dense, Integer | Codebook):
            raise InputError(f"Outliers stand beside an Integer or a Codebook; dense={self.dense!r} came.")
        if isinstance(self.share, bool) or not isinstance(self.share, int | float) or not 0 < self.share < 1:
            raise InputError(f"share is the part of the weights that are outliers, above 0 and below 1; {self.share!r} came.")

    @property
    def weight_bits(self) -> int:
        """Of the dense weights."""
        return self.dense.weight_bits

    @property
    def input_format(self) -> InputFormat | None:
        """That of `dense`."""
        return self.dense.input_format

    def count(self, shape: tuple[int, ...]) -> int:
        """How many weights of `shape` are outliers: `share` of them, rounded."""
        return round(self.share * math.prod(shape))

    def layout(self, shape: tuple[int, ...]) -> Layout:
        """That of `dense`, 4 bytes for each outlier and 4 for each span."""
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
        self, weight: Tensor, codes: FindCodes, importance: Tensor | None, seen: Histogram | None = None
    ) -> QuantizedTensor:
        """The outliers, and `dense` of the rest by the quantizer's `codes`; an outlier beyond float16 is an `InputError`."""
        count = self.count(tuple(weight.shape))
        quantized = self.dense.quantize(weight, codes, importance, seen)
        kept = torch.zeros_like(weight, dtype=torch.bool)
        if count:
            kept, quantized = self._found(weight, quantized, codes, importance, seen)
        positions = kept.flatten().nonzero()[:, 0]
        values = weight.flatten()[positions].half()
        if not torch.isfinite(values).all():
            raise InputError(f"An outlier of {float(weight.abs().max()):g} does not fit in float16. Scale the weights down.")
        sparse = {
            "outliers": values,
            "outlier_positions": (positions % SPAN).to(torch.uint16),
            "outlier_counts": torch.bincount(positions // SPAN, minlength=math.ceil(weight.numel() / SPAN)).int(),
        }
        return QuantizedTensor(self, tuple(weight.shape), {**quantized.tensors, **sparse})

    def _found(
        self, weight: Tensor, whole: QuantizedTensor, codes: FindCodes, importance: Tensor | None, seen: Histogram | None
    ) -> tuple[Tensor, QuantizedTensor]:
        """Which weights are outliers (bool, shaped like `weight`), and the dense tensor of the rest; `whole` has none."""
        matrix = weight.reshape(len(weight), -1)
        weighs = torch.ones_like(matrix)
        if importance is not None:
            weighs = importance.repeat_interleave(len(matrix) // len(importance), dim=0)

        def error_of(quantized: QuantizedTensor) -> Tensor:
            return (quantized.dequantize().reshape(matrix.shape) - matrix).square() * weighs

        def without(values: Tensor) -> tuple[float, Tensor, Tensor, QuantizedTensor]:
            """With the largest `values` as outliers: the error that is left, each weight's if it were none, and what it is of."""
            kept = torch.zeros_like(matrix, dtype=torch.bool)
            kept.view(-1)[values.flatten().topk(self.count(tuple(weight.shape))).indices] = True
            rest, left = torch.where(kept, 0.0, matrix).reshape(weight.shape), torch.where(kept, 0.0, weighs)
            quantized = self.dense.quantize(rest, partial(codes, fixed=kept), left, seen)
            error = error_of(quantized)
            return error[~kept].double().sum().item(), error, kept, quantized

        tried = [without(of) for of in (error_of(whole), matrix.abs(), matrix.square() * weighs)]
        tried.append(without(min(tried, key=lambda found: found[0])[1]))
        _, _, kept, quantized = min(tried, key=lambda found: found[0])
        return kept.reshape(weight.shape), quantized

    def dequantize(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> Tensor:
        """The dense weight with the outliers put in their places."""
        flat = self.dense.dequantize(tensors, shape).flatten()
        return flat.index_copy(0, self._positions(tensors), tensors["outliers"].float()).reshape(shape)

    @staticmethod
    def _positions(tensors: Mapping[str, Tensor]) -> Tensor:
        """int64 `[n_outliers]`: where each outlier stands in the flattened weight."""
        counts, positions = tensors["outlier_counts"], tensors["outlier_positions"]
        spans = torch.arange(len(counts), device=counts.device).repeat_interleave(counts, output_size=len(positions))
        return SPAN * spans + positions.long()

    def describe(self) -> str:
        """For example "3-bit integer, symmetric, a float16 scale a channel; 1% of the weights in float16"."""
        return f"{self.dense.describe()}; {100 * self.share:g}% of the weights in float16"

    def fields(self) -> dict[str, Any]:
        """With the fields of `dense`, its class among them."""
        return {"class": type(self).__name__, **dataclasses.asdict(self), "dense": self.dense.fields()}
