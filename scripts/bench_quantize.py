"""Times the quantization kernels against the same work in eager PyTorch, interleaved in this process.

    python scripts/bench_quantize.py [--json FILE] [--rows 4096] [--columns 11008] [--repeats 9] [--rival-repeats 3]

A 4-bit, asymmetric, group-128 quantization with float16 scales; the clip searches take a quarter of the rows on both sides and
the rivals keep only scales and zero points. There are two: eager PyTorch as it is ordinarily written, and written to work in
place where it can. GB/s counts the bytes that must be read and written, beside a memory copy timed in between. Medians; a ratio
above 1 says that the kernels are faster.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mpsearch import kernels

BITS = 4
GROUP_SIZE = 128
TOP = 2**BITS - 1
HOW = {"bits": BITS, "group_size": GROUP_SIZE, "symmetric": False, "scale_dtype": torch.float16}
LOWEST_RATIO = 0.4


@dataclass
class Case:
    """One piece of work: ours, the rivals' by name, and the bytes that it must read and write."""

    name: str
    ours: Callable[[], object]
    rivals: dict[str, Callable[[], object]]
    n_bytes: float


def eager_grid(low: Tensor, high: Tensor, ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, its inverse and the zero point per group; small beside the weights, so written once for both rivals."""
    scale = ((high - low) / TOP * ratio).half().float()
    inverse = 1 / scale
    return scale, inverse, torch.round(torch.clamp(-low * ratio * inverse, 0, TOP))


def eager_quantize(weight: Tensor) -> Tensor:
    groups = weight.view(-1, GROUP_SIZE)
    low, high = groups.amin(1, keepdim=True).clamp(max=0), groups.amax(1, keepdim=True).clamp(min=0)
    _, inverse, zero = eager_grid(low, high, 1.0)
    return torch.clamp(torch.round(groups * inverse + zero), 0, TOP).to(torch.uint8).view_as(weight)


def in_place_quantize(weight: Tensor) -> Tensor:
    groups = weight.view(-1, GROUP_SIZE)
    low, high = groups.aminmax(dim=1, keepdim=True)
    low, high = low.clamp_(max=0), high.clamp_(min=0)
    _, inverse, zero = eager_grid(low, high, 1.0)
    return (groups * inverse).add_(zero).clamp_(0, TOP).round_().to(torch.uint8).view_as(weight)


def eager_error(groups: Tensor, scale: Tensor, inverse: Tensor, zero: Tensor) -> Tensor:
    codes = torch.clamp(torch.round(groups * inverse + zero), 0, TOP)
    return ((codes - zero) * scale - groups).square().sum(1, keepdim=True)


def in_place_error(groups: Tensor, scale: Tensor, inverse: Tensor, zero: Tensor) -> Tensor:
    position = (groups * inverse).add_(zero)
    off = position.clamp(0, TOP).round_().sub_(position)
    return off.square_().sum(1, keepdim=True).mul_(scale).mul_(scale)


def eager_search(weight: Tensor, ratios: list[float], error_of: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    groups = weight.view(-1, GROUP_SIZE)
    low, high = groups.amin(1, keepdim=True).clamp(max=0), groups.amax(1, keepdim=True).clamp(min=0)
    least = torch.full_like(low, torch.inf)
    best_scale, best_zero = torch.zeros_like(low), torch.zeros_like(low)
    for ratio in ratios:
        scale, inverse, zero = eager_grid(low, high, ratio)
        error = error_of(groups, scale, inverse, zero)
        better = error < least
        least = torch.where(better, error, least)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def eager_pack(codes: Tensor) -> Tensor:
    pairs = codes.view(-1, 2)
    return pairs[:, 0] | (pairs[:, 1] << 4)


def eager_unpack(packed: Tensor) -> Tensor:
    return torch.stack((packed & 15, packed >> 4), dim=1).view(-1)


def eager_dequantize(packed: Tensor, scales: Tensor, zero_points: Tensor, rows: int, columns: int) -> Tensor:
    groups = eager_unpack(packed).view(-1, GROUP_SIZE).float()
    return groups.sub_(zero_points.view(-1, 1)).mul_(scales.view(-1, 1)).view(rows, columns)


def cases(rows: int, columns: int) -> list[Case]:
    torch.manual_seed(0)
    weight = torch.randn(rows, columns)
    quarter = weight[: max(rows // 4, 1)]
    codes, scales, zero_points = kernels.quantize(weight, **HOW)
    packed = kernels.pack(codes, BITS)
    n, n_packed = weight.numel(), packed.numel()

    def dequantize() -> Tensor:
        return kernels.dequantize(packed, scales, zero_points, bits=BITS, rows=rows, columns=columns, group_size=GROUP_SIZE)

    def search(tried: Tensor) -> Case:
        rivals = {
            "torch eager": lambda: eager_search(quarter, tried.tolist(), eager_error),
            "torch in place": lambda: eager_search(quarter, tried.tolist(), in_place_error),
        }
        name = f"clip search, {len(tried)} ratios"
        return Case(name, lambda: kernels.quantize(quarter, ratios=tried, **HOW), rivals, 5 * quarter.numel())

    min_max = {
        "torch eager": lambda: eager_quantize(weight),
        "torch in place": lambda: in_place_quantize(weight),
    }
    unpacked = {"torch eager": lambda: eager_dequantize(packed, scales, zero_points, rows, columns)}
    return [
        Case("min-max", lambda: kernels.quantize(weight, **HOW)[0], min_max, 5 * n),
        *(search(torch.linspace(1, LOWEST_RATIO, count)) for count in (20, 80)),
        Case("pack", lambda: kernels.pack(codes, BITS), {"torch eager": lambda: eager_pack(codes)}, n + n_packed),
        Case("unpack", lambda: kernels.unpack(packed, BITS, n), {"torch eager": lambda: eager_unpack(packed)}, n + n_packed),
        Case("dequantize", dequantize, unpacked, 4 * n + n_packed),
    ]


def check(case_list: list[Case]) -> None:
    """The rivals must do the same work, or their times say nothing."""
    for case in case_list:
        ours = case.ours()
        for name, rival in case.rivals.items():
            if isinstance(ours, Tensor):
                assert torch.equal(ours, rival()), (case.name, name)
            else:  # a search sums errors in its own order, so now and then another ratio wins
                same = (ours[1].flatten() == rival()[0].flatten()).float().mean()
                assert same > 0.99, (case.name, name, float(same))


def seconds_of(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def measure(case: Case, copy: Callable[[], object], repeats: int, rival_repeats: int) -> tuple[float, dict[str, float], float]:
    """Median seconds of ours, of each rival and of the memory copy, taken in turns."""
    case.ours()
    ours, copies = [], []
    rivals: dict[str, list[float]] = {name: [] for name in case.rivals}
    for i in range(repeats):
        ours.append(seconds_of(case.ours))
        copies.append(seconds_of(copy))
        if i < rival_repeats:
            for name, rival in case.rivals.items():
                rivals[name].append(seconds_of(rival))
            case.ours()  # brings the caches back to what a repeated call finds
    medians = {name: statistics.median(times) for name, times in rivals.items()}
    return statistics.median(ours), medians, statistics.median(copies)


def row(what: str, case: str, value: float, unit: str, rival: str, rival_value: float, ratio: float) -> dict[str, object]:
    return {
        "what": what,
        "case": case,
        "value": value,
        "unit": unit,
        "rival": rival,
        "rival_value": rival_value,
        "ratio": ratio,
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def markdown(rows: list[dict[str, object]]) -> str:
    """The rows as a page."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    lines = [
        f"# bench_quantize, {datetime.date.today().isoformat()}, commit {commit}",
        "",
        f"{rows[0]['case']}. Medians, rivals interleaved in the same process; ratio > 1: we are faster.",
        "Weight [4096, 11008] float32, 4 bits, groups of 128, asymmetric, float16 scales; clip search on 1,024 rows.",
        "The rivals do the same in PyTorch: `torch eager` as one writes it (its search keeps only scale and zero point),",
        "`torch in place` reusing every buffer it can.",
        "",
        "| case | ours | rival | | ratio |",
        "| --- | ---: | --- | ---: | ---: |",
    ]
    for r in rows[1:]:
        theirs = f"{r['rival']} | {r['rival_value']:.4g} {r['unit']} | {r['ratio']:.3g}"
        lines.append(f"| {r['case']} | {r['value']:.4g} {r['unit']} | {theirs} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=11008)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--rival-repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--report", type=Path, help="a folder to write table.md and rows.json to")
    options = parser.parse_args()

    source = torch.randn(options.rows, options.columns)
    target = torch.empty_like(source)
    copied_bytes = 2 * source.numel() * source.element_size()
    case_list = cases(options.rows, options.columns)
    check(case_list)
    machine = f"{cpu_name()}, torch {torch.__version__}, backend {kernels.active_backend()}"
    print(f"[{options.rows}, {options.columns}] float32, {BITS} bits, groups of {GROUP_SIZE}; {machine}\n")
    print(f"{'':<29}{'threads':>8}{'ours ms':>9}  {'rival':<15}{'ms':>8}{'ratio':>8}{'GB/s':>7}{'memcpy GB/s':>13}")
    rows: list[dict[str, object]] = [{"what": "machine", "case": machine}]
    for n_threads in options.threads:
        torch.set_num_threads(n_threads)
        for case in case_list:
            ours, rivals, copy = measure(case, lambda: target.copy_(source), options.repeats, options.rival_repeats)
            moved, copied = case.n_bytes / ours / 1e9, copied_bytes / copy / 1e9
            where = f"{case.name}, {n_threads} threads"
            for name, rival in rivals.items():
                print(
                    f"{case.name:<29}{n_threads:>8}{1e3 * ours:>9.2f}  {name:<15}{1e3 * rival:>8.1f}{rival / ours:>8.1f}"
                    f"{moved:>7.1f}{copied:>13.1f}",
                    flush=True,
                )
                rows.append(row("time", where, 1e3 * ours, "ms", name, 1e3 * rival, rival / ours))
            rows.append(row("bytes moved", where, moved, "GB/s", "memcpy", copied, moved / copied))
    for file in filter(None, (options.json, options.report and options.report / "rows.json")):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(rows, indent=1) + "\n")
    if options.report:
        (options.report / "table.md").write_text(markdown(rows))


if __name__ == "__main__":
    main()
