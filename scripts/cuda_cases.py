"""What `bench_cuda.py` checks and times on a GPU."""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from harness import Row

from mpsearch import kernels
from mpsearch.kernels import PackedWeight

GROUP_SIZE = 128
COLD_BYTES = 200_000_000  # of the copies of a weight together: more than the second cache holds
REPLAYS = 15
SMALL, MIDDLE, LARGE = (4096, 4096), (11008, 4096), (28672, 8192)
BARS = {  # (what, case) -> the least ratio that is aimed at
    **{("of copy", f"{bits} bits, 1 token, {LARGE}"): {2: 0.65, 4: 0.8, 8: 0.8}.get(bits, 0.75) for bits in range(2, 9)},
    ("to cuBLAS", f"4 bits, 1 token, {LARGE}"): 3.2,
    ("to cuBLAS", f"4 bits, 64 tokens, {LARGE}"): 1.6,
    ("1 token to 16", f"4 bits, {LARGE}"): 1 / 1.15,
    ("of copy", "quantize, 4 bits, min-max"): 0.8,
}


def run_checks() -> int:
    """The number of the contract's checks that fail on the GPU."""
    from cuda_contract import CHECKS

    failed = 0
    for name, check in CHECKS.items():
        try:
            check("cuda")
        except Exception as error:  # times are worth having all the same
            failed += 1
            print(f"  FAILED {name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
    print(f"tests: {len(CHECKS) - failed} of {len(CHECKS)} passed", flush=True)
    return failed


def graph(call: Callable[[int], object], n: int) -> Callable[[], float]:
    """Replays a CUDA graph of `n` calls, call i on copy i of its weight; returns seconds of one call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(min(n, 2)):  # loads the kernels, which a capture may not
            call(i)
    torch.cuda.current_stream().wait_stream(side)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        for i in range(n):
            call(i)
    return lambda: timed(recorded.replay) / n


def timed(call: Callable[[], object]) -> float:
    """Seconds of work on the GPU."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def medians(calls: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Of what each call returns; they take turns, and the first turn does not count."""
    rounds = [{name: call() for name, call in calls.items()} for _ in range(REPLAYS)]
    return {name: statistics.median(one[name] for one in rounds[1:]) for name in calls}


def row(what: str, case: str, value: float, unit: str, rival: str, rival_value: float, ratio: float) -> Row:
    """Printed, with the bar that there is for it."""
    bar = BARS.get((what, case))
    verdict = "" if bar is None else f"   {'meets' if ratio >= bar else 'MISSES'} {bar:.2f}"
    print(f"{what:<14}{case:<38}{value:>10.4g} {unit:<6}{rival:<14}{rival_value:>10.4g}{ratio:>8.2f}{verdict}", flush=True)
    names = ("what", "case", "value", "unit", "rival", "rival_value", "ratio")
    return dict(zip(names, (what, case, value, unit, rival, rival_value, ratio), strict=True))


def copies(first: torch.Tensor) -> list[torch.Tensor]:
    """Enough of them that none is still in the second cache when its turn comes again."""
    return [first, *(first.clone() for _ in range(max(COLD_BYTES // first.nbytes, 1)))]


def packed_weights(shape: tuple[int, int], bits: int) -> list[PackedWeight]:
    n_rows, n_columns = shape
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8, device="cuda")
    per_group = (n_rows, n_columns // GROUP_SIZE)
    scales = (torch.rand(per_group, device="cuda") * 0.01).half()
    zero_points = torch.randint(0, 2**bits, per_group, dtype=torch.uint8, device="cuda")
    first = kernels.pack_weight(codes, scales, zero_points, bits=bits, group_size=GROUP_SIZE)
    return [replace(first, data=data) for data in copies(first.data)]


def products(shape: tuple[int, int], widths: list[int], all_tokens: list[int], copy_rate: float) -> Iterator[Row]:
    """With bfloat16 input, and with the input quantized to int8 for up to 64 tokens."""
    floats = copies(torch.randn(shape, device="cuda", dtype=torch.bfloat16) / shape[1] ** 0.5)
    for bits in widths:
        weights, one_token = packed_weights(shape, bits), 0.0
        for n_tokens in all_tokens:
            x = torch.randn(n_tokens, shape[1], device="cuda", dtype=torch.bfloat16)
            graphs = {
                "float": graph(lambda i, x=x, weights=weights: kernels.linear(x, weights[i]), len(weights)),
                "cuBLAS": graph(lambda i, x=x: F.linear(x, floats[i]), len(floats)),
            }
            if n_tokens <= 64:
                graphs["int8"] = graph(lambda i, x=x, weights=weights: kernels.linear_a8(x, weights[i]), len(weights))
            times = medians(graphs)
            ours, theirs = times["float"], times["cuBLAS"]
            case = f"{bits} bits, {n_tokens} token{'s' if n_tokens > 1 else ''}, {shape}"
            if n_tokens == 1:
                one_token, rate = ours, weights[0].nbytes / ours
                yield row("of copy", case, rate / 1e9, "GB/s", "copy", copy_rate / 1e9, rate / copy_rate)
            yield row("to cuBLAS", case, 1e6 * ours, "us", "cuBLAS bf16", 1e6 * theirs, theirs / ours)
            if "int8" in times:
                a8 = times["int8"]
                yield row("a8 to cuBLAS", case, 1e6 * a8, "us", "cuBLAS bf16", 1e6 * theirs, theirs / a8)
            if n_tokens == 16 and one_token:
                about = (f"{bits} bits, {shape}", 1e6 * ours, "us", "1 token", 1e6 * one_token, one_token / ours)
                yield row("1 token to 16", *about)
            del graphs
        del weights
        torch.cuda.empty_cache()


def quantization(copy_rate: float) -> Iterator[Row]:
    """Min-max and clip search; the wait for the check that all is finite is counted."""
    weight, ratios = torch.randn(LARGE, device="cuda"), torch.linspace(1, 0.4, 80, device="cuda")
    options = {"bits": 4, "group_size": GROUP_SIZE, "symmetric": False}
    times = medians(
        {
            "min-max": lambda: timed(lambda: kernels.quantize(weight, **options)),
            "search": lambda: timed(lambda: kernels.quantize(weight, ratios=ratios, **options)),
        }
    )
    rate = 5 * weight.numel() / times["min-max"]
    yield row("of copy", "quantize, 4 bits, min-max", rate / 1e9, "GB/s", "copy", copy_rate / 1e9, rate / copy_rate)
    tries = weight.numel() * len(ratios) / times["search"]
    yield row("tries a second", "quantize, 4 bits, 80 ratios", tries / 1e12, "T/s", "min-max", rate / 5e12, 5 * tries / rate)


def measured() -> Iterator[Row]:
    torch.manual_seed(0)
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_rate = 2 * source.numel() / medians({"copy": graph(lambda _: target.copy_(source), 4)})["copy"]
    print(f"copy of 1 GB: {copy_rate / 1e12:.2f} TB/s\n", flush=True)
    print(f"{'what':<14}{'case':<38}{'value':>10} {'unit':<6}{'rival':<14}{'value':>10}{'ratio':>8}")
    yield from quantization(copy_rate)
    yield from products(LARGE, list(range(1, 9)), [1], copy_rate)
    for shape in (LARGE, MIDDLE, SMALL):
        yield from products(shape, [4], [1, 4, 16, 32, 64, 256, 1024], copy_rate)
    yield from products(MIDDLE, [2, 3, 8], [1, 16], copy_rate)
