"""Rounding rows jointly in plain PyTorch: the specification that every compiled backend equals bit for bit.

All arithmetic is float32, each operation rounded by itself, rounding to integers is half to even, every sum starts with what is
there and takes its terms one by one in ascending order. R and F are the feedbacks of rows and columns, value = code - zero (0
where fixed), e = value * scale - weight, and S[r, j] the sum of e[r, i] * F[j, i] over i; S and e are 0 where there are no codes
yet.

Rows are taken in tiles of `ROWS`. Of a tile, C[r, j] is the sum of R[r, s] * S[s, j] over the rows s of the other tiles (without
codes: of those before). Where scales are fitted, its groups follow in ascending order: with T[r, j] = C[r, j] + the terms
R[r, s] * S[s, j] of the tile's rows s, P[r, j] = sum of value[r, i] * F[j, i] over the group's columns i, and w the column
weights,

    slope[r]   = sum over j of (value[r, j] * T[r, j]) * w[j]       norm[r, s] = sum over j of (value[r, j] * w[j]) * P[s, j]

its rows s take in turn, unless their scale is 0 or norm[s, s] is not above 0,

    step       = stored(scale[s] - slope[s] / norm[s, s]) - scale[s]       slope[r] += (R[r, s] * step) * norm[r, s]

then S[r, j] += P[r, j] * step[r] for the group's columns j, and for the others the terms d[r, i] * F[j, i], d being the change
of e. Then come the columns, in blocks of `COLUMNS`. Of a block, S of the tile first takes the terms d[r, i] * F[j, i] of the
columns i before it, d being their changes by rounding; T is as above, from the new S. The block's columns j, and of each the rows
r, take in turn, q[j, r] being 0 at first,

    code       = rint(clamp(((weight + e) - (T[r, j] + q[j, r])) * inverse + zero, 0, 2**bits - 1))
    change     = ((code - zero) * scale - weight) - e     unless fixed, or the code is what it was
    q[j, s]   += R[s, r] * change     for all rows s of the tile

with inverse = 1 / scale, or 0 where |scale| is below 2**-126; then T[s, l] += q[j, s] * F[l, j] for the block's later columns l.
Last, S takes the terms of the columns that it lacks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpsearch.kernels.reference import SMALLEST_NORMAL

ROWS, COLUMNS = 32, 64


def round_jointly(
    weight: Tensor,  # [rows, columns] float32
    row_feedback: Tensor,  # [rows, rows] float32
    column_feedback: Tensor,  # [columns, columns] float32
    scales: Tensor,  # [rows, n_groups] float16 or float32
    zero_points: Tensor,  # [rows, n_groups] float32
    column_groups: Tensor,  # [columns] int32
    bits: int,
    codes: Tensor | None,  # [rows, columns] uint8
    fixed: Tensor | None,  # [rows, columns] bool
    n_passes: int,
    n_fits: int,
    column_weights: Tensor | None,  # [columns] float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 `[rows, columns]`, scales, the number of codes that each pass changed int64 `[n_passes]`."""
    descent = _Descent(weight, row_feedback, column_feedback, scales, zero_points, column_groups.long(), bits, codes, fixed)
    n_changed = torch.zeros(n_passes, dtype=torch.int64)
    for i in range(n_passes):
        fitted = False
        for begin in range(0, len(weight), ROWS):
            tile = slice(begin, min(begin + ROWS, len(weight)))
            coupled = descent.coupled(tile)
            if i < n_fits and column_weights is not None:
                fitted = descent.fit(tile, coupled, column_weights) or fitted
            n_changed[i] += descent.round(tile, coupled)
        if not n_changed[i] and not fitted:
            break
    return descent.codes.clamp(min=0).to(torch.uint8), descent.scales.to(scales.dtype), n_changed


