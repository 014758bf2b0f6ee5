"""Times the products with packed weights against PyTorch's, ONNX Runtime's and ggml's, interleaved in this process.

    python scripts/bench_matmul.py [--json FILE] [--size 4096] [--tokens 1 4 16 64 256] [--threads 1 2] [--seconds 0.3]

A Linear layer [size, size], groups of 128, asymmetric, float16 scales, 1 to 8 bits, with float32 input (`w4`) and with the input
quantized to int8 (`w4a8`). Every call is timed alone, in shuffled order, on the next of several copies of its weight (80 MB or
more of them together, so that weights come from memory); the figure is the lower quartile. GB/s are of packed weights, beside
the rate at which a dot product reads memory. Then, for one token: the peers that `matmul_peers.py` finds; small layers, whose
weight stays in the caches, calls included; what a call costs beyond its kernel; two threads while another process keeps a core
busy; and packing beside a copy of the float32 weight. A ratio above 1 says that the kernels are faster.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import matmul_peers
import torch
import torch.nn.functional as F
from torch import Tensor

from mpsearch import kernels
from mpsearch.kernels import products
from mpsearch.kernels.backends import compiled

GROUP_SIZE = 128
COLD_BYTES = 80_000_000
FLOAT, INT8, READ = "torch float32", "torch dynamic int8", "read"
HOT_SHAPES = [(1536, 384), (2304, 768), (3072, 768)]  # of vision transformers
Row = dict[str, object]


@dataclass
class Candidate:
    """A product: `run(x, i)` multiplies by copy i of a weight of `n_bytes`."""

    run: Callable[[Tensor, int], object]
    n_bytes: int


def cold(n_bytes: float) -> int:
    return int(COLD_BYTES // n_bytes) + 1


def hot(n_bytes: float) -> int:
    return 1


def packed_candidates(weight: Tensor, copies_of: Callable[[float], int]) -> dict[str, Candidate]:
    candidates = {}
    for bits in range(1, 9):
        quantized = kernels.quantize(weight, bits=bits, group_size=GROUP_SIZE, symmetric=False)
        first = kernels.pack_weight(*quantized, bits=bits, group_size=GROUP_SIZE)
        copies = [first]
        while len(copies) < copies_of(first.nbytes):
            copies.append(kernels.pack_weight(*quantized, bits=bits, group_size=GROUP_SIZE))
        for suffix, product in {"": kernels.linear, "a8": kernels.linear_a8}.items():
            candidates[f"w{bits}{suffix}"] = Candidate(
                lambda x, i, product=product, copies=copies: product(x, copies[i % len(copies)]), first.nbytes
            )
    return candidates


def rivals(weight: Tensor, copies_of: Callable[[float], int]) -> dict[str, Candidate]:
    floats = [weight.clone() for _ in range(copies_of(4 * weight.numel()))]
    scale = float(weight.abs().max()) / 127
    warnings.filterwarnings("ignore", message="torch.quantize_per_tensor")  # deprecated; the product is what is measured
    quantized = torch.quantize_per_tensor(weight, scale, 0, torch.qint8)
    int8 = [torch.ops.quantized.linear_prepack(quantized, None) for _ in range(copies_of(weight.numel()))]
    flat = torch.cat([copy.flatten() for copy in floats])
    return {
        FLOAT: Candidate(lambda x, i: F.linear(x, floats[i % len(floats)]), 4 * weight.numel()),
        INT8: Candidate(lambda x, i: torch.ops.quantized.linear_dynamic(x, int8[i % len(int8)]), weight.numel()),
        READ: Candidate(lambda x, i: torch.dot(flat, flat), 4 * flat.numel()),
    }


def timed(candidate: Candidate, x: Tensor, i: int) -> float:
    begin = time.perf_counter()
    candidate.run(x, i)
    return time.perf_counter() - begin


def measure(candidates: dict[str, Candidate], x: Tensor, seconds: float) -> dict[str, float]:
    """The lower quartile of each candidate's calls, which take about `seconds` each together."""
    calls = []
    for name, candidate in candidates.items():
        once = min(timed(candidate, x, i) for i in range(2))
        calls += [name] * min(max(int(seconds / once), 5), 200)
    random.Random(0).shuffle(calls)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for name in calls:
        times[name].append(timed(candidates[name], x, len(times[name])))
    return {name: statistics.quantiles(taken, n=4)[0] for name, taken in times.items()}


