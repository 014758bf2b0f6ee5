"""Freed memory goes back to the operating system, also on its own while a run is watched."""

import time

import pytest
import torch

from mpsearch import memory
from mpsearch.memory import anonymous_bytes, trim, watched

pytestmark = pytest.mark.skipif(anonymous_bytes() is None, reason="the system does not say how much memory a process holds")


def free_between_pieces_in_use():
    """160 MB that the C library keeps, below a piece that stays."""
    pieces = [torch.ones(20_000) for _ in range(2000)]  # 80 kB each: too small for pages of their own
    return pieces.pop()


def test_what_lies_between_pieces_in_use_is_given_back():
    last = free_between_pieces_in_use()
    trim()
    before = anonymous_bytes()
    again = [torch.ones(20_000) for _ in range(2000)]
    assert anonymous_bytes() - before > 10**8, "160 MB were given back, and are taken again"
    assert len(again) == 2000
    assert last[0] == 1


def test_it_is_given_back_while_a_run_is_watched(monkeypatch):
    monkeypatch.setattr(memory, "WATCH_EVERY_SECONDS", 0.01)
    monkeypatch.setattr(memory, "TRIM_EVERY_SECONDS", 0.0)
    trim()
    before, seen = anonymous_bytes(), []
    with watched(seen.append):
        last = free_between_pieces_in_use()
        large = torch.ones(50_000_000)  # 200 MB
        end = time.monotonic() + 20
        while anonymous_bytes() > before + 260 * 10**6 and time.monotonic() < end:
            time.sleep(0.02)
        assert anonymous_bytes() <= before + 260 * 10**6, "of 360 MB"
    assert max(seen) >= before
    assert last[0] == large[0] == 1
