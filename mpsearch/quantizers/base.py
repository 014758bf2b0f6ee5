"""The contract of the quantizers: the algorithm that finds the codes and scales of one layer, for integers or a codebook.

A quantizer is a frozen dataclass whose fields are its settings. To add one: write `quantizers/<name>.py` with a subclass of
`Quantizer`, and `conf/quantizer/<name>.yaml` with its `_target_` and defaults.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from mpsearch import kernels
from mpsearch.errors import InputError
from mpsearch.quantizers.block_steps import in_blocks
from mpsearch.schemes.base import Codes, FindCodes, QuantizedTensor, QuantScheme
from mpsearch.schemes.codebook import Codebook
from mpsearch.schemes.histogram import Histogram
from mpsearch.schemes.integer import SCALE_DTYPES, Integer
from mpsearch.schemes.k_quant import KQuant
from mpsearch.schemes.rotated import Rotated

CodedScheme = Integer | Codebook
Derived = TypeVar("Derived")
PART = 2**17  # weights at a time in `level_codes`: the intermediate results of a candidate scale stay in the cache


@dataclass(frozen=True)
class InputMoments:
    """Statistics of a layer's input in the calibration data, for each group of a grouped convolution (`k` groups, else 1).

    Attributes
    ----------
    mean, second_moment
        float32 `[k, columns]`: the mean of the input values that each column of the weight is multiplied by, and of their
        squares, over the output positions (padding counted as zeros).
    count
        Output positions.
    histogram
        All input values, for static input ranges.
    hessian
        float32 `[k, columns, columns]`: the mean of x x^T, whose diagonal is `second_moment`; for quantizers with
        `needs_hessian`, where the layer allows it.
    rotated
        The moments of the rotated input of a Linear layer, without `hessian` and `fisher`, where they were asked for.
    fisher
        float32 `[k, rows / k, rows / k]`: the mean of g g^T, g the gradient of the loss at the layer's output; for quantizers
        with `needs_fisher`.
    """

    mean: Tensor
    second_moment: Tensor
    count: int = 1
    histogram: Histogram | None = None
    hessian: Tensor | None = None
    rotated: InputMoments | None = None
    fisher: Tensor | None = None
    _derived: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def derived(self, key: Hashable, make: Callable[[], Derived]) -> Derived:
        """`make()`, which is called once: what the schemes of a layer share, such as a factorization of the Hessian."""
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]

    def for_scheme(self, scheme: QuantScheme) -> InputMoments:
        """The moments of the values that the stored weight is multiplied by: for a `Rotated` scheme, of the rotated input."""
        return self.derived("rotated", self._of_rotated_input) if isinstance(scheme, Rotated) else self

    def _of_rotated_input(self) -> InputMoments:
        # Q^T E[x x^T] Q, which is symmetric.
        hessian = None if self.hessian is None else kernels.rotate(kernels.rotate(self.hessian).transpose(1, 2))
        if self.rotated is not None:
            return replace(self.rotated, hessian=hessian, fisher=self.fisher)
        if hessian is None or self.histogram is not None:
            raise InputError("The moments of its rotated input are not known. Calibrate with rotated=True.")
        second = hessian.diagonal(dim1=1, dim2=2).contiguous()
        return InputMoments(kernels.rotate(self.mean), second, self.count, hessian=hessian, fisher=self.fisher)

    @classmethod
    def pooled(cls, parts: Sequence[InputMoments]) -> InputMoments:
        """The moments of several modules that own one weight, weighted by their `count` of output positions."""
        if len(parts) == 1:
            return parts[0]
        count = sum(part.count for part in parts)

        def mean(name: str) -> Any:
            """The weighted mean of an attribute; `None` where a part has none."""
            values = [getattr(part, name) for part in parts]
            if any(value is None for value in values):
                return None
            return torch.stack([part.count / count * value for part, value in zip(parts, values, strict=True)]).sum(0)

        histograms = [part.histogram for part in parts if part.histogram is not None]
        rotated = [part.rotated for part in parts if part.rotated is not None]
        return cls(
            mean("mean"),
            mean("second_moment"),
            count,
            Histogram.merged(histograms) if histograms else None,
            mean("hessian"),
            cls.pooled(rotated) if len(rotated) == len(parts) else None,
            mean("fisher"),
        )

    def centred(self) -> InputMoments:
        """The moments of x - E[x]: the weights of an error whose mean is subtracted from the layer's bias."""
        second = (self.second_moment - self.mean.square()).clamp(min=0.0)
        hessian = None if self.hessian is None else self.hessian - self.mean[:, :, None] * self.mean[:, None, :]
        rotated = None if self.rotated is None else self.rotated.centred()
        return replace(self, mean=torch.zeros_like(self.mean), second_moment=second, hessian=hessian, rotated=rotated)


