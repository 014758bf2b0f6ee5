"""Freed memory goes back to the operating system."""

from pathlib import Path

import pytest
import torch

from mpsearch.memory import trim

STATUS = Path("/proc/self/status")


def anonymous_bytes():
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


@pytest.mark.skipif(not STATUS.exists(), reason="needs /proc")
def test_what_lies_between_pieces_in_use_is_given_back():
    pieces = [torch.ones(20_000) for _ in range(2000)]  # 80 kB each: too small for pages of their own
    last = pieces.pop()
    pieces.clear()
    trim()
    before = anonymous_bytes()
    again = [torch.ones(20_000) for _ in range(2000)]
    assert anonymous_bytes() - before > 10**8, "160 MB were given back, and are taken again"
    assert len(again) == 2000
    assert last[0] == 1
