"""The steps of llama.cpp's blocks: float16 numbers of a block and integers of its groups, for codes that are given.

For weights x of a group, their importance w and the values v of their codes, the weighted error of scale s and minimum b is

    sum w (s v - b - x)^2 = A s^2 - 2 B s b + C b^2 - 2 P s + 2 Q b + const

with A = sum w v^2, B = sum w v, C = sum w, P = sum w v x and Q = sum w x. All that is searched is a function of these five sums:
the block's d, of a number of ratios of the largest scale, each with its integers; dmin likewise; and d and dmin again for the
integers found. ggml's own search (`make_qkx3_quants` in ggml/src/ggml-quants.c) takes d from the largest scale.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.quantizers.block_fit import LARGEST_HALF, TINY, half
from mpsearch.quantizers.grids import float_zeros
from mpsearch.schemes.base import Codes
from mpsearch.schemes.k_quant import KQuant

PART = 2**17  # weights at a time: intermediate results stay in the cache
# Ranges that are tried. Of symmetric formats the largest weight is at either end of the codes, times a ratio; of others the least
# weight is `BELOW` steps below the first code, and `MORE` steps more than there are lie between it and the largest.
SYMMETRIC = tuple(torch.linspace(1.2, 0.5, 12).tolist())
BELOW, MORE = (-0.2, 0.2, 0.6), tuple(torch.linspace(-1.4, 1.6, 10).tolist())
RATIOS = 32
LEAST_RATIO, LARGEST_RATIO = 0.7, 1.3
TABLE_STEP = 113 / 7  # units of the table in a step of `KQuant.dense`


@dataclass(frozen=True)
class Sums:
    """A, B, C, P and Q of each group, float32 `[n_blocks, n_groups]`."""

    vv: Tensor
    v: Tensor
    one: Tensor
    vx: Tensor
    x: Tensor

    @classmethod
    def from_values(cls, values: Tensor, x: Tensor, weights: Tensor) -> Sums:
        """Of `[n_blocks, n_groups, group]`."""
        weighted = weights * values
        sums = (weighted * values, weighted, weights.expand_as(x), weighted * x, weights * x)
        return cls(*(each.sum(-1) for each in sums))

    def of_blocks(self, scales: Tensor, minima: Tensor) -> Sums:
        """The sums of whole blocks, whose values are `scales * values` and whose ones are `minima`."""
        sums = self.vv * scales.square(), self.v * scales * minima, self.one * minima.square()
        return Sums(*(each.sum(-1, keepdim=True) for each in (*sums, self.vx * scales, self.x * minima)))

    def best(self, has_minima: bool, signed: bool = False) -> tuple[Tensor, Tensor]:
        """The scale and the minimum with the least error; minima not negative unless `signed`."""
        alone = self.vx / self.vv.clamp(min=TINY)
        if not has_minima:
            return alone, torch.zeros_like(alone)
        determinant = self.vv * self.one - self.v.square()
        solvable = determinant > 1e-6 * self.vv * self.one
        determinant = torch.where(solvable, determinant, 1.0)
        scale = (self.vx * self.one - self.v * self.x) / determinant
        minimum = (self.v * self.vx - self.vv * self.x) / determinant
        inside = solvable if signed else solvable & (minimum >= 0)
        return torch.where(inside, scale, alone), torch.where(inside, minimum, 0.0)

    def minimum_for(self, scale: Tensor) -> Tensor:
        """The best minimum for a scale."""
        return (self.v * scale - self.x) / self.one.clamp(min=TINY)

    def error(self, scale: Tensor, minimum: Tensor) -> Tensor:
        """The error, up to what does not depend on either."""
        linear = self.x * minimum - self.vx * scale
        return self.vv * scale.square() - 2 * self.v * scale * minimum + self.one * minimum.square() + 2 * linear


def in_blocks(matrix: Tensor, scheme: KQuant, dense_codes: Codes) -> Codes:
    """The scales and minima that a quantizer found for `scheme.dense`, as blocks store them, and the nearest codes."""
    _, scales, zero_points = dense_codes
    blocks, shape = scheme.blocks, (scales.numel() // scheme.blocks.n_groups, scheme.blocks.n_groups)
    minima = torch.zeros_like(scales)
    if blocks.table:
        scales = scales / TABLE_STEP
    else:
        minima = scales * (float_zeros(scheme.dense, scales, zero_points) - blocks.middle)
    steps = nearest_steps(scheme, scales.reshape(shape), minima.reshape(shape))
    codes = rounded(scheme, matrix.reshape(*shape, blocks.group), steps)
    return _stored(matrix, scheme, codes, steps)


def searched_blocks(matrix: Tensor, scheme: KQuant, importance: Tensor | None, n_fits: int = 2) -> Codes:
    """Codes uint8 `[rows, columns]` and steps (`KQuant.stored`) with a small weighted error.

    Each group tries a number of ranges, fits scale and minimum to the codes of each, and keeps the best. Then steps are fitted to
    the codes and weights rounded again, `n_fits` times, of which each block keeps the best.

    Parameters
    ----------
    matrix
        float32 `[rows, columns]`.
    importance
        float32 `[k, columns]`, k a divisor of the rows: weights of the squared errors; `None` weighs all alike.
    """
    if bad := int((~torch.isfinite(matrix)).sum()):
        raise InputError(f"{bad} of {matrix.numel()} weights are NaN or infinite. Load a sound checkpoint.")
    blocks, (rows, columns) = scheme.blocks, matrix.shape
    weights = torch.ones(1, columns) if importance is None else importance
    x = matrix.reshape(matrix.numel() // blocks.block, blocks.n_groups, blocks.group)
    codes, steps = torch.empty(x.shape, dtype=torch.uint8), torch.empty(len(x), 2, 1 + blocks.n_groups)
    per_row = columns // blocks.block
    for part in torch.arange(len(x)).split(max(PART // blocks.block, 1)):
        row = part // max(per_row, 1) // max(rows // len(weights), 1)
        w = weights.reshape(len(weights), per_row, blocks.n_groups, blocks.group)[row, part % max(per_row, 1)]
        codes[part], steps[part] = _searched_part(x[part], w, scheme, n_fits)
    return _stored(matrix, scheme, codes, steps)


def _stored(matrix: Tensor, scheme: KQuant, codes: Tensor, steps: Tensor) -> Codes:
    if not torch.isfinite(steps).all() or bool((steps.abs() >= LARGEST_HALF).any()):
        raise InputError(
            f"With weights up to {float(matrix.abs().max()):g} a scale exceeds the largest float16 ({LARGEST_HALF:g}). Scale the "
            "weights down."
        )
    n_steps = matrix.shape[1] // scheme.blocks.block * 2 * (1 + scheme.blocks.n_groups)
    return codes.reshape(matrix.shape), steps.reshape(len(matrix), n_steps), None


def _searched_part(x: Tensor, w: Tensor, scheme: KQuant, n_fits: int) -> tuple[Tensor, Tensor]:
    """`searched_blocks` of blocks `[n_blocks, n_groups, group]`: codes, and steps `[n_blocks, 2, 1 + n_groups]`."""
    mean = w.mean((1, 2), keepdim=True)
    w = w / torch.where(mean > 0, mean, 1.0) + 1e-6  # no column is without weight
    steps = nearest_steps(scheme, *_searched_groups(x, w, scheme))
    best_codes = codes = rounded(scheme, x, steps)
    best_steps, least = steps, torch.full((len(x),), torch.inf)
    for i in range(n_fits + 1):
        if i:
            steps = fitted_steps(scheme, Sums.from_values(scheme.values(codes), x, w))
            codes = rounded(scheme, x, steps)
        decoded = scheme.decode(codes.flatten(1), steps.flatten(1)).reshape(x.shape)
        error = (decoded - x).square_().mul_(w).sum((1, 2))
        better = error < least
        least = torch.where(better, error, least)
        best_codes = torch.where(better[:, None, None], codes, best_codes)
        best_steps = torch.where(better[:, None, None], steps, best_steps)
    return best_codes, best_steps


def _searched_groups(x: Tensor, w: Tensor, scheme: KQuant) -> tuple[Tensor, Tensor]:
    """The scales and minima of groups that are best with float numbers, `[n_blocks, n_groups]`."""
    wx, one = w * x, w.sum(-1)
    total, blocks = wx.sum(-1), scheme.blocks
    has_minima, signed = blocks.largest_minimum > 0, not blocks.has_integers
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for scale, minimum in _ranges(x, scheme):
        values = scheme.values(_nearest(scheme, x, scale, minimum))
        weighted = w * values
        sums = Sums((weighted * values).sum(-1), weighted.sum(-1), one, (wx * values).sum(-1), total)
        new = sums.best(has_minima, signed)
        error = sums.error(*new)
        if best is None:
            best = (error, *new)
            continue
        better = error < best[0]
        best = tuple(torch.where(better, x, y) for x, y in zip((error, *new), best, strict=True))  # type: ignore[assignment]
    assert best is not None
    return best[1], best[2]


def _ranges(x: Tensor, scheme: KQuant) -> Iterator[tuple[Tensor, Tensor]]:
    """Scales and minima to begin with, `[n_blocks, n_groups, 1]`."""
    blocks = scheme.blocks
    top = 2**blocks.bits - 1
    if not blocks.largest_minimum:
        largest = x.abs().amax(-1, keepdim=True)
        signed = torch.where(x.amax(-1, keepdim=True) == largest, largest, -largest)
        ends = scheme.values(torch.tensor([0, top], dtype=torch.uint8)).tolist()
        for end, ratio in itertools.product(ends, SYMMETRIC):
            yield signed / end * ratio, torch.zeros_like(largest)
        return
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    if blocks.has_integers:
        low = low.clamp(max=0.0)
    for below, more in itertools.product(BELOW, MORE):
        scale = (high - low) / (top + more)
        yield scale, -low - below * scale


def rounded(scheme: KQuant, x: Tensor, steps: Tensor) -> Tensor:
    """The nearest codes, uint8 `[n_blocks, n_groups, group]`; steps `[n_blocks, 2, 1 + n_groups]`."""
    scale, minimum = (each.reshape(*x.shape[:2], 1) for each in scheme.effective(steps.flatten(1)))
    return _nearest(scheme, x, scale, minimum)


def _nearest(scheme: KQuant, x: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    position = (x + minimum).mul_(torch.where(scale.abs() < TINY, 0.0, 1.0 / scale))
    blocks = scheme.blocks
    if blocks.table is None:
        return position.add_(blocks.middle).round_().clamp_(0, 2**blocks.bits - 1).to(torch.uint8)
    return blocks.table.encode(position)


def nearest_steps(scheme: KQuant, scale: Tensor, minimum: Tensor) -> Tensor:
    """The steps for scales and minima `[n_blocks, n_groups]`: those of the largest are exact but for float16's rounding."""
    blocks = scheme.blocks
    low, high = blocks.scales
    d = _extreme(scale) / (low if low < 0 else high)
    dmin = minimum.abs().amax(1, keepdim=True) / max(blocks.largest_minimum, 1)
    if not blocks.has_integers:
        dmin = minimum
    d, dmin = half(d), half(dmin)
    integers = _integers(scale, d, low, high)
    minima = _integers(minimum, dmin, 0, blocks.largest_minimum) if blocks.has_integers else torch.ones_like(minimum)
    return _steps(d, integers, dmin, minima if blocks.largest_minimum else torch.zeros_like(minimum))


