"""Size, in three units of the same bits: codes, scales, zero points and padding; tied weights count once."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mpsearch.allocation import SearchSpace
from mpsearch.costs.base import Cost, CostTable
from mpsearch.errors import InputError

UNITS = {"": 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def parse_bytes(text: str | float) -> int:
    """120000, "120kB", "1.5 MB" or "512KiB" as bytes."""
    match = re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*", str(text))
    try:
        if match is None:
            raise ValueError
        return int(float(match[1]) * UNITS[match[2]])
    except (ValueError, KeyError, OverflowError):
        raise InputError(f"'{text}' is not a size. Give bytes, or a number with one of {', '.join(list(UNITS)[1:])}.") from None


@dataclass(frozen=True)
class Bytes(Cost):
    """`size_bytes`: all parameters and buffers as stored, also those that stay float."""

    name = "bytes"
    column = "size_bytes"

    def table(self, space: SearchSpace) -> CostTable:
        """Bytes of each group in each scheme; everything else is the constant."""
        return CostTable(self.name, self.column, space.storage_bits / 8, space.other_bits / 8)

    def parse(self, text: str | float) -> float:
        """Bytes, with or without a unit."""
        return float(parse_bytes(text))


@dataclass(frozen=True)
class AverageBits(Cost):
    """`average_bits`: bits of the searched layers per weight, scales and padding included."""

    name = "bits"
    column = "average_bits"

    def table(self, space: SearchSpace) -> CostTable:
        """Each group's share of the average."""
        return CostTable(self.name, self.column, space.storage_bits / space.numel, 0.0)


@dataclass(frozen=True)
class Fraction(Cost):
    """`fraction`: `size_bytes` over the same model's in float32."""

    name = "fraction"
    column = "fraction"

    def table(self, space: SearchSpace) -> CostTable:
        """Each group's share of the float32 size."""
        whole = space.size_bits()
        return CostTable(self.name, self.column, space.storage_bits / whole, space.other_bits / whole)

    def parse(self, text: str | float) -> float:
        """See `Cost.parse`; `InputError` above 1."""
        limit = super().parse(text)
        if limit > 1:
            raise InputError(f"budget.fraction must be at most 1, the size in float32; got {text}. For 12 % give 0.12.")
        return limit