def peer_candidates(weight: Tensor, x: Tensor, copies_of: Callable[[float], int], n_threads: int) -> dict[str, Candidate]:
    """The peers' products, each seen to be one."""
    y, candidates = F.linear(x, weight), {}
    for name, run in matmul_peers.peers(weight, x, copies_of, n_threads).items():
        error = float((run(0).reshape(y.shape) - y).norm() / y.norm())
        if not error < 1:
            raise SystemExit(f"{name} is {error:.2f} of the product off it: not the same product.")
        candidates[name] = Candidate(lambda x, i, run=run: run(i), weight.numel())
    return candidates


def against_peers(weight: Tensor, case: str, copies_of: Callable[[float], int], n_threads: int, seconds: float) -> list[Row]:
    """One token: each peer beside our product of as many bits with int8 input, and the whole row of widths."""
    x = torch.randn(1, weight.shape[1])
    ours = {name: of for name, of in packed_candidates(weight, copies_of).items() if name.endswith("a8")}
    theirs = {name: of for name, of in rivals(weight, copies_of).items() if name != READ}
    theirs |= peer_candidates(weight, x, copies_of, n_threads)
    times = measure(ours | theirs, x, seconds)
    print(f"\n{case}: " + ", ".join(f"{name} {1e6 * times[name]:.1f} us" for name in ours))
    rows = []
    for name in theirs:
        bits = matmul_peers.BITS.get(name, 4)
        taken = times[f"w{bits}a8"]
        print(f"{name:<22}{1e6 * times[name]:>9.1f} us    {times[name] / taken:>6.2f} x w{bits}a8", flush=True)
        row = {"what": "time", "case": f"w{bits}a8, 1 token, {case}", "value": 1e6 * taken, "unit": "us"}
        rows.append({**row, "rival": name, "rival_value": 1e6 * times[name], "ratio": times[name] / taken})
    return rows


def call_cost(backend: str, seconds: float) -> Row:
    """What `linear_a8` takes beyond the compiled function that it calls, on a small layer."""
    rows, columns = HOT_SHAPES[0]
    weight, x = torch.randn(rows, columns), torch.randn(1, columns)
    packed = kernels.pack_weight(
        *kernels.quantize(weight, bits=4, group_size=GROUP_SIZE, symmetric=False), bits=4, group_size=GROUP_SIZE
    )
    with kernels.use_backend(backend), mock.patch.object(products, "compiled") as recorder:
        y = kernels.linear_a8(x, packed)  # kept: its address is one of the arguments
    arguments = recorder.linear.call_args.args
    both = {
        "call": Candidate(lambda x, i: [kernels.linear_a8(x, packed) for _ in range(20)], 1),
        "kernel": Candidate(lambda x, i: [compiled.linear(*arguments) for _ in range(20)], 1),
    }
    times = {name: 1e6 * taken / 20 for name, taken in measure(both, x, seconds).items()}
    assert y.isfinite().all()
    over = times["call"] - times["kernel"]
    print(f"\na call of w4a8, [{rows}, {columns}], 1 token: {times['call']:.1f} us, {over:.1f} us of it beyond the kernel")
    return {"what": "call beyond the kernel", "case": f"w4a8, [{rows}, {columns}]", "value": over, "unit": "us"}


def beside_a_busy_process(weight: Tensor) -> list[Row]:
    """Slow calls (95th percentile) on 2 threads while another process keeps a core busy, by the quiet 1-thread median."""
    x, rows = torch.randn(1, weight.shape[1]), []
    candidates = packed_candidates(weight, cold) | {INT8: rivals(weight, cold)[INT8]}
    names = ("w2a8", "w4a8", "w8a8", INT8)

    def calls(name: str) -> list[float]:
        return [timed(candidates[name], x, i) for i in range(400)]

    torch.set_num_threads(1)
    quiet = {name: statistics.median(calls(name)) for name in names}
    torch.set_num_threads(2)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        time.sleep(0.5)
        slow = {name: statistics.quantiles(calls(name), n=20)[-1] for name in names}
        torch.set_num_threads(1)
        alone = {name: statistics.quantiles(calls(name), n=20)[-1] for name in names}
        busy.kill()
    for name in names:
        ratio = slow[name] / quiet[name]
        print(
            f"{name}: beside a busy process p95 {1e3 * slow[name]:.3f} ms on 2 threads, {1e3 * alone[name]:.3f} on 1; "
            f"{ratio:.2f} of the quiet median on 1, {1e3 * quiet[name]:.3f}"
        )
        row = {"what": "p95, 2 threads, a core busy", "case": name, "value": 1e3 * slow[name], "unit": "ms"}
        rows.append({**row, "rival": "quiet median, 1 thread", "rival_value": 1e3 * quiet[name], "ratio": 1 / ratio})
    return rows