def fitted_steps(scheme: KQuant, sums: Sums) -> Tensor:
    """Steps `[n_blocks, 2, 1 + n_groups]` with a small error for the codes that the sums are of."""
    blocks = scheme.blocks
    low, high = blocks.scales
    has_minima = blocks.largest_minimum > 0
    if not blocks.has_integers:
        scale, minimum = sums.best(has_minima, signed=True)
        d = half(scale)
        dmin = half(sums.minimum_for(d)) if has_minima else torch.zeros_like(d)
        return _steps(d, torch.ones_like(d), dmin, torch.full_like(d, blocks.largest_minimum))
    scale, minimum = sums.best(has_minima)
    curvature = sums.vv
    if has_minima:  # where the minimum is free, it follows the scale
        free = sums.vv - sums.v.square() / sums.one.clamp(min=TINY)
        curvature = torch.where(minimum > 0, free, sums.vv)
    d = _searched(scale, curvature, _extreme(scale) / (low if low < 0 else high), low, high)
    integers = _integers(scale, d, low, high)
    if not has_minima:
        whole = sums.of_blocks(integers, torch.zeros_like(integers))
        d = half(whole.best(False)[0])
        return _steps(d, _integers(scale, d, low, high), torch.zeros_like(d), torch.zeros_like(scale))
    wanted = sums.minimum_for(d * integers).clamp(min=0.0)
    largest = blocks.largest_minimum
    dmin = _searched(wanted, sums.one, wanted.amax(1, keepdim=True) / largest, 0, largest)
    minima = _integers(wanted, dmin, 0, largest)
    whole = sums.of_blocks(integers, minima)
    d_fit, dmin_fit = map(half, whole.best(True))
    better = (whole.error(d_fit, dmin_fit) < whole.error(d, dmin)) & (d_fit > 0)
    return _steps(torch.where(better, d_fit, d), integers, torch.where(better, dmin_fit, dmin), minima)


