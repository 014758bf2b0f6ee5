"""The groups of a weight: a matrix `[rows, columns]`, one row an output channel, cut along the rows into groups of columns."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from mpsearch.errors import InputError

GroupSize = int | Literal["channel", "tensor"]


def check_group_size(group_size: object) -> None:
    """`InputError` for anything but a whole number from 1, "channel" or "tensor"."""
    whole = isinstance(group_size, int) and not isinstance(group_size, bool) and group_size >= 1
    if not whole and group_size not in ("channel", "tensor"):
        raise InputError(f"group_size is a whole number of weights from 1, 'channel' or 'tensor'; {group_size!r} came.")


def grid_of(shape: tuple[int, ...], group_size: GroupSize) -> tuple[int, int, int]:
    """(rows, columns, group size) of the matrix that is quantized: one row for the whole tensor, else one a channel.

    The last group of a row may be shorter; a row with fewer columns than a group is one group.
    """
    numel = math.prod(shape)
    if group_size == "tensor":
        return (1, numel, max(numel, 1))
    rows = shape[0]
    columns = numel // rows if rows else 0
    return (rows, columns, max(columns, 1) if group_size == "channel" else int(group_size))


def importance_of(importance: Tensor | None, shape: tuple[int, ...], group_size: GroupSize) -> Tensor | None:
    """What weighs the errors of that matrix, of `[k, columns]` that is each channel's: one row for the whole tensor."""
    if importance is None or group_size != "tensor":
        return importance
    return importance.repeat_interleave(shape[0] // importance.shape[0], dim=0).reshape(1, -1)


def each_of(group_size: GroupSize) -> str:
    """For people: "a channel", "a tensor", "for 64 weights"."""
    return {"channel": "a channel", "tensor": "a tensor"}.get(str(group_size), f"for {group_size} weights")
