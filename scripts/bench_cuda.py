"""Builds, tests and times the CUDA kernels on this machine's GPU, in one call of a few minutes; it needs nvcc and PyTorch only.

    python scripts/bench_cuda.py [--json FILE] [--tests-only]

1. Compiles `mpsearch/kernels/cuda` for this GPU (kept in build/ until a source changes).
2. Runs every check of `tests/kernels/cuda_contract.py` on it; `compute-sanitizer --tool memcheck python scripts/bench_cuda.py
   --tests-only` (also racecheck, synccheck, initcheck) runs them under the sanitizer.
3. Times products in CUDA graphs that go through copies of the weight, more than 180 MB together so that they come from memory,
   beside PyTorch's bfloat16 product (cuBLAS), each replayed in turn; and min-max quantization. The figure is the lower quartile.

Shares are of the rate at which PyTorch copies 1 GB here (bytes read and written). Without a GPU or nvcc it says so and ends well.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "kernels")]  # the kernels need no install

from mpsearch import kernels  # noqa: E402
from mpsearch.kernels import PackedWeight, cuda_backend  # noqa: E402

SOURCES = ROOT / "mpsearch" / "kernels" / "cuda"
FLAGS = ["-std=c++20", "-O3", "--fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden"]
GROUP_SIZE = 128
COLD_BYTES = 200_000_000
REPLAYS = 15
SMALL, MIDDLE, LARGE = (4096, 4096), (11008, 4096), (28672, 8192)
BARS = {  # of the goals: what, case -> least ratio
    **{("of copy", f"{bits} bits, 1 token, {LARGE}"): {2: 0.65, 4: 0.8, 8: 0.8}.get(bits, 0.75) for bits in range(2, 9)},
    ("to cuBLAS", f"4 bits, 1 token, {LARGE}"): 3.2,
    ("to cuBLAS", f"4 bits, 64 tokens, {LARGE}"): 1.6,
    ("1 token to 16", f"4 bits, {LARGE}"): 1 / 1.15,
    ("of copy", "quantize, 4 bits, min-max"): 0.8,
}

rows: list[dict[str, object]] = []


def build(capability: tuple[int, int]) -> Path:
    """The library for one GPU; compiled in parallel, about a second of a core for each of 20 files."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    architecture = f"-arch=sm_{capability[0]}{capability[1]}"
    files = sorted([*SOURCES.glob("*.cu*"), *SOURCES.glob("*.h")])
    state = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    folder = ROOT / "build" / f"cuda{architecture}-{state}"
    library = folder / "_cuda.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    jobs = []
    for source in SOURCES.glob("*.cu"):
        for bits in range(1, 9) if source.stem.startswith("product") else [0]:
            target = str(folder / f"{source.stem}{bits}.o")
            jobs.append([nvcc, architecture, *FLAGS, f"-DMPSEARCH_BITS={bits}", "-c", str(source), "-o", target])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for finished in pool.map(lambda job: subprocess.run(job, capture_output=True, text=True), jobs):
            if finished.returncode:
                raise SystemExit(f"{' '.join(finished.args)}\n{finished.stdout}{finished.stderr}")
    subprocess.run([nvcc, "-shared", "-cudart", "static", *(job[-1] for job in jobs), "-o", str(library)], check=True)
    return library