class _Descent:
    """The state of the rows: codes, scales, errors and sums."""

    def __init__(
        self,
        weight: Tensor,
        row_feedback: Tensor,
        column_feedback: Tensor,
        scales: Tensor,
        zero_points: Tensor,
        groups: Tensor,
        bits: int,
        codes: Tensor | None,
        fixed: Tensor | None,
    ) -> None:
        self.weight, self.rows, self.columns, self.zeros = weight, row_feedback, column_feedback, zero_points
        self.groups, self.bits, self.begin, self.dtype = groups, bits, codes is None, scales.dtype
        self.fixed = torch.zeros_like(weight, dtype=torch.bool) if fixed is None else fixed
        self.scales = scales.float().clone()
        self.codes = torch.full_like(weight, -1.0) if codes is None else codes.float()
        self.errors, self.sums = torch.zeros_like(weight), torch.zeros_like(weight)
        if codes is not None:
            self.errors = self.values(slice(None)) * self.scales[:, groups] - weight
            self.add(self.sums, self.errors, range(len(groups)), slice(None))

    def values(self, tile: slice) -> Tensor:
        """Codes without their scales."""
        return (self.codes[tile] - self.zeros[tile][:, self.groups]).masked_fill(self.fixed[tile], 0.0)

    def add(self, sums: Tensor, terms: Tensor, columns: range, to: slice) -> None:
        """Add terms[:, i] * F[j, i] to sums[:, j] for columns j in `to`."""
        for i in columns:
            sums[:, to] += terms[:, i, None] * self.columns[to, i]

    def coupled(self, tile: slice) -> Tensor:
        """C of a tile."""
        total = torch.zeros_like(self.weight[tile])
        for s in range(tile.start if self.begin else len(self.weight)):
            if not tile.start <= s < tile.stop:
                total += self.rows[tile, s, None] * self.sums[s]
        return total

    def targets(self, tile: slice, coupled: Tensor, columns: slice) -> Tensor:
        """T of a tile's columns."""
        total = coupled[:, columns].clone()
        for s in range(tile.start, tile.stop):
            total += self.rows[tile, s, None] * self.sums[s, columns]
        return total

    def fit(self, tile: slice, coupled: Tensor, weights: Tensor) -> bool:
        """Move the scales of a tile; whether one has moved."""
        any_moved = False
        n, largest = tile.stop - tile.start, torch.finfo(self.dtype).max
        for group in self.groups.unique().tolist():
            inside = (self.groups == group).nonzero().flatten()
            columns = slice(int(inside[0]), int(inside[-1]) + 1)
            target, value = self.targets(tile, coupled, columns), self.values(tile)
            product = torch.zeros_like(value)
            self.add(product, value, range(columns.start, columns.stop), columns)
            slope, norm = torch.zeros(n), torch.zeros(n, n)
            for j in range(columns.start, columns.stop):
                slope += (value[:, j] * target[:, j - columns.start]) * weights[j]
                norm += (value[:, j] * weights[j])[:, None] * product[:, j]
            scale, steps = self.scales[tile, group], torch.zeros(n)
            for s in range(n):
                if scale[s] == 0 or not norm[s, s] > 0:
                    continue
                moved = (scale[s] - slope[s] / norm[s, s]).clamp(-largest, largest).to(self.dtype).float()
                steps[s] = moved - scale[s]
                scale[s] = moved
                slope += (self.rows[tile, tile.start + s] * steps[s]) * norm[:, s]
            if steps.any():
                any_moved = True
                change = torch.zeros_like(value)
                error = value[:, columns] * scale[:, None] - self.weight[tile, columns]
                change[:, columns] = error - self.errors[tile, columns]
                self.errors[tile, columns] = error
                self.sums[tile, columns] += product[:, columns] * steps[:, None]
                for others in (slice(0, columns.start), slice(columns.stop, None)):
                    self.add(self.sums[tile], change, range(columns.start, columns.stop), others)
        return any_moved

    def round(self, tile: slice, coupled: Tensor) -> int:
        """Move the codes of a tile; how many changed."""
        changes, n_columns = torch.zeros_like(self.weight[tile]), self.weight.shape[1]
        n_changed = 0
        for begin in range(0, n_columns, COLUMNS):
            block = slice(begin, min(begin + COLUMNS, n_columns))
            self.add(self.sums[tile], changes, range(begin), block)
            target = self.targets(tile, coupled, block)
            for j in range(begin, block.stop):
                q, count = self.round_column(tile, j, target[:, j - begin], changes[:, j])
                n_changed += count
                target[:, j + 1 - begin :] += q[:, None] * self.columns[j + 1 : block.stop, j]
        for begin in range(0, n_columns, COLUMNS):
            block = slice(begin, min(begin + COLUMNS, n_columns))
            self.add(self.sums[tile], changes, range(begin, n_columns), block)
        return n_changed

    def round_column(self, tile: slice, j: int, target: Tensor, changes: Tensor) -> tuple[Tensor, int]:
        """Move the codes of a column of a tile; what this does to the tile's targets, and how many changed."""
        q, n_changed, group = torch.zeros(len(target)), 0, int(self.groups[j])
        for r in range(len(target)):
            row = tile.start + r
            if self.fixed[row, j]:
                continue
            scale, zero = self.scales[row, group], self.zeros[row, group]
            weight, error = self.weight[row, j], self.errors[row, j]
            inverse = torch.where(scale.abs() < SMALLEST_NORMAL, 0.0, 1.0 / scale)
            position = ((weight + error) - (target[r] + q[r])) * inverse + zero
            code = position.clamp(0, 2**self.bits - 1).round()
            if code != self.codes[row, j]:
                new = (code - zero) * scale - weight
                changes[r] = new - error
                self.codes[row, j], self.errors[row, j] = code, new
                q += self.rows[tile, row] * changes[r]
                n_changed += 1
        return q, n_changed
