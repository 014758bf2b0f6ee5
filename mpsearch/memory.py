"""Memory that was freed goes back to the operating system."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def trim() -> None:
    """Give back what the C library keeps of freed memory: between pieces that are in use it would stay, some hundred MB."""
    _malloc_trim()(0)


@functools.cache
def _malloc_trim() -> Callable[[int], object]:
    """glibc's function; one that does nothing where the C library is another."""
    return getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)