class Quantizer(ABC):
    """Finds codes, scales and zero points; a frozen dataclass whose fields are its settings."""

    needs_hessian: ClassVar[bool] = False
    needs_fisher: ClassVar[bool] = False

    def work(self, rows: int, columns: int, k: int = 1) -> float:
        """About how many multiplications a layer of k groups `[rows, columns]` takes, for estimates of the time left."""
        return 100.0 * k * rows * columns

    @abstractmethod
    def codes(self, matrix: Tensor, scheme: Any, group_size: int, importance: Tensor | None) -> Codes:
        """Codes, scales and zero points of a matrix.

        Parameters
        ----------
        matrix
            float32 `[rows, columns]`.
        scheme
            An `Integer` or a `Codebook`; a codebook's scales are float32 and such as `Codebook.scale_for` gives.
        group_size
            Columns that share a scale.
        importance
            float32 `[k, columns]`, k a divisor of the rows: weights of the squared errors; `None` weighs all alike.
        """

    def quantize(self, weight: Tensor, scheme: QuantScheme, moments: InputMoments | None = None) -> QuantizedTensor:
        """`weight` (float32, output channels first) as `scheme` stores it; errors are weighted by the input's second moment."""
        if moments is None:
            return scheme.quantize(weight, self._codes_without_feedback, None)
        moments = moments.for_scheme(scheme)
        return scheme.quantize(weight, self._algorithm(moments), moments.second_moment, moments.histogram)

    def _algorithm(self, moments: InputMoments) -> FindCodes:
        """The algorithm of a layer with these moments, as the scheme calls it."""
        return self._codes_without_feedback

    def _codes_without_feedback(
        self, matrix: Tensor, scheme: Any, group_size: int, importance: Tensor | None, fixed: Tensor | None = None
    ) -> Codes:
        """`codes`, which ignores `fixed`: no weight compensates for the errors of others."""
        if isinstance(scheme, KQuant):
            return self._block_codes(matrix, scheme, importance)
        return self.codes(matrix, scheme, group_size, importance)

    def _block_codes(self, matrix: Tensor, scheme: KQuant, importance: Tensor | None) -> Codes:
        """Codes and steps of llama.cpp's blocks: what is found for float scales, rounded as blocks store them."""
        return in_blocks(matrix, scheme, self.codes(matrix, scheme.dense, scheme.blocks.group, importance))


def kernel_codes(
    matrix: Tensor,
    scheme: CodedScheme,
    group_size: int,
    ratios: Tensor | None = None,
    importance: Tensor | None = None,
) -> Codes:
    """`kernels.quantize` with the scheme's fields; for a codebook `level_codes`."""
    if isinstance(scheme, Codebook):
        return *level_codes(matrix, scheme, group_size, ratios, importance), None
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


def level_codes(
    matrix: Tensor, scheme: Codebook, group_size: int, ratios: Tensor | None = None, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The nearest level of each weight under its group's scale: codes uint8 `[rows, columns]`, scales float32 `[rows, n_groups]`.

    The scale is the one for the group's largest magnitude; with `ratios` the one for that times the ratio which has the least
    squared error, weighted by `importance` `[k, columns]`, the first of equals.

    Raises
    ------
    InputError
        For weights or scales that are not finite.
    """
    if bad := int((~torch.isfinite(matrix)).sum()):
        raise InputError(f"{bad} of {matrix.numel()} weights are NaN or infinite. Load a sound checkpoint.")
    rows, columns = matrix.shape
    size = min(group_size, max(columns, 1))
    n_groups = -(-columns // size)
    codes = torch.empty(rows, n_groups, size, dtype=torch.uint8, device=matrix.device)
    scales = torch.empty(rows, n_groups, device=matrix.device)
    if matrix.numel():
        blocks = torch.nn.functional.pad(matrix, (0, n_groups * size - columns)).reshape(codes.shape)
        weights = torch.ones_like(matrix[:1]) if importance is None else importance
        weights = torch.nn.functional.pad(weights, (0, n_groups * size - columns)).reshape(-1, n_groups, size)
        step = max(PART // (n_groups * size), 1)
        for begin in range(0, rows, step):
            part = slice(begin, min(begin + step, rows))
            weight_rows = torch.arange(begin, part.stop, device=matrix.device) // (rows // len(weights))
            codes[part], scales[part] = _best_levels(blocks[part], scheme, ratios, weights[weight_rows])
    if not torch.isfinite(scales).all():
        raise InputError(
            f"With weights up to {float(matrix.abs().max()):g} a scale exceeds the largest {scheme.scale}. Scale the weights "
            "down, or use scale=float32."
        )
    return codes.reshape(rows, n_groups * size)[:, :columns].contiguous(), scales


def _best_levels(blocks: Tensor, scheme: Codebook, ratios: Tensor | None, weights: Tensor) -> tuple[Tensor, Tensor]:
    """`level_codes` of blocks `[rows, n_groups, size]`."""
    largest = blocks.abs().amax(-1)
    best = scheme.scale_for(largest if ratios is None else largest * ratios[0])
    if ratios is not None:
        least = torch.full_like(largest, torch.inf)
        for ratio in ratios:
            scales = scheme.scale_for(largest * ratio)
            change = scheme.table.decode(_encoded(blocks, scheme, scales)).mul_(scales[..., None]).sub_(blocks)
            error = change.square_().mul_(weights).sum(-1)
            better = error < least
            least, best = torch.where(better, error, least), torch.where(better, scales, best)
    return _encoded(blocks, scheme, best), best


def _encoded(blocks: Tensor, scheme: Codebook, scales: Tensor) -> Tensor:
    """The codes of the nearest levels; a scale of 0 makes all weights 0."""
    scales = scales[..., None]
    return scheme.table.encode(torch.where(scales > 0, blocks / scales, 0.0))
