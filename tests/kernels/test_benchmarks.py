"""The benchmarks' calls of compiled functions, which nothing else makes, fit the functions."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpsearch import kernels


@pytest.mark.skipif(len(kernels.available_backends()) == 1, reason="the compiled kernels are missing")
def test_the_cost_of_a_call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    import bench_matmul

    row = bench_matmul.call_cost(kernels.active_backend(), 0.001)
    assert (row["what"], row["unit"]) == ("call beyond the kernel", "us")
    assert "us of it beyond the kernel" in capsys.readouterr().out
