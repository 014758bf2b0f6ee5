"""Values in memory up to a limit of bytes: the ones that were asked for last."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

V = TypeVar("V")


class Recent(Generic[V]):
    """Values by key; the one that was not asked for the longest goes first where they are more than `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.n_bytes = max_bytes, 0
        self._kept: OrderedDict[Hashable, tuple[V, int]] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def get(self, key: Hashable) -> V | None:
        """The value; `None` where it is not kept."""
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key][0]

    def put(self, key: Hashable, value: V, n_bytes: int) -> V:
        """Keep a new value of so many bytes, as far as the limit allows; returns it."""
        self._kept[key] = value, n_bytes
        self.n_bytes += n_bytes
        while self.n_bytes > self.max_bytes and self._kept:
            self.n_bytes -= self._kept.popitem(last=False)[1][1]
        return value

    def clear(self) -> None:
        """Let go of all."""
        self._kept.clear()
        self.n_bytes = 0
