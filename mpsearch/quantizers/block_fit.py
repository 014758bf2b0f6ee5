"""Fitting the steps of llama.cpp's blocks to codes, for the error of a layer's output instead of that of the weights.

With errors E of the weight the loss grows by about tr(G E H E^T), H = E[x x^T] of the input and G of the gradient at the output
(without G: tr(E H E^T)). Where a group of row r, whose codes have the values v, changes its scale by s and its minimum by b, the
loss changes by G_rr times

    2 (a s - c b) + A s^2 - 2 B s b + C b^2

with T = R E H, R[r, s] = G[r, s] / G[r, r], a = v . T and c = 1 . T over the group, A = v H v, B = v H 1 and C = 1 H 1. Scales
and minima are integers times the block's d and dmin: of a few integers next to the best real numbers the best are taken. d and
dmin, float16, then take their best values for the same formula with v times its scale and 1 times its minimum.

Rows take turns in tiles of `ROWS`; groups and blocks take turns within a tile. Its rows move at once, unless that lowers the
error by less than `SHARE` of what it would be if no row depended on another: then the halves of the tile take turns, and so on.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from mpsearch.schemes.k_quant import KQuant
from mpsearch.schemes.k_quant_layout import BlockFormat

ROWS, INDEPENDENT_ROWS = 256, 512  # without G, rows are independent
SHARE = 0.25
NEAR = torch.tensor([[-1.0], [0.0], [1.0]])  # integers about the rounded one
TINY = torch.finfo(torch.float32).tiny
LARGEST_HALF = 65504.0


@dataclass(frozen=True)
class Quadratic:
    """a, c, A, B and C of each row, float32 `[rows]`; no minimum moves where C is 0."""

    a: Tensor
    c: Tensor
    aa: Tensor
    ac: Tensor
    cc: Tensor

    def linear(self, s: Tensor, b: Tensor) -> Tensor:
        """The part of `change` that is linear."""
        return 2 * (s * self.a - b * self.c)

    def change(self, s: Tensor, b: Tensor) -> Tensor:
        """Of each row's error."""
        return self.linear(s, b) + s * (self.aa * s - 2 * self.ac * b) + self.cc * b * b

    def alone(self) -> Tensor:
        """The change of scale that is best with the minimum as it is."""
        return -self.a / self.aa.clamp(min=TINY)

    def both(self) -> Tensor:
        """The change of scale that is best with its `minimum`; alone where both together are not determined."""
        determinant = self.aa * self.cc - self.ac * self.ac
        solvable = determinant > 1e-6 * self.aa * self.cc
        change = (self.c * self.ac - self.a * self.cc) / torch.where(solvable, determinant, 1.0)
        return torch.where(solvable, change, self.alone())

    def minimum(self, s: Tensor) -> Tensor:
        """The best change of the minimum after a change of the scale; 0 where C is."""
        return torch.where(self.cc > 0, self.c + self.ac * s, 0.0) / self.cc.clamp(min=TINY)


def refitted(
    scheme: KQuant, codes: Tensor, steps: Tensor, weight: Tensor, hessian: Tensor, fisher: Tensor | None = None
) -> Tensor:
    """Steps (`KQuant.stored`) with a smaller error for the codes as they are.

    Parameters
    ----------
    codes, steps, weight
        uint8 `[rows, columns]`, float32 as of `KQuant.stored`, and float32 `[rows, columns]`.
    hessian
        H, float32 `[columns, columns]`.
    fisher
        G, float32 `[rows, rows]`; `None`: rows are independent.
    """
    blocks, steps, values = scheme.blocks, steps.clone(), scheme.values(codes)
    numbers = scheme.split(steps)
    sums = (scheme.decode(codes, steps) - weight) @ hessian  # E H of all rows
    relative = None if fisher is None else fisher / fisher.diagonal()[:, None]  # R
    size = INDEPENDENT_ROWS if fisher is None else ROWS
    for begin, i in itertools.product(range(0, len(weight), size), range(numbers.shape[1])):
        rows, inside = slice(begin, min(begin + size, len(weight))), slice(i * blocks.block, (i + 1) * blocks.block)
        targets = sums[rows, inside] if relative is None else relative[rows] @ sums[:, inside]
        own = None if fisher is None else fisher[rows, rows]
        tile = _Tile(blocks, values[rows, inside], numbers[rows, i], targets, hessian[inside, inside], own)
        tile.fit()
        if tile.change.any():
            sums[rows] += tile.change @ hessian[inside]
    return steps


@dataclass(frozen=True, eq=False)
class _Direction:
    """Numbers `[rows, 2]` (a scale and a minimum, a view) of a tile: what they multiply in some columns of the block.

    `units` `[rows, 2]` are d and dmin where the numbers are integers. `targets` are T and `within` is H of these columns. A, B
    and C are `[rows]`.
    """

    columns: slice
    v: Tensor
    u: Tensor
    numbers: Tensor
    units: Tensor | None
    targets: Tensor
    within: Tensor
    aa: Tensor
    ac: Tensor
    cc: Tensor


