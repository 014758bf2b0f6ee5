"""Schemes with one code per weight and one scale per group of weights, and schemes that store such a tensor with additions.

A weight is a matrix `[rows, columns]`, one row per output channel, whose rows are divided into groups of columns.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.schemes.base import Layout, QuantScheme, scheme_from_fields
from mpsearch.schemes.histogram import Histogram
from mpsearch.schemes.input import InputFormat
from mpsearch.schemes.level_input import input_from

GroupSize = int | Literal["channel", "tensor"]


class DenseScheme(QuantScheme):
    """Base of `Integer` and `Codebook`: codes, and scales of the granularity `group_size`."""

    group_size: GroupSize
    symmetric: bool
    input: InputFormat | None

    def __post_init__(self) -> None:
        object.__setattr__(self, "input", input_from(self.input))
        size = self.group_size
        if size not in ("channel", "tensor") and (type(size) is not int or size < 1):
            raise InputError(f"group_size must be a number of weights from 1, 'channel' or 'tensor'; got {size!r}.")

    @property
    def input_format(self) -> InputFormat | None:
        """`input`."""
        return self.input

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """(rows, columns, group size) of the matrix that is quantized: one row for the whole tensor, else one per channel.

        The last group of a row may be shorter; a row with fewer columns than a group is one group.
        """
        numel = math.prod(shape)
        if self.group_size == "tensor":
            return 1, numel, max(numel, 1)
        rows = shape[0]
        columns = numel // rows if rows else 0
        return rows, columns, max(columns, 1) if self.group_size == "channel" else int(self.group_size)

    def _dense_layout(self, shape: tuple[int, ...], n_bytes: int, scales: torch.dtype, others: Layout) -> Layout:
        """`n_bytes` of codes, a scale per group, `others`, and the static range of the input."""
        rows, columns, group_size = self.grid(shape)
        layout = {"codes": (torch.uint8, (n_bytes,)), "scales": (scales, (rows, -(-columns // group_size)))}
        return {**layout, **others, **(self.input.layout if self.input else {})}

    def _matrix(self, weight: Tensor, importance: Tensor | None) -> tuple[Tensor, int, Tensor | None]:
        """The matrix that is quantized, its group size, and its importance: one row for the whole tensor."""
        rows, columns, group_size = self.grid(tuple(weight.shape))
        if importance is not None and self.group_size == "tensor":
            importance = importance.repeat_interleave(weight.shape[0] // importance.shape[0], dim=0).reshape(1, -1)
        return weight.reshape(rows, columns).contiguous(), group_size, importance

    def _input_params(self, histogram: Histogram | None) -> dict[str, Tensor]:
        return {} if self.input is None else self.input.stored(histogram)

    def _describe(self, codes: str, scale: str) -> str:
        size = self.group_size
        scales = f"per-{size} {scale} scale" if isinstance(size, str) else f"{scale} scale per {size} weights"
        return f"{codes}, {scales}" + (f"; {self.input.describe()}" if self.input else "")


@dataclass(frozen=True)
class WrappedScheme(QuantScheme):
    """Base of schemes that store a tensor of the scheme `dense`, an `Integer` or a `Codebook`, with additions."""

    dense: DenseScheme

    def __post_init__(self) -> None:
        if isinstance(self.dense, Mapping):  # from `fields`
            object.__setattr__(self, "dense", scheme_from_fields(self.dense))
        if not isinstance(self.dense, DenseScheme):
            raise InputError(f"dense must be an Integer or a Codebook; got {self.dense!r}.")

    @property
    def weight_bits(self) -> int:
        """Those of `dense`."""
        return self.dense.weight_bits

    @property
    def input_format(self) -> InputFormat | None:
        """That of `dense`."""
        return self.dense.input_format

    def fields(self) -> dict[str, Any]:
        """With the fields of `dense` and its class name."""
        return {"class": type(self).__name__, **dataclasses.asdict(self), "dense": self.dense.fields()}
