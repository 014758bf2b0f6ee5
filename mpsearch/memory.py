"""The memory of this process: how much it holds, and freed memory given back to the operating system."""

from __future__ import annotations

import ctypes
import functools
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

STATUS = Path("/proc/self/status")
WATCH_EVERY_SECONDS = 0.5
TRIM_BYTES, TRIM_EVERY_SECONDS = 2**27, 1.0  # memory that is taken again costs time; so much more of it is looked through


def anonymous_bytes() -> int | None:
    """What is in memory and not part of a mapped file, which could be read again; `None` where the system does not say."""
    try:
        held = re.search(r"^RssAnon:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if held is None else 1024 * int(held[1])


@contextmanager
def watched(see: Callable[[int], None]) -> Iterator[None]:
    """While the block runs, call `see` with `anonymous_bytes` now and then, and `trim` where it grows; in a thread of its own."""
    stop = threading.Event()

    def watch() -> None:
        least, last = anonymous_bytes() or 0, time.monotonic()
        while (held := anonymous_bytes()) is not None:
            see(held)
            least = min(least, held)
            if held > least + TRIM_BYTES and time.monotonic() > last + TRIM_EVERY_SECONDS:
                trim()
                least, last = anonymous_bytes() or 0, time.monotonic()
            if stop.wait(WATCH_EVERY_SECONDS):
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def trim() -> None:
    """Give back what the C library keeps of freed memory: between pieces that are in use it would stay, some hundred MB."""
    _malloc_trim()(0)


@functools.cache
def _malloc_trim() -> Callable[[int], object]:
    """glibc's function; one that does nothing where the C library is another."""
    return getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)
