"""Builds, tests and times the CUDA kernels on this machine's GPU, in one call of a few minutes; it needs nvcc and PyTorch only.

    python scripts/bench_cuda.py [--json FILE] [--tests-only]

1. Compiles `mpsearch/kernels/cuda` for this GPU (kept in build/ until a source changes).
2. Runs every check of `tests/kernels/cuda_contract.py` on it; `compute-sanitizer --tool memcheck python scripts/bench_cuda.py
   --tests-only` (also racecheck, synccheck, initcheck) runs them under the sanitizer.
3. Times products in CUDA graphs that go through copies of the weight, so many that they come from memory, against PyTorch's
   bfloat16 product (cuBLAS), each replayed in turn; and min-max quantization. Values are medians.

Shares are of the rate at which PyTorch copies 1 GB here (bytes read and written). Without a GPU or nvcc it says so and ends well.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "mpsearch" / "kernels" / "cuda"
FLAGS = ["-std=c++20", "-O3", "--fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden"]


def build(capability: tuple[int, int]) -> Path:
    """The library for one GPU; compiled in parallel."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--tests-only", action="store_true")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("Skipped: PyTorch shows no GPU on this machine.")
        return
    if shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists():
        print("Skipped: there is a GPU but no nvcc to build the kernels with.")
        return
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "kernels")]  # the kernels need no install
    import cuda_cases
    from harness import machine

    from mpsearch.kernels import cuda_backend

    begin = time.perf_counter()
    print(machine()["case"])
    cuda_backend.library = cuda_backend.load(build(torch.cuda.get_device_capability()))
    print(f"built in {time.perf_counter() - begin:.0f} s", flush=True)
    failed = cuda_cases.run_checks()
    print(f"tested after {time.perf_counter() - begin:.0f} s\n", flush=True)
    if not options.tests_only:
        rows = [*cuda_cases.measured(), machine()]
        if options.json:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(rows, indent=1) + "\n")
        print(f"measured after {time.perf_counter() - begin:.0f} s", flush=True)
    if failed:
        raise SystemExit(f"{failed} checks failed on the GPU.")


if __name__ == "__main__":
    main()
