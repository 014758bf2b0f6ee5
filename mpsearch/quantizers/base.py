"""The contract of the quantizers: the algorithm that finds the codes and scales of one layer for an integer scheme."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from mpsearch import kernels
from mpsearch.schemes.base import QuantizedTensor, QuantScheme
from mpsearch.schemes.floating import Float
from mpsearch.schemes.integer import SCALE_DTYPES, Integer


@dataclass(frozen=True)
class InputMoments:
    """What calibration tells of a layer's input, for each group of a grouped convolution (`k` groups, else 1).

    `mean` and `second_moment` are float32 `[k, columns]`: the mean of each input value that meets a column of the weight
    matrix, and of its square, over the calibration data and all output positions (padding counted as the zeros it is).
    """

    mean: Tensor
    second_moment: Tensor


class Quantizer(ABC):
    """Finds codes, scales and zero points; a frozen dataclass whose fields are its settings."""

    @abstractmethod
    def codes(
        self, matrix: Tensor, scheme: Integer, group_size: int, importance: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(codes uint8 `[rows, columns]`, scales `[rows, n_groups]`, zero points uint8 or `None`) of a float32 matrix.

        `importance` float32 `[k, columns]` (rows divide by k) weighs squared errors; `None` weighs all alike.
        """

    def quantize(self, weight: Tensor, scheme: QuantScheme, moments: InputMoments | None = None) -> QuantizedTensor:
        """`weight` (float32, output channels first) as `scheme` stores it; a float scheme is rounded to nearest."""
        if isinstance(scheme, Float):
            return scheme.quantize(weight)
        assert isinstance(scheme, Integer), scheme
        shape = tuple(weight.shape)
        rows, columns, group_size = scheme.grid(shape)
        importance = None if moments is None else moments.second_moment
        if importance is not None and scheme.group_size == "tensor":
            importance = importance.repeat_interleave(shape[0] // importance.shape[0], dim=0).reshape(1, columns)
        matrix = weight.reshape(rows, columns).contiguous()
        codes, scales, zero_points = self.codes(matrix, scheme, group_size, importance)
        tensors = {"codes": kernels.pack(codes, scheme.bits), "scales": scales}
        if zero_points is not None:
            tensors["zero_points"] = zero_points
        return QuantizedTensor(scheme, shape, tensors)


def kernel_codes(
    matrix: Tensor,
    scheme: Integer,
    group_size: int,
    ratios: Tensor | None = None,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The kernels' `quantize` with the scheme's fields filled in."""
    return kernels.quantize(
        matrix,
        bits=scheme.bits,
        group_size=group_size,
        symmetric=scheme.symmetric,
        scale_dtype=SCALE_DTYPES[scheme.scale_dtype],
        ratios=ratios,
        importance=importance,
    )


def clip_ratios(n: int, smallest: float, both_signs: bool) -> Tensor:
    """`n` ratios from 1 down to `smallest`, evenly spaced, float32; with `both_signs` each is followed by its negative."""
    ratios = torch.linspace(1.0, smallest, n)
    return torch.stack([ratios, -ratios], dim=1).flatten() if both_signs else ratios
