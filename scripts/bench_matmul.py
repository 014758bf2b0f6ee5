"""Times the products with packed weights against PyTorch's float32 and dynamic int8 ones, interleaved in this process.

    python scripts/bench_matmul.py [--json FILE] [--size 4096] [--tokens 1 4 16 64 256] [--threads 1 2] [--seconds 0.3]

A Linear layer [size, size], groups of 128, asymmetric, float16 scales, 1 to 8 bits, with float32 input (`w4`) and with the input
quantized to int8 (`w4a8`). Every call is timed alone, in shuffled order, on the next of several copies of its weight (80 MB or
more of them together, so that weights come from memory); the figure is the lower quartile. GB/s are of packed weights, beside the
rate at which a dot product reads memory. A ratio above 1 says that the kernels are faster.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mpsearch import kernels

GROUP_SIZE = 128
COLD_BYTES = 80_000_000
FLOAT, INT8, READ = "torch float32", "torch dynamic int8", "read"


@dataclass
class Candidate:
    """A product: `run(x, i)` multiplies by copy i of a weight of `n_bytes`."""

    run: Callable[[Tensor, int], object]
    n_bytes: int


def copies_of(n_bytes: int) -> int:
    return COLD_BYTES // n_bytes + 1


def packed_candidates(weight: Tensor) -> dict[str, Candidate]:
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


def rivals(weight: Tensor) -> dict[str, Candidate]:
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
    ours, theirs = packed_candidates(weight), rivals(weight)
    machine = f"{cpu_name()}, torch {torch.__version__}, backend {options.backend}"
    print(f"[{options.size}, {options.size}], groups of {GROUP_SIZE}, lower quartiles; {machine}")
    rows: list[dict[str, object]] = [{"what": "machine", "case": machine}]
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
                row: dict[str, object] = {"what": "time", "case": case, "value": 1e3 * taken, "unit": "ms"}
                for rival, share in zip((FLOAT, INT8), shares, strict=True):
                    rows.append({**row, "rival": rival, "rival_value": 1e3 * times[rival], "ratio": share})
                if n_tokens == 1:
                    row = {"what": "weights read", "case": case, "value": rate, "unit": "GB/s"}
                    rows.append({**row, "rival": READ, "rival_value": read, "ratio": rate / read})
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