def _extreme(x: Tensor) -> Tensor:
    """The value with the largest magnitude of each row, `[n, 1]`."""
    return x.gather(1, x.abs().argmax(1, keepdim=True))


def _integers(x: Tensor, unit: Tensor, low: int, high: int) -> Tensor:
    """x in units, rounded and clamped; `low` or 0 where the unit is 0."""
    return torch.where(unit == 0, 0.0, x / torch.where(unit == 0, 1.0, unit)).round().clamp(low, high)


def _searched(wanted: Tensor, curvature: Tensor, unit: Tensor, low: int, high: int) -> Tensor:
    """The unit, float16 `[n_blocks, 1]`, whose multiples by integers come nearest to `wanted` in the norm of `curvature`.

    Those tried are `unit` times ratios; of each the least squares of its integers is taken, too.
    """
    units = half(unit * torch.linspace(LEAST_RATIO, LARGEST_RATIO, RATIOS))
    integers = _integers(wanted[:, None], units[..., None], low, high)  # [n_blocks, ratios, n_groups]
    along = (curvature[:, None] * integers * wanted[:, None]).sum(-1)
    norm = (curvature[:, None] * integers.square()).sum(-1)
    refined = half(torch.where(norm > 0, along / norm.clamp(min=TINY), units))
    error = norm * refined.square() - 2 * along * refined
    return refined.gather(1, error.argmin(1, keepdim=True))


def _steps(d: Tensor, scales: Tensor, dmin: Tensor, minima: Tensor) -> Tensor:
    return torch.stack([torch.cat([d, scales], dim=1), torch.cat([dmin, minima], dim=1)], dim=1)