def run_checks() -> int:
    """How many of the contract's checks fail on the GPU."""
    from cuda_contract import CHECKS

    failed = 0
    for name, check in CHECKS.items():
        try:
            check("cuda")
        except Exception as error:  # the table is worth having all the same, with the failure beside it
            failed += 1
            print(f"  FAILED {name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    print(f"tests: {len(CHECKS) - failed} of {len(CHECKS)} passed", flush=True)
    return failed


class Graph:
    """A CUDA graph of `n` calls, call i on copy i of its weight."""

    def __init__(self, call: Callable[[int], object], n: int) -> None:
        self.n = n
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for i in range(min(n, 2)):  # loads the kernels, which a capture may not
                call(i)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for i in range(n):
                call(i)

    def seconds(self) -> float:
        """Of one call."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / self.n


def measure(graphs: dict[str, Graph]) -> dict[str, float]:
    """Lower quartiles, the graphs replayed in turn."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(REPLAYS):
        for name, graph in graphs.items():
            times[name].append(graph.seconds())
    return {name: statistics.quantiles(taken[1:], n=4, method="inclusive")[0] for name, taken in times.items()}


def report(what: str, case: str, value: float, unit: str, rival: str, rival_value: float, ratio: float) -> None:
    """A row, with the bar that there is for it."""
    rows.append(
        {"what": what, "case": case, "value": value, "unit": unit, "rival": rival, "rival_value": rival_value, "ratio": ratio}
    )
    bar = BARS.get((what, case))
    verdict = "" if bar is None else f"   {'meets' if ratio >= bar else 'MISSES'} {bar:.2f}"
    print(f"{what:<14}{case:<38}{value:>10.4g} {unit:<6}{rival:<14}{rival_value:>10.4g}{ratio:>8.2f}{verdict}", flush=True)


def copies(first: Tensor) -> list[Tensor]:
    """Enough of them that none is still in the second cache when its turn comes again."""
    n_bytes = first.numel() * first.element_size()
    return [first, *(first.clone() for _ in range(max(COLD_BYTES // n_bytes, 1)))]


def some_packed(shape: tuple[int, int], bits: int) -> PackedWeight:
    n_rows, n_columns = shape
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8, device="cuda")
    per_group = (n_rows, n_columns // GROUP_SIZE)
    scales = (torch.rand(per_group, device="cuda") * 0.01).half()
    zero_points = torch.randint(0, 2**bits, per_group, dtype=torch.uint8, device="cuda")
    return kernels.pack_weight(codes, scales, zero_points, bits=bits, group_size=GROUP_SIZE)


def bench_copy() -> float:
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    rate = 2 * source.numel() / measure({"copy": Graph(lambda _: target.copy_(source), 4)})["copy"]
    print(f"copy of 1 GB: {rate / 1e12:.2f} TB/s\n", flush=True)
    return rate


def bench_products(shape: tuple[int, int], widths: list[int], all_tokens: list[int], copy_rate: float) -> None:
    floats = copies(torch.randn(shape, device="cuda", dtype=torch.bfloat16) / shape[1] ** 0.5)
    one_token: dict[int, float] = {}
    for bits in widths:
        packed = some_packed(shape, bits)
        weights = [
            PackedWeight(data, *shape, bits, packed.group_size, packed.half_scales, packed.symmetric)
            for data in copies(packed.data)
        ]
        for n_tokens in all_tokens:
            x = torch.randn(n_tokens, shape[1], device="cuda", dtype=torch.bfloat16)
            graphs = {
                "float": Graph(lambda i, x=x, weights=weights: kernels.linear(x, weights[i]), len(weights)),
                "cuBLAS": Graph(lambda i, x=x: F.linear(x, floats[i]), len(floats)),
            }
            if n_tokens <= 64:
                graphs["int8"] = Graph(lambda i, x=x, weights=weights: kernels.linear_a8(x, weights[i]), len(weights))
            times = measure(graphs)
            case = f"{bits} bits, {n_tokens} token{'s' if n_tokens > 1 else ''}, {shape}"
            if n_tokens == 1:
                one_token[bits] = times["float"]
                rate = packed.nbytes / times["float"]
                report("of copy", case, rate / 1e9, "GB/s", "copy", copy_rate / 1e9, rate / copy_rate)
            theirs = 1e6 * times["cuBLAS"]
            report("to cuBLAS", case, 1e6 * times["float"], "us", "cuBLAS bf16", theirs, times["cuBLAS"] / times["float"])
            if "int8" in times:
                report("a8 to cuBLAS", case, 1e6 * times["int8"], "us", "cuBLAS bf16", theirs, times["cuBLAS"] / times["int8"])
            if n_tokens == 16 and bits in one_token:
                once = one_token[bits]
                ratio = once / times["float"]
                report("1 token to 16", f"{bits} bits, {shape}", 1e6 * times["float"], "us", "1 token", 1e6 * once, ratio)
            del graphs
        del weights, packed
        torch.cuda.empty_cache()


def bench_quantize(copy_rate: float) -> None:
    """The kernel alone: `kernels.quantize` also asks whether all was finite, for which it waits."""
    weight = torch.randn(LARGE, device="cuda")
    codes, flag = torch.empty_like(weight, dtype=torch.uint8), torch.zeros(1, dtype=torch.int32, device="cuda")
    scales = weight.new_empty(weight.numel() // GROUP_SIZE, dtype=torch.float16)
    zero_points = torch.empty_like(scales, dtype=torch.uint8)
    ratios = torch.linspace(1, 0.4, 80, device="cuda")

    def run(ratios: Tensor | None) -> None:
        library = cuda_backend.library
        assert library is not None
        outputs = (codes.data_ptr(), scales.data_ptr(), zero_points.data_ptr(), flag.data_ptr())
        addresses = [weight.data_ptr(), 0, 0 if ratios is None else ratios.data_ptr(), *outputs]
        n_ratios = 0 if ratios is None else len(ratios)
        library.call("quantize", weight, *addresses, *LARGE, GROUP_SIZE, 1, n_ratios, 4, False, True)

    times = measure({"min-max": Graph(lambda _: run(None), 2), "search": Graph(lambda _: run(ratios), 1)})
    rate = 5 * weight.numel() / times["min-max"]
    report("of copy", "quantize, 4 bits, min-max", rate / 1e9, "GB/s", "copy", copy_rate / 1e9, rate / copy_rate)
    tries = weight.numel() * len(ratios) / times["search"]
    print(f"clip search, 80 ratios: {1e3 * times['search']:.2f} ms for {LARGE}, {tries / 1e12:.2f} T tries a second", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tests-only", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("Skipped: PyTorch shows no GPU on this machine.")
        return
    if shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists():
        print("Skipped: there is a GPU but no nvcc to build the kernels with.")
        return

    begin = time.perf_counter()
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    print(machine)
    cuda_backend.library = cuda_backend.load(build(torch.cuda.get_device_capability()))
    print(f"built in {time.perf_counter() - begin:.0f} s", flush=True)
    failed = run_checks()
    print(f"tested after {time.perf_counter() - begin:.0f} s\n", flush=True)
    if not options.tests_only:
        torch.manual_seed(0)
        rows.append({"what": "machine", "case": machine})
        copy_rate = bench_copy()
        print(f"{'what':<14}{'case':<38}{'value':>10} {'unit':<6}{'rival':<14}{'value':>10}{'ratio':>8}")
        bench_quantize(copy_rate)
        bench_products(LARGE, list(range(1, 9)), [1], copy_rate)
        for shape in (LARGE, MIDDLE, SMALL):
            bench_products(shape, [4], [1, 4, 16, 32, 64, 256, 1024], copy_rate)
        bench_products(MIDDLE, [2, 3, 8], [1, 16], copy_rate)
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(rows, indent=1) + "\n")
        print(f"measured after {time.perf_counter() - begin:.0f} s", flush=True)
    if failed:
        raise SystemExit(f"{failed} checks failed on the GPU.")


if __name__ == "__main__":
    main()
