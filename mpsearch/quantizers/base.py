"""The contract of the quantizers: the algorithm that finds the codes and scales of one layer, in integers or a codebook."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from mpsearch import kernels
from mpsearch.errors import InputError
from mpsearch.schemes.base import QuantizedTensor, QuantScheme
from mpsearch.schemes.codebook import Codebook
from mpsearch.schemes.histogram import Histogram
from mpsearch.schemes.integer import SCALE_DTYPES, Integer
from mpsearch.schemes.rotated import Rotated


@dataclass(frozen=True)
class InputMoments:
    """What calibration tells of a layer's input, for each group of a grouped convolution (`k` groups, else 1).

    `mean` and `second_moment` are float32 `[k, columns]`: the mean of each input value that meets a column of the weight
    matrix, and of its square, over the `count` output positions of the calibration data (padding counted as the zeros it is).
    `histogram` is of all input values, for static input ranges. `hessian` float32 `[k, columns, columns]` is the mean of x x^T,
    whose diagonal is `second_moment`; it is there for quantizers that say `needs_hessian`, where the layer allows it.
    So is `fisher` float32 `[k, rows / k, rows / k]` for those that say `needs_fisher`: the mean of g g^T, g being the gradient of
    the loss at the layer's output. `rotated` are the moments of the rotated input of a Linear layer, without these two, where
    they were asked for.
    """

    mean: Tensor
    second_moment: Tensor
    count: int = 1
    histogram: Histogram | None = None
    hessian: Tensor | None = None
    rotated: InputMoments | None = None
    fisher: Tensor | None = None

    def for_scheme(self, scheme: QuantScheme) -> InputMoments:
        """Those of what meets the columns of the weight as `scheme` stores it: of a rotated one, of the rotated input."""
        if not isinstance(scheme, Rotated):
            return self
        # Q^T E[x x^T] Q, which is symmetric.
        hessian = None if self.hessian is None else kernels.rotate(kernels.rotate(self.hessian).transpose(1, 2))
        if self.rotated is not None:
            return replace(self.rotated, hessian=hessian, fisher=self.fisher)
        if hessian is None or self.histogram is not None:
            raise InputError("The moments of its rotated input are not known. Calibrate with rotated=True.")
        second = hessian.diagonal(dim1=1, dim2=2).contiguous()
        return InputMoments(kernels.rotate(self.mean), second, self.count, hessian=hessian, fisher=self.fisher)

    @classmethod
    def pooled(cls, found: Sequence[InputMoments]) -> InputMoments:
        """Of several modules that own one weight, each counted by its `count` of output positions."""
        if len(found) == 1:
            return found[0]
        count = sum(moments.count for moments in found)
        shares = [moments.count / count for moments in found]

        def mean(of: Sequence[Tensor]) -> Tensor:
            return torch.stack([share * each for share, each in zip(shares, of, strict=True)]).sum(0)

        def mean_where_all(of: Sequence[Tensor | None]) -> Tensor | None:
            known = [each for each in of if each is not None]
            return mean(known) if len(known) == len(found) else None

        histograms = [moments.histogram for moments in found if moments.histogram is not None]
        turned = [moments.rotated for moments in found if moments.rotated is not None]
        return cls(
            mean([moments.mean for moments in found]),
            mean([moments.second_moment for moments in found]),
            count,
            Histogram.merged(histograms) if histograms else None,
            mean_where_all([moments.hessian for moments in found]),
            cls.pooled(turned) if len(turned) == len(found) else None,
            mean_where_all([moments.fisher for moments in found]),
        )

    def centred(self) -> InputMoments:
        """The moments of x - E[x]: what weighs an error whose mean is taken off the layer's bias."""
        second = (self.second_moment - self.mean.square()).clamp(min=0.0)
        hessian = None if self.hessian is None else self.hessian - self.mean[:, :, None] * self.mean[:, None, :]
        rotated = None if self.rotated is None else self.rotated.centred()
        return replace(self, mean=torch.zeros_like(self.mean), second_moment=second, hessian=hessian, rotated=rotated)


