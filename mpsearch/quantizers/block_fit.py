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
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mpsearch.schemes.k_quant import KQuant
from mpsearch.schemes.k_quant_layout import BlockFormat

Array = npt.NDArray[np.floating[Any]]
ROWS, INDEPENDENT_ROWS = 128, 512  # without G, rows are independent
SHARE = 0.25
NEAR = np.array([[-1], [0], [1]], np.float32)  # integers about the rounded one
TINY, ONE, ZERO = np.float32(2**-126), np.float32(1), np.float32(0)
LARGEST_HALF = 65504.0


@dataclass(frozen=True)
class Quadratic:
    """a, c, A, B and C of each row, float32 `[rows]`; no minimum moves where C is 0."""

    a: Array
    c: Array
    aa: Array
    ac: Array
    cc: Array

    def linear(self, s: Array, b: Array) -> Array:
        """The part of `change` that is linear."""
        return 2 * (s * self.a - b * self.c)

    def change(self, s: Array, b: Array) -> Array:
        """Of each row's error."""
        return self.linear(s, b) + s * (self.aa * s - 2 * self.ac * b) + self.cc * b * b

    def alone(self) -> Array:
        """The change of scale that is best with the minimum as it is."""
        return -self.a / np.maximum(self.aa, TINY)

    def both(self) -> Array:
        """The change of scale that is best with its `minimum`; alone where both together are not determined."""
        determinant = self.aa * self.cc - self.ac * self.ac
        solvable = determinant > 1e-6 * self.aa * self.cc
        change: Array = (self.c * self.ac - self.a * self.cc) / np.where(solvable, determinant, ONE)
        return np.where(solvable, change, self.alone())

    def minimum(self, s: Array) -> Array:
        """The best change of the minimum after a change of the scale; 0 where C is."""
        return np.where(self.cc > 0, self.c + self.ac * s, ZERO) / np.maximum(self.cc, TINY)


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
    steps, sums = steps.clone(), (scheme.decode(codes, steps) - weight) @ hessian  # E H of all rows
    size, block = INDEPENDENT_ROWS if fisher is None else ROWS, scheme.blocks.block
    for begin in range(0, len(weight), size):
        rows = slice(begin, min(begin + size, len(weight)))
        own = None if fisher is None else fisher[rows, rows].numpy()
        targets = sums[rows].clone() if fisher is None else (fisher[rows] / fisher.diagonal()[rows, None]) @ sums
        values, numbers = scheme.values(codes[rows]), scheme.split(steps[rows]).numpy()
        for i in range(numbers.shape[1]):
            inside = slice(i * block, (i + 1) * block)
            within = hessian[inside, inside].numpy()
            tile = _Tile(scheme.blocks, values[:, inside].numpy(), numbers[:, i], targets[:, inside].numpy().copy(), within, own)
            tile.fit()
            if tile.change.any():
                moved = torch.from_numpy(tile.change) @ hessian[inside]
                sums[rows] += moved
                targets += moved if tile.feedback is None else torch.from_numpy(tile.feedback) @ moved
    return steps


@dataclass(frozen=True, eq=False)
class _Direction:
    """Numbers `[rows, 2]` (a scale and a minimum, a view) of a tile: what they multiply in some columns of the block.

    `units` `[rows, 2]` are d and dmin where the numbers are integers. A, B and C are `[rows]`.
    """

    columns: slice
    v: Array
    u: Array
    numbers: Array
    units: Array | None
    aa: Array
    ac: Array
    cc: Array