def packing(seconds: float) -> list[Row]:
    """Packing and unpacking [4096, 11008] codes beside copying the float32 weight, 180 MB."""
    weight = torch.randn(4096, 11_008)
    copy, rows, none = torch.empty_like(weight), [], torch.empty(0)
    for bits in range(1, 9):
        quantized = kernels.quantize(weight, bits=bits, group_size=GROUP_SIZE, symmetric=False)
        packed = kernels.pack_weight(*quantized, bits=bits, group_size=GROUP_SIZE)
        run = {
            "copy": Candidate(lambda x, i: copy.copy_(weight), 1),
            "pack": Candidate(
                lambda x, i, of=quantized, bits=bits: kernels.pack_weight(*of, bits=bits, group_size=GROUP_SIZE), 1
            ),
            "unpack": Candidate(lambda x, i, packed=packed: kernels.unpack_weight(packed), 1),
        }
        times = measure(run, none, seconds)
        print(f"w{bits}: " + ", ".join(f"{name} {1e3 * taken:.1f} ms" for name, taken in times.items()), flush=True)
        for name in ("pack", "unpack"):
            row = {"what": f"{name} [4096, 11008]", "case": f"w{bits}", "value": 1e3 * times[name], "unit": "ms"}
            rival = {"rival": "copy of the float32 weight", "rival_value": 1e3 * times["copy"]}
            rows.append({**row, **rival, "ratio": times["copy"] / times[name]})
    return rows


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=0.3, help="of calls for each candidate and number of tokens")
    parser.add_argument("--backend", default=kernels.active_backend(), help=f"one of {', '.join(kernels.available_backends())}")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    torch.backends.quantized.engine = "fbgemm"
    torch.manual_seed(0)
    weight = torch.randn(options.size, options.size) / options.size**0.5
    ours, theirs = packed_candidates(weight, cold), rivals(weight, cold)
    machine = f"{cpu_name()}, torch {torch.__version__}, backend {options.backend}"
    print(f"[{options.size}, {options.size}], groups of {GROUP_SIZE}, lower quartiles; {machine}")
    rows: list[Row] = [{"what": "machine", "case": machine}]
    for n_threads in options.threads:
        torch.set_num_threads(n_threads)
        for n_tokens in options.tokens:
            x = torch.randn(n_tokens, options.size)
            with kernels.use_backend(options.backend):
                times = measure(ours | theirs, x, options.seconds)
            read = theirs[READ].n_bytes / times[READ] / 1e9
            print(f"\n{n_tokens} tokens, {n_threads} threads: ", end="")
            print(f"{FLOAT} {1e3 * times[FLOAT]:.3f} ms, {INT8} {1e3 * times[INT8]:.3f} ms, {READ} {read:.1f} GB/s")
            print(f"{'':<6}{'ms':>9}{'x float32':>11}{'x int8':>8}{'GB/s':>7}{'of read':>9}")
            for name, candidate in ours.items():
                taken, rate = times[name], candidate.n_bytes / times[name] / 1e9
                shares = [times[rival] / taken for rival in (FLOAT, INT8)]
                print(
                    f"{name:<6}{1e3 * taken:>9.3f}{shares[0]:>11.2f}{shares[1]:>8.2f}{rate:>7.1f}{rate / read:>9.0%}", flush=True
                )
                case = f"{name}, {n_tokens} tokens, {n_threads} threads"
                row: Row = {"what": "time", "case": case, "value": 1e3 * taken, "unit": "ms"}
                for rival, share in zip((FLOAT, INT8), shares, strict=True):
                    rows.append({**row, "rival": rival, "rival_value": 1e3 * times[rival], "ratio": share})
                if n_tokens == 1:
                    row = {"what": "weights read", "case": case, "value": rate, "unit": "GB/s"}
                    rows.append({**row, "rival": READ, "rival_value": read, "ratio": rate / read})
    del ours, theirs
    if matmul_peers.absent():
        print(f"\nno peers of {', '.join(matmul_peers.absent())}: not installed")
    with kernels.use_backend(options.backend):
        for n_threads in options.threads:
            torch.set_num_threads(n_threads)
            rows += against_peers(
                weight, f"[{options.size}, {options.size}] cold, {n_threads} threads", cold, n_threads, options.seconds
            )
        torch.set_num_threads(1)
        for shape in HOT_SHAPES:
            rows += against_peers(torch.randn(shape) / shape[1] ** 0.5, f"{list(shape)} hot, 1 thread", hot, 1, options.seconds)
        rows.append(call_cost(options.backend, options.seconds))
        rows += packing(options.seconds)
        rows += beside_a_busy_process(weight)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
