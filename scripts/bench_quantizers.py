"""What each quantizer makes of ResNet-20 (CIFAR-10), and what their inner loops cost; to `reports/bench_quantizers*/`.

    python scripts/bench_quantizers.py accuracy    uniform and mixed, on the test images
    python scripts/bench_quantizers.py speed       rounding with feedback beside loops in PyTorch
    python scripts/bench_quantizers.py hqq         half-quadratic fitting beside the authors' formulation in PyTorch

Calibration and sensitivities use training images only. Mixed allocations are the exact additive solution (knapsack) of the
diagonal Fisher sensitivities at each budget of average bits, scales counted; nothing is chosen on the test images. The data are
found in `$MPSEARCH_DATA/cifar10` (default `../shared/data/cifar10`). `--json FILE` writes the rows as JSON too.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from bench_resnet20 import REPORTS, Row, _machine, build_engine
from torch import Tensor

from mpsearch import kernels
from mpsearch.engine import FLOAT, QuantEngine
from mpsearch.knapsack import solve
from mpsearch.metrics.fisher import Fisher
from mpsearch.quantizers.base import Quantizer
from mpsearch.quantizers.clip_search import ClipSearch
from mpsearch.quantizers.coordinate_descent import CoordinateDescent
from mpsearch.quantizers.gptq import GPTQ, triangular_feedback
from mpsearch.quantizers.hqq import HQQ
from mpsearch.quantizers.round_to_nearest import RoundToNearest
from mpsearch.sensitivity import measure_sensitivity

QUANTIZERS: dict[str, Quantizer] = {
    "round_to_nearest": RoundToNearest(),
    "hqq": HQQ(),
    "clip_search": ClipSearch(),
    "gptq": GPTQ(),
    "coordinate_descent": CoordinateDescent(),
}
TARGETS = (3.0, 3.5, 4.0)


def accuracy() -> list[Row]:
    """Test accuracy with its paired interval, uniform and mixed, for each quantizer, and the seconds of quantizing."""
    base = build_engine()
    space = base.space
    rows: list[Row] = [_row(base, FLOAT, "float", "accuracy")]
    for name, quantizer in QUANTIZERS.items():
        engine = QuantEngine(base.model, base.task, space, dict.fromkeys(space.schemes, quantizer), base.moments)
        engine._batches, engine._float_logits = base._batches, base._float_logits  # loaded and computed once
        start = time.perf_counter()
        for layer in space.layers:
            for scheme in space.schemes:
                engine.quantized(layer.name, scheme)
        seconds = time.perf_counter() - start
        rows.append({"what": "seconds to quantize 20 layers x 6 widths", "case": name, "value": seconds, "unit": "s"})
        for scheme in ("w2", "w3", "w4"):
            rows.append(_row(engine, space.uniform(scheme), f"{name}, uniform {scheme}", "accuracy"))
        sensitivity = measure_sensitivity(engine, Fisher()).values
        for target in TARGETS:
            chosen = solve(sensitivity, space.storage_bits, target * space.numel)
            rows.append(_row(engine, space.allocation(chosen), f"{name}, mixed at {target:g} bits", "accuracy"))
        print(*(f"{row['case']}: {row['value']:.2f}" for row in rows[-7:]), sep="\n", flush=True)
    return rows


def _row(engine: QuantEngine, allocation, case: str, what: str) -> Row:
    score = engine.score(allocation, "confirm")
    space = engine.space
    bits = 32.0
    if allocation:
        bits = float(space.storage_bits[np.arange(len(space.groups)), space.choice(allocation)].sum() / space.numel)
    return {
        "what": what,
        "case": case,
        "value": 100 * score.quality,
        "unit": "%",
        "low": 100 * score.quality_low,
        "high": 100 * score.quality_high,
        "bits": bits,
    }


def column_loop(weight: Tensor, feedback: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The plain loop: every column's error goes to all later columns at once."""
    w, codes, zero = weight.clone(), torch.empty(weight.shape, dtype=torch.uint8), 2.0 ** (bits - 1)
    columns = feedback.T.contiguous()  # row i: what an error of column i does to each other
    for i in range(w.shape[1]):
        code = (w[:, i] / scale + zero).round().clamp(0, 2**bits - 1)
        w[:, i + 1 :].addr_((code - zero) * scale - w[:, i], columns[i, i + 1 :], alpha=-1)
        codes[:, i] = code
    return codes


def blocked_loop(weight: Tensor, feedback: Tensor, scale: Tensor, bits: int) -> Tensor:
    """GPTQ's own blocking (Frantar et al. 2023, section 3.3): 128 columns by the plain loop, the rest by a matrix product."""
    w, codes, zero = weight.clone(), torch.empty(weight.shape, dtype=torch.uint8), 2.0 ** (bits - 1)
    for begin in range(0, w.shape[1], 128):
        end = min(begin + 128, w.shape[1])
        block, errors = w[:, begin:end].clone(), torch.empty(len(w), end - begin)
        within = feedback[begin:end, begin:end].T.contiguous()
        for i in range(end - begin):
            code = (block[:, i] / scale + zero).round().clamp(0, 2**bits - 1)
            errors[:, i] = (code - zero) * scale - block[:, i]
            block[:, i + 1 :].addr_(errors[:, i], within[i, i + 1 :], alpha=-1)
            codes[:, begin + i] = code
        # In this form the error that is fed back is that of the original weight.
        w[:, end:].addmm_(
            (codes[:, begin:end].float() - zero) * scale[:, None] - weight[:, begin:end], feedback[end:, begin:end].T, alpha=-1
        )
    return codes