class _Tile:
    """Some rows of a block: T is `targets`, `numbers` `[rows, 2, 1 + n_groups]` are written to, `change` is that of E."""

    def __init__(
        self, blocks: BlockFormat, values: Array, numbers: Array, targets: Array, within: Array, own: Array | None
    ) -> None:
        self.blocks, self.values, self.numbers, self.targets = blocks, values, numbers, targets
        self.within, self.own, self.change = within, own, np.zeros_like(values)
        self.feedback = None if own is None else own / own.diagonal()[:, None]

    def fit(self) -> None:
        """The integers of each group, then d and dmin."""
        size, rows, has_minima = self.blocks.group, slice(0, len(self.values)), self.blocks.largest_minimum > 0
        for g in range(self.blocks.n_groups) if self.blocks.has_integers else ():
            columns = slice(g * size, (g + 1) * size)
            v = self.values[:, columns]
            self._move(rows, self._direction(columns, v, np.ones_like(v), 1 + g, self.numbers[..., 0], has_minima))
        scales, u = np.repeat(self.numbers[..., 1:], size, axis=-1).transpose(1, 0, 2)
        v = self.values * scales
        self._move(rows, self._direction(slice(0, v.shape[1]), v, u, 0, None, has_minima))

    def _direction(self, columns: slice, v: Array, u: Array, at: int, units: Array | None, has_minima: bool) -> _Direction:
        within = self.within[columns, columns]
        vh = v @ within
        uh = u @ within if has_minima else np.zeros_like(u)
        curvature = (vh * v).sum(1), (vh * u).sum(1), (uh * u).sum(1)
        return _Direction(columns, v, u, self.numbers[..., at], units, *curvature)

    def _move(self, rows: slice, to: _Direction) -> None:
        """Move the numbers of these rows, all at once or in halves."""
        v, u, t = to.v[rows], to.u[rows], self.targets[rows, to.columns]
        q = Quadratic((v * t).sum(1), (u * t).sum(1), to.aa[rows], to.ac[rows], to.cc[rows])
        old, units = to.numbers[rows], ONE if to.units is None else to.units[rows]
        new = _floats(q, old) if to.units is None else _integers(q, old, to.units[rows], self.blocks)
        s, b = ((new - old) * units).T
        if not (s.any() or b.any()):
            return
        step = v * s[:, None] - u * b[:, None]
        moved = step @ self.within[to.columns]
        if self.own is not None and len(step) > 1:
            weights, own = self.own.diagonal()[rows], self.own[rows, rows]
            together = weights @ q.linear(s, b) + (own * (step @ moved[:, to.columns].T)).sum()
            if together > SHARE * (weights @ q.change(s, b)):
                middle = (rows.start + rows.stop) // 2
                self._move(slice(rows.start, middle), to)
                self._move(slice(middle, rows.stop), to)
                return
        to.numbers[rows] = new
        self.change[rows, to.columns] += step
        if self.feedback is None:
            self.targets[rows] += moved
        else:
            self.targets += self.feedback[:, rows] @ moved


def _integers(q: Quadratic, old: Array, units: Array, blocks: BlockFormat) -> Array:
    """The best integers `[rows, 2]` near the best real numbers."""
    (low, high), largest = blocks.scales, blocks.largest_minimum
    (scale, minimum), (d, dmin) = old.T, units.T
    unit, minimum_unit = np.where(d == 0, ONE, d), np.where(dmin == 0, ONE, dmin)
    about = np.round(scale + np.where(d == 0, ZERO, q.both() / unit))
    tried = np.concatenate([scale[None], (about + NEAR).clip(low, high)])
    s, minima = d * (tried - scale), np.broadcast_to(minimum, tried.shape)
    if largest:
        minima = np.round(minimum + np.where(dmin == 0, ZERO, q.minimum(s) / minimum_unit)).clip(0, largest)
    change = q.change(s, dmin * (minima - minimum))
    best = change.argmin(0)
    rows = np.arange(len(scale))
    better = change[best, rows] < 0
    return np.stack([np.where(better, tried[best, rows], scale), np.where(better, minima[best, rows], minimum)], axis=1)


def _floats(q: Quadratic, old: Array) -> Array:
    """The best float16 numbers `[rows, 2]`: both, or one of them, moved; a scale that is not 0 stays so."""
    d, dmin = old.T
    best, best_minimum, least = d, dmin, np.zeros_like(d)
    for tried, moves in itertools.product((d, _half(d + q.alone()), _half(d + q.both())), (True, False)):
        s = tried - d
        other = _half(dmin + q.minimum(s)) if moves else dmin
        change = q.change(s, other - dmin)
        better = (change < least) & ((tried != 0) | (d == 0))
        least = np.where(better, change, least)
        best, best_minimum = np.where(better, tried, best), np.where(better, other, best_minimum)
    return np.stack([best, best_minimum], axis=1)


def _half(x: npt.NDArray[Any]) -> Array:
    return np.clip(x, -LARGEST_HALF, LARGEST_HALF).astype(np.float16).astype(np.float32)