class _Tile:
    """Some rows of a block: T is `targets`, `numbers` `[rows, 2, 1 + n_groups]` are written to, `change` is that of E."""

    def __init__(
        self, blocks: BlockFormat, values: Tensor, numbers: Tensor, targets: Tensor, within: Tensor, own: Tensor | None
    ) -> None:
        self.blocks, self.values, self.numbers, self.targets = blocks, values, numbers, targets
        self.within, self.own, self.change = within, own, torch.zeros_like(values)
        self.weights = torch.ones(len(values)) if own is None else own.diagonal()
        self.spread = self.change if own is None else torch.zeros_like(values)  # R times the change

    def fit(self) -> None:
        """The integers of each group, then d and dmin."""
        size, rows = self.blocks.group, slice(0, len(self.values))
        for g in range(self.blocks.n_groups) if self.blocks.has_integers else ():
            columns = slice(g * size, (g + 1) * size)
            v = self.values[:, columns]
            self._move(rows, self._direction(columns, v, torch.ones_like(v), 1 + g, self.numbers[..., 0]))
        scales, u = self.numbers[..., 1:].repeat_interleave(size, -1).unbind(1)
        v = self.values * scales
        self._move(rows, self._direction(slice(0, v.shape[1]), v, u, 0, None))

    def _direction(self, columns: slice, v: Tensor, u: Tensor, at: int, units: Tensor | None) -> _Direction:
        """With T after the change so far, which is of the columns before these, or of all."""
        targets = self.targets[:, columns] + self.spread @ self.within[:, columns]
        within = self.within[columns, columns]
        vh = v @ within
        uh = u @ within if self.blocks.largest_minimum else torch.zeros_like(u)
        curvature = (vh * v).sum(1), (vh * u).sum(1), (uh * u).sum(1)
        return _Direction(columns, v, u, self.numbers[..., at], units, targets, within, *curvature)

    def _move(self, rows: slice, to: _Direction) -> None:
        """Move the numbers of these rows, all at once or in halves."""
        v, u, t = to.v[rows], to.u[rows], to.targets[rows]
        q = Quadratic((v * t).sum(1), (u * t).sum(1), to.aa[rows], to.ac[rows], to.cc[rows])
        old, units = to.numbers[rows], 1.0 if to.units is None else to.units[rows]
        new = _floats(q, old) if to.units is None else _integers(q, old, to.units[rows], self.blocks)
        s, b = ((new - old) * units).T
        if not (s.any() or b.any()):
            return
        step = v * s[:, None] - u * b[:, None]
        if self.own is not None:
            weights, spread, moved = self.weights[rows], self.own[:, rows] @ step, step @ to.within
            together = weights @ q.linear(s, b) + (spread[rows] * moved).sum()
            if len(step) > 1 and together > SHARE * (weights @ q.change(s, b)):
                middle = (rows.start + rows.stop) // 2
                self._move(slice(rows.start, middle), to)
                self._move(slice(middle, rows.stop), to)
                return
            spread /= self.weights[:, None]
            to.targets[rows.stop :] += spread[rows.stop :] @ to.within
            self.spread[:, to.columns] += spread
        to.numbers[rows] = new
        self.change[rows, to.columns] += step


def _integers(q: Quadratic, old: Tensor, units: Tensor, blocks: BlockFormat) -> Tensor:
    """The best integers `[rows, 2]` near the best real numbers."""
    (low, high), largest = blocks.scales, blocks.largest_minimum
    (scale, minimum), (d, dmin) = old.T, units.T
    about = (scale + _per_unit(q.both(), d)).round()
    tried = torch.cat([scale[None], (about + NEAR).clamp(low, high)])
    s, minima = d * (tried - scale), minimum.expand_as(tried)
    if largest:
        minima = (minimum + _per_unit(q.minimum(s), dmin)).round().clamp(0, largest)
    change = q.change(s, dmin * (minima - minimum))
    least, best = change.min(0, keepdim=True)
    return torch.where(least < 0, torch.stack([tried, minima]).gather(1, best.expand(2, 1, -1))[:, 0], old.T).T


def _per_unit(change: Tensor, unit: Tensor) -> Tensor:
    """0 where the unit is."""
    return torch.where(unit == 0, 0.0, change / torch.where(unit == 0, 1.0, unit))


def _floats(q: Quadratic, old: Tensor) -> Tensor:
    """The best float16 numbers `[rows, 2]`: both, or one of them, moved; a scale that is not 0 stays so."""
    d, dmin = old.T
    best, best_minimum, least = d, dmin, torch.zeros_like(d)
    for tried, moves in itertools.product((d, half(d + q.alone()), half(d + q.both())), (True, False)):
        s = tried - d
        other = half(dmin + q.minimum(s)) if moves else dmin
        change = q.change(s, other - dmin)
        better = (change < least) & ((tried != 0) | (d == 0))
        least = torch.where(better, change, least)
        best, best_minimum = torch.where(better, tried, best), torch.where(better, other, best_minimum)
    return torch.stack([best, best_minimum], dim=1)


def half(x: Tensor) -> Tensor:
    """Rounded to float16, finite."""
    return x.clamp(-LARGEST_HALF, LARGEST_HALF).half().float()
