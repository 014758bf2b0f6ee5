"""Every benchmark runs at smoke sizes, and the harness resumes, merges and writes what it measures."""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))
import bench  # noqa: E402
import harness  # noqa: E402

REGISTRY = bench.registered()
NEED_DATA = ("rotation_stories260k", "rotation_minilm", "bit_operations", "coverage_texts", "gguf_network")
NEED_GGML = ("gguf_formats", "gguf_network")
SLOW = ("equalizers", "executors", "finetune", "formats", "matmul", "matmul_calls", "prefix", "quantizers", "resnet20_metrics")
SLOW += ("metric_accuracy", "refine_methods", "runtimes", "search", "search_samplers", "solve")
MARKED = [
    pytest.param(name, marks=[pytest.mark.data] * (name in NEED_DATA) + [pytest.mark.slow] * (name in SLOW + NEED_DATA))
    for name in REGISTRY
]


@pytest.mark.parametrize("name", MARKED)
def test_runs_at_smoke_size(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if name in NEED_DATA:
        request.getfixturevalue("data_dir")
    if name in NEED_GGML:
        pytest.importorskip("gguf", reason="needs pip install --no-deps gguf")
        pytest.importorskip("libgguf", reason="needs pip install --no-deps libgguf")
    if name == "runtimes":
        pytest.importorskip("onnxruntime")
    if name == "gguf":
        pytest.importorskip("llama_cpp")
        if "MPSEARCH_LLAMA" not in os.environ:
            pytest.skip("MPSEARCH_LLAMA names no folder that scripts/train_llama.py wrote")
    chosen = REGISTRY[name]
    rows = harness.run(chosen, chosen.points(quick=True))
    assert rows, "a smoke run measures something"
    assert all({"what", "case", "value", "unit"} <= row.keys() for row in rows)
    assert all(("rival" in row) == ("ratio" in row) == ("rival_value" in row) for row in rows)
    harness.write(chosen, rows, tmp_path)
    assert (tmp_path / "figure.png").exists() == (chosen.chart is not None)
    with (tmp_path / "rows.csv").open(newline="") as stream:
        assert [row["case"] for row in csv.DictReader(stream)] == [row["case"] for row in rows]
    assert (tmp_path / "table.md").read_text().startswith(f"# bench_{name}\n")


def test_every_benchmark_says_what_it_measures() -> None:
    assert all(chosen.text and chosen.quick for chosen in REGISTRY.values())
    for chosen in REGISTRY.values():
        assert chosen.quick.keys() <= chosen.grid.keys(), "a smoke run has no parameters of its own"


@pytest.fixture
def squares() -> harness.Benchmark:
    """A benchmark that counts its calls in `squares.measured`."""
    measured: list[int] = []

    def measure(n: int):
        """Squares."""
        measured.append(n)
        if n < 0:
            raise harness.UnavailableError("no negative numbers")
        yield {"value": float(n * n), "unit": "1", "rival": "n", "rival_value": float(n), "ratio": float(n)}

    made = harness.Benchmark("squares", measure, {"n": (1, 2, 3)}, {"n": (1,)}, {"x": "n", "y": "value", "line": "what"})
    object.__setattr__(made, "measured", measured)
    return made


def test_resumes_an_interrupted_run_and_skips_what_is_unavailable(squares: harness.Benchmark, tmp_path: Path) -> None:
    partial = tmp_path / "squares.jsonl"
    points = squares.points(chosen={"n": "1,-1,3"})
    harness.run(squares, points[:1], partial)
    rows = harness.run(squares, points, partial)
    assert squares.measured == [1, -1, 3], "the first point was measured before"
    assert [row["case"] for row in rows] == ["1", "3"]
    with pytest.raises(SystemExit, match="no parameter 'm', only n"):
        squares.points(chosen={"m": "1"})


def test_writes_a_report_and_keeps_points_that_were_not_measured_again(
    squares: harness.Benchmark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "PARTIAL", tmp_path / "partial")
    file = tmp_path / "rows.json"

    def run(*names: str) -> list[dict]:
        options = argparse.Namespace(names=names, quick=False, again=False, json=file, reports=tmp_path)
        bench.run(options, {"squares": squares})
        with (tmp_path / "bench_squares" / "rows.csv").open(newline="") as stream:
            return list(csv.DictReader(stream))

    run("squares")
    assert sorted(int(row["case"]) for row in run("squares", "n=2")) == [1, 2, 3]
    measured, machine = json.loads(file.read_text())
    assert measured["case"] == "2"
    assert machine["what"] == "machine"
    page = (tmp_path / "bench_squares" / "table.md").read_text()
    assert "| squares | 3 | 9 | 1 | n | 3 | 3 |" in page
    assert (tmp_path / "bench_squares" / "figure.png").exists()
    with pytest.raises(SystemExit, match="no benchmark 'cubes'"):
        run("cubes")


def test_interleaves_calls_and_compares_medians() -> None:
    ticks = iter(range(10_000))
    times = harness.interleaved({"ours": lambda: None, "theirs": lambda: None}, 1.0, clock=lambda: float(next(ticks)))
    assert times == {"ours": 1.0, "theirs": 1.0}
    (row,) = harness.compared({"ours": 0.002, "theirs": 0.003}, ["theirs"])
    assert row == {"case": "ours", "value": 2.0, "unit": "ms", "rival": "theirs", "rival_value": 3.0, "ratio": 1.5}


@pytest.mark.parametrize("script", ["bench.py", "bench_cuda.py"])
def test_help_loads_nothing(script: str) -> None:
    code = f"import runpy, sys; sys.argv = ['{script}', '--help']\n"
    code += f"try: runpy.run_path(r'{SCRIPTS / script}', run_name='__main__')\n"
    code += "finally: assert 'torch' not in sys.modules"
    assert "--json" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_the_cuda_benchmark_says_where_it_cannot_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench_cuda.py"])
    importlib.import_module("bench_cuda").main()
    assert "no GPU" in capsys.readouterr().out
    importlib.import_module("cuda_cases")