class Quantizer(ABC):
    """Finds codes, scales and zero points; a frozen dataclass whose fields are its settings."""

    needs_hessian: ClassVar[bool] = False
    needs_fisher: ClassVar[bool] = False

    @abstractmethod
    def codes(
        self, matrix: Tensor, scheme: Any, group_size: int, importance: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(codes uint8 `[rows, columns]`, scales `[rows, n_groups]`, zero points uint8 or `None`) of a float32 matrix.

        `scheme` is an `Integer` or a `Codebook`, whose scales are float32 and such as `Codebook.scale_for` gives.

        `importance` float32 `[k, columns]` (rows divide by k) weighs squared errors; `None` weighs all alike.
        """

    def quantize(self, weight: Tensor, scheme: QuantScheme, moments: InputMoments | None = None) -> QuantizedTensor:
        """`weight` (float32, output channels first) as `scheme` stores it; errors weigh by the input's second moment."""
        if moments is None:
            return scheme.quantize(weight, self._codes_without_feedback, None)
        moments = moments.for_scheme(scheme)
        return scheme.quantize(weight, self._codes_without_feedback, moments.second_moment, moments.histogram)

    def _codes_without_feedback(
        self, matrix: Tensor, scheme: Any, group_size: int, importance: Tensor | None, fixed: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """`codes`: where no weight takes the errors of others, `fixed` ones need no care."""
        return self.codes(matrix, scheme, group_size, importance)


def kernel_codes(
    matrix: Tensor,
    scheme: Integer | Codebook,
    group_size: int,
    ratios: Tensor | None = None,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The kernels' `quantize` with the scheme's fields filled in; for a codebook `level_codes`."""
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


PART = 2**17  # weights at a time: what a candidate makes of them stays in the cache


def level_codes(
    matrix: Tensor, scheme: Codebook, group_size: int, ratios: Tensor | None = None, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes uint8 `[rows, columns]` and scales float32 `[rows, n_groups]`: each weight's nearest level under its group's scale.

    That is the one for the group's largest magnitude; with `ratios` the one for that times the ratio which has the least squared
    error, weighted by `importance` `[k, columns]`, the first of equals. Weights that are not finite are an `InputError`.
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
        weighs = torch.ones_like(matrix[:1]) if importance is None else importance
        weighs = torch.nn.functional.pad(weighs, (0, n_groups * size - columns)).reshape(-1, n_groups, size)
        per = rows // len(weighs)
        step = max(PART // (n_groups * size), 1)
        for begin in range(0, rows, step):
            part = slice(begin, min(begin + step, rows))
            of_rows = torch.arange(begin, part.stop, device=matrix.device) // per
            codes[part], scales[part] = _best_levels(blocks[part], scheme, ratios, weighs[of_rows])
    if not torch.isfinite(scales).all():
        raise InputError(
            f"With weights up to {float(matrix.abs().max()):g} a scale exceeds the largest {scheme.scale}. Scale the weights "
            "down, or use scale=float32."
        )
    return codes.reshape(rows, n_groups * size)[:, :columns].contiguous(), scales


def _best_levels(blocks: Tensor, scheme: Codebook, ratios: Tensor | None, weighs: Tensor) -> tuple[Tensor, Tensor]:
    """`level_codes` of blocks `[rows, n_groups, size]`."""
    largest = blocks.abs().amax(-1)
    best = scheme.scale_for(largest if ratios is None else largest * ratios[0])
    if ratios is not None:
        least = torch.full_like(largest, torch.inf)
        for ratio in ratios:
            scales = scheme.scale_for(largest * ratio)
            change = scheme.table.decode(_encoded(blocks, scheme, scales)).mul_(scales[..., None]).sub_(blocks)
            error = change.square_().mul_(weighs).sum(-1)
            better = error < least
            least, best = torch.where(better, error, least), torch.where(better, scales, best)
    return _encoded(blocks, scheme, best), best


def _encoded(blocks: Tensor, scheme: Codebook, scales: Tensor) -> Tensor:
    """The nearest levels' codes; a scale of 0 makes all weights 0."""
    each = scales[..., None]
    return scheme.table.encode(torch.where(each > 0, blocks / each, 0.0))
