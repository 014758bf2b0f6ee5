"""Choosing backends, threads and forks, and what happens where the compiled module is missing."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from mpsearch import kernels
from mpsearch.errors import InputError
from mpsearch.kernels import backends, cuda_backend, reference

HOW = {"bits": 3, "group_size": 64, "symmetric": False}
RATIOS = torch.linspace(1, 0.4, 13)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_names() -> None:
    assert kernels.available_backends()[0] == "reference"
    assert kernels.active_backend() == kernels.available_backends()[-1]
    with kernels.use_backend("reference"):
        assert kernels.active_backend() == "reference"
    with (
        pytest.raises(InputError, match=r"The kernel backend must be one of reference.*; got 'sse9'"),
        kernels.use_backend("sse9"),
    ):
        pass
    assert kernels.active_backend() == kernels.available_backends()[-1]


@pytest.mark.parametrize("backend", kernels.available_backends())
def test_thread_counts_agree(backend: str, threads) -> None:
    torch.manual_seed(0)
    rows = 7 if backend == "reference" else 301
    weight = torch.randn(rows, 1003)
    results = []
    with kernels.use_backend(backend):
        for n in (1, 2, 5):
            threads(n)
            codes, scales, zero_points = kernels.quantize(weight, ratios=RATIOS, **HOW)
            packed = kernels.pack(codes, 3)
            restored = kernels.dequantize(packed, scales, zero_points, bits=3, rows=rows, columns=1003, group_size=64)
            results.append((codes, scales, zero_points, packed, restored, kernels.unpack(packed, 3, codes.numel())))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_large_outputs_written_past_the_caches(threads) -> None:
    """Above 32 MB the kernels stream their stores; rows of an odd length leave most groups unaligned."""
    threads(2)
    torch.manual_seed(0)
    for columns in (2049, 2048):
        weight = torch.randn(4200, columns)
        codes, scales, zero_points = kernels.quantize(weight, **HOW)
        restored = kernels.dequantize(
            kernels.pack(codes, 3), scales, zero_points, bits=3, rows=4200, columns=columns, group_size=64
        )
        assert torch.equal(restored, reference.dequantize_codes(codes, scales, zero_points, 3, 64))
        for part in (slice(50), slice(-50, None)):
            found = kernels.quantize(weight[part], **HOW)
            assert all(torch.equal(a, b[part]) for a, b in zip(found, (codes, scales, zero_points), strict=True))


def test_calls_from_several_python_threads(threads) -> None:
    threads(2)
    torch.manual_seed(0)
    weights = [torch.randn(100 + i, 700) for i in range(8)]
    expected = [kernels.quantize(w, ratios=RATIOS, **HOW)[0] for w in weights]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            got = list(pool.map(lambda w: kernels.quantize(w, ratios=RATIOS, **HOW)[0], weights))
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def _bytes_of(weight: torch.Tensor) -> bytes:
    return kernels.quantize(weight, ratios=RATIOS, **HOW)[0].numpy().tobytes()


def _send_bytes(weight: torch.Tensor, queue) -> None:
    queue.put(_bytes_of(weight))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_starts_its_own_workers(threads) -> None:
    threads(2)
    torch.manual_seed(0)
    weight = torch.randn(200, 700)
    expected = _bytes_of(weight)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_send_bytes, args=(weight, queue))
    child.start()
    try:
        assert queue.get(timeout=60) == expected
    finally:
        child.join(10)
        child.kill()


FORK = """
import os, time, torch, mpsearch.kernels as k
torch.set_num_threads(2)
weight, importance = torch.randn(512, 512), torch.rand(512, 512)
def call(): return k.quantize(weight, bits=4, group_size=64, symmetric=True, ratios=torch.ones(1), importance=importance)[0]
(weight + 1).sum()  # starts OpenMP's threads
codes, child = call(), os.fork()
if child == 0:
    os._exit(0 if torch.equal(call(), codes) else 1)
for _ in range(1000):
    ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
        raise SystemExit(os.waitstatus_to_exitcode(status))
    time.sleep(0.01)
os.kill(child, 9)
raise SystemExit("the child hangs")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_operators_of_pytorch_do_not_hang_in_a_forked_child() -> None:
    """The range of `importance` is found by PyTorch, on OpenMP's threads, which a fork does not copy."""
    run = run_python(FORK, OMP_NUM_THREADS="2")
    assert run.returncode == 0, run.stderr


def test_gradients_are_not_followed() -> None:
    weight = torch.randn(4, 64, requires_grad=True)
    assert not kernels.quantize(weight, **HOW)[1].requires_grad
    with kernels.use_backend("reference"):
        assert not kernels.quantize(weight, **HOW)[1].requires_grad


BLOCK_COMPILED = "import sys; sys.modules['mpsearch.kernels._cpu'] = None\n"
USE = "import torch, mpsearch.kernels as k; how = dict(bits=4, group_size=4, symmetric=True)\n"


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MPSEARCH_REQUIRE_KERNELS": "", **environment},
        capture_output=True,
        text=True,
    )


def test_missing_kernels_warn_once_at_first_use() -> None:
    call = "k.quantize(torch.ones(2, 8), **how)\n"
    asked_for = "with k.use_backend('reference'): " + call + "print('no warning yet', file=sys.stderr)\n"
    run = run_python(BLOCK_COMPILED + USE + "print(k.available_backends())\n" + asked_for + 2 * call)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "('reference',)\n"
    quiet, _, warned = run.stderr.partition("no warning yet")
    assert quiet == ""
    assert warned.count("UserWarning: mpsearch's compiled kernels are missing") == 1


def test_missing_kernels_are_an_error_where_required() -> None:
    run = run_python(BLOCK_COMPILED + USE, MPSEARCH_REQUIRE_KERNELS="1")
    assert run.returncode != 0
    assert "ImportError: The compiled kernels are missing" in run.stderr


def test_missing_cuda_kernels_warn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    on_gpu = SimpleNamespace(is_cpu=False, is_cuda=True, device=torch.device("cuda"))
    monkeypatch.setattr(cuda_backend, "library", None)
    monkeypatch.setattr(cuda_backend, "missing", "they were not built")
    backends.warn_missing_cuda.cache_clear()
    with kernels.use_backend("reference"):  # asked for: no warning
        assert backends.backend_of(on_gpu) == "reference"
    with pytest.warns(UserWarning, match=r"mpsearch's CUDA kernels are missing \(they were not built\)"):
        assert backends.backend_of(on_gpu) == "reference"
    assert backends.backend_of(on_gpu) == "reference"  # a second warning would be an error here


def test_a_cuda_library_without_a_driver_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Built or not, without a GPU there is a reason and no library."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(cuda_backend, "library", None)
    monkeypatch.setattr(cuda_backend, "missing", None)
    assert not cuda_backend.takes(SimpleNamespace(is_cuda=True, device=torch.device("cuda")))
    assert cuda_backend.library is None
    assert cuda_backend.missing