def speed(n: int = 4096) -> list[Row]:
    """The kernel on an n x n weight at 4 bits against PyTorch, all on one thread; the best of interleaved runs."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    weight, x = torch.randn(n, n), torch.randn(n + 100, n).cumsum(1) * 0.1
    hessian = (x.T @ x / len(x)).double()
    hessian.diagonal().add_(0.01 * hessian.diagonal().mean())
    start = time.perf_counter()
    feedback = triangular_feedback(hessian[None])
    factor = time.perf_counter() - start
    scale = weight.abs().amax(1) / 7
    zeros, groups = torch.full((n, 1), 8.0), torch.zeros(n, dtype=torch.int32)
    calls = {
        "mpsearch": lambda: kernels.round_with_feedback(weight, feedback, scale[:, None].contiguous(), zeros, groups, bits=4),
        "a column loop in torch": lambda: column_loop(weight, feedback[0], scale, 4),
        "a blocked loop in torch": lambda: blocked_loop(weight, feedback[0], scale, 4),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    ours, best = min(seconds["mpsearch"]), {name: min(of) for name, of in seconds.items()}
    case = f"{n} x {n}, 4 bits, 1 thread"
    rows: list[Row] = [{"what": "factor of the Hessian (torch)", "case": case, "value": factor, "unit": "s"}]
    for name in list(calls)[1:]:
        row = {"what": "rounding with feedback", "case": case, "value": ours, "unit": "s", "rival": name}
        rows.append(row | {"rival_value": best[name], "ratio": best[name] / ours})
    return rows


def proximal(groups: Tensor, scale: Tensor, zero: Tensor, top: int, n_steps: int) -> Tensor:
    """HQQ's inner loop as its authors publish it (mobiusml/hqq, `optimize_weights_proximal`, p = 0.7), without the early stop."""
    beta, per_step = 10.0, 1 / scale
    for _ in range(n_steps):
        codes = torch.round(groups * per_step + zero).clamp(0, top)
        error = groups - (codes - zero) / per_step
        split = torch.sign(error) * torch.nn.functional.relu(error.abs() - (1.0 / beta) * error.abs().pow(0.7 - 1))
        zero = torch.mean(codes - (groups - split) * per_step, dim=1, keepdim=True)
        beta *= 1.01
        error.abs().mean().item()
    return torch.round(groups * per_step + zero).clamp(0, top)


def hqq(n: int = 4096, n_steps: int = 20) -> list[Row]:
    """The kernel on an n x n weight at 4 bits, groups of 64, against PyTorch; PyTorch once, ours before and after it."""
    torch.manual_seed(0)
    weight, rows = torch.randn(n, n), []
    _, scales, zeros = kernels.quantize(weight, bits=4, group_size=64, symmetric=False)
    how = {"bits": 4, "group_size": 64, "fit_zeros": True, "n_steps": n_steps, "beta": 50.0, "growth": 1.01}
    calls = {
        "mpsearch": lambda: kernels.half_quadratic(weight, scales, zeros.float(), **how),
        "torch": lambda: proximal(weight.view(-1, 64), scales.float().view(-1, 1), zeros.float().view(-1, 1), 15, n_steps),
    }
    for n_threads in (1, 2):
        torch.set_num_threads(n_threads)
        seconds: dict[str, float] = {}
        for name in ("mpsearch", "torch", "mpsearch"):
            start = time.perf_counter()
            calls[name]()
            seconds[name] = min(time.perf_counter() - start, seconds.get(name, float("inf")))
        case = f"{n} x {n}, 4 bits, groups of 64, {n_steps} steps, {n_threads} threads"
        row = {"what": "half-quadratic fitting", "case": case, "value": seconds["mpsearch"], "unit": "s", "rival": "torch"}
        rows.append(row | {"rival_value": seconds["torch"], "ratio": seconds["torch"] / seconds["mpsearch"]})
    return rows


def main() -> None:
    """Measure, print the table, and write it to the report folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["accuracy", "speed", "hqq"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = [*{"accuracy": accuracy, "speed": speed, "hqq": hqq}[arguments.what](), _machine()]
    lines = [
        "| what | case | value | 95 % interval (paired) | average bits | rival | ratio |",
        "| --- | --- | ---: | --- | ---: | --- | ---: |",
    ]
    for row in rows:
        value = f"{row['value']:.2f} {row['unit']}" if isinstance(row["value"], float) else f"{row['value']} {row['unit']}"
        interval = f"{row['low']:.2f} to {row['high']:.2f}" if "low" in row else ""
        bits = f"{row['bits']:.2f}" if "bits" in row else ""
        rival = f"{row['rival']}: {row['rival_value']:.2f}" if "rival" in row else ""
        ratio = f"{row['ratio']:.1f}" if "ratio" in row else ""
        lines.append(f"| {row['what']} | {row['case']} | {value} | {interval} | {bits} | {rival} | {ratio} |")
    accuracy_notes = [
        "ResNet-20 on the 5,000 staged CIFAR-10 test images; calibrated on 1,000 training images, as is Fisher.",
        "Average bits count the scales (float16, one a channel); the interval is of the quantized network on these images, as",
        "the float accuracy plus the paired bootstrap of the difference.",
    ]
    notes = accuracy_notes if arguments.what == "accuracy" else []
    text = "\n".join([f"# bench_quantizers {arguments.what}", "", *lines, "", *notes]) + "\n"
    print(text)
    folder = REPORTS / ("bench_quantizers" if arguments.what == "accuracy" else f"bench_quantizers_{arguments.what}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(text)
    for file in filter(None, (arguments.json, folder / "rows.json")):
        file.write_text(json.dumps(rows, indent=1, default=float) + "\n")


if __name__ == "__main__":
    main()
