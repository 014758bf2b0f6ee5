"""What each quantizer makes of four networks, and what their inner loops cost; to `reports/bench_quantizers*/`.

    python scripts/bench_quantizers.py quality     uniform, and ResNet-20 mixed, on data that nothing else is done with
    python scripts/bench_quantizers.py speed       rounding with feedback beside loops in PyTorch
    python scripts/bench_quantizers.py hqq         half-quadratic fitting beside the authors' formulation in PyTorch

Mixed allocations are the exact additive solution (knapsack) of the diagonal Fisher sensitivities at each budget of average bits,
scales counted; nothing is chosen on the confirm data. `quality` takes networks, or network/quantizer (mixed/quantizer), and goes
on where it was stopped: rows that are in the report are not measured again. The data are found in `$MPSEARCH_DATA` (default
`../shared/data`). `--json FILE` writes the rows as JSON too.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from pages import REPORTS, Row, machine, write
from search_problems import DATA
from torch import Tensor, nn

from mpsearch import kernels
from mpsearch.allocation import Allocation, SearchSpace
from mpsearch.engine.calibrate import calibrate
from mpsearch.engine.engine import FLOAT, QuantEngine, load_batches
from mpsearch.graph.fold import fold_batch_norms
from mpsearch.graph.trace import trace_layers
from mpsearch.graph.unsearched import other_bits
from mpsearch.metrics.fisher import Fisher
from mpsearch.models.bert import minilm
from mpsearch.models.efficientnet import efficientnet_lite0
from mpsearch.models.llama import stories260k
from mpsearch.models.resnet import resnet
from mpsearch.optimize.knapsack import solve
from mpsearch.pipeline.sensitivity import measure_sensitivity
from mpsearch.quantizers.adaround import AdaRound
from mpsearch.quantizers.base import Quantizer
from mpsearch.quantizers.clip_search import ClipSearch
from mpsearch.quantizers.coordinate_descent import CoordinateDescent
from mpsearch.quantizers.gptq import GPTQ, triangular_feedback
from mpsearch.quantizers.hqq import HQQ
from mpsearch.quantizers.kronecker_descent import KroneckerDescent
from mpsearch.quantizers.round_to_nearest import RoundToNearest
from mpsearch.schemes.integer import Integer
from mpsearch.tasks.base import Task
from mpsearch.tasks.cifar10 import Cifar10
from mpsearch.tasks.imagenet import ImageNetSample
from mpsearch.tasks.language import Language, Stories, read_tokens
from mpsearch.tasks.stsb import STSBenchmark

QUANTIZERS: dict[str, Quantizer] = {
    "round_to_nearest": RoundToNearest(),
    "hqq": HQQ(),
    "clip_search": ClipSearch(),
    "gptq": GPTQ(),
    "adaround": AdaRound(),
    "coordinate_descent": CoordinateDescent(),
    "kronecker_descent": KroneckerDescent(),
}
TARGETS = (3.0, 3.5, 4.0)
MIXED = ("coordinate_descent", "kronecker_descent")
N_CIFAR = 5000
SCHEMES: dict[str, Integer] = {f"w{bits}": Integer(bits) for bits in (2, 3, 4)} | {"w3g64": Integer(3, 64, symmetric=False)}
WIDTHS = (2, 3, 4, 5, 6, 8)


class FirstStories(Language):
    """Confirmed on the first 64 windows of the tokens, calibrated on stories that begin after them."""

    def __init__(self) -> None:
        tokens = read_tokens(DATA / "stories260k" / "tokens_dev.npz")
        n, window = 64, 256
        stories = np.split(tokens, np.flatnonzero(tokens == Stories.BEGIN)[1:])
        begins = np.cumsum([0, *map(len, stories)])[:-1]
        later = [story for story, begin in zip(stories, begins, strict=True) if begin > n * window]
        super().__init__(later, n, n, None, window=window)
        x, y = (torch.from_numpy(tokens[i : i + n * window].astype(np.int64)).view(n, window) for i in (0, 1))
        self._batches["confirm"] = [(a, b.flatten()) for a, b in zip(x.split(16), y.split(16), strict=True)]


@dataclass(frozen=True)
class Net:
    """A network of the table: how it is built and what on, and the schemes and quantizers that are tried on it."""

    build: Callable[[], tuple[nn.Module, Task]]
    on: str
    schemes: tuple[str, ...]
    quantizers: tuple[str, ...] = tuple(QUANTIZERS)


NETS = {
    "stories260k": Net(
        lambda: (stories260k(DATA / "stories260k" / "model.safetensors"), FirstStories()),
        "perplexity of the first 64 windows of 256 tokens, the embedding float; calibrated on 64 windows of other stories",
        ("w2", "w3", "w3g64", "w4"),
    ),
    "minilm": Net(
        lambda: (minilm(None), STSBenchmark(DATA / "stsb", n_confirm=None)),
        "Spearman on the 1,500 dev pairs of STS-B, embeddings float; calibrated on 200 training pairs",
        ("w3",),
        tuple(name for name in QUANTIZERS if name != "adaround"),
    ),
    "resnet20": Net(
        lambda: (
            resnet(20, DATA / "cifar10" / "resnet20.safetensors"),
            Cifar10(DATA / "cifar10", n_calibration=1000, n_search=1000, n_confirm=N_CIFAR),
        ),
        f"top-1 of the first {N_CIFAR:,} CIFAR-10 test images; calibrated on 1,000 training images",
        ("w2", "w3", "w4"),
    ),
    "efficientnet_lite0": Net(
        lambda: (efficientnet_lite0(None), ImageNetSample(DATA / "imagenet_sample")),
        "top-1 of 300 pictures; calibrated on 100 others",
        ("w4",),
        ("round_to_nearest", "clip_search", "coordinate_descent", "kronecker_descent"),
    ),
}


def engine_of(net: Net, quantizer: Quantizer, widths: Sequence[int] = ()) -> QuantEngine:
    """All layers but embeddings, in the net's schemes, or of so many bits a channel."""
    model, task = net.build()
    model.eval()
    inputs = task.batches("calibration")[0][0]
    fold_batch_norms(model, task.forward, inputs)
    layers = [layer for layer in trace_layers(model, task.forward, inputs) if layer.kind != "embedding"]
    schemes = {f"w{bits}": Integer(bits) for bits in widths} or {name: SCHEMES[name] for name in net.schemes}
    space = SearchSpace.build(layers, schemes, other_bits=other_bits(model, layers))
    moments = calibrate(model, task, layers, load_batches(task, "calibration", "cpu"))
    return QuantEngine(model, task, space, dict.fromkeys(schemes, quantizer), moments)


def quality(net: str, name: str) -> list[Row]:
    """The rows of one network and quantizer: each scheme uniformly, and the float network beside the first quantizer."""
    engine = engine_of(NETS[net], QUANTIZERS[name])
    rows = [_row(engine, FLOAT, net, "float")] if name == next(iter(QUANTIZERS)) else []
    for scheme in engine.space.schemes:
        start = time.process_time()
        for layer in engine.space.layers:
            engine.quantized(layer.name, scheme)
        seconds = time.process_time() - start  # of the first scheme: with one pass for the Hessians
        rows.append(_row(engine, engine.space.uniform(scheme), net, f"{name}, {scheme}") | {"cpu_seconds": seconds})
    return rows


def mixed(name: str) -> list[Row]:
    """ResNet-20 at three budgets: the exact additive solution of the diagonal Fisher sensitivities."""
    engine = engine_of(NETS["resnet20"], QUANTIZERS[name], WIDTHS)
    space, sensitivity = engine.space, measure_sensitivity(engine, Fisher()).values
    rows = []
    for target in TARGETS:
        chosen = solve(sensitivity, space.storage_bits, target * space.numel)
        rows.append(_row(engine, space.allocation(chosen), "resnet20", f"{name}, mixed at {target:g} bits"))
    return rows


def _row(engine: QuantEngine, allocation: Allocation, net: str, case: str) -> Row:
    score, space = engine.score(allocation, "confirm"), engine.space
    bits = 32.0
    if allocation:
        bits = float(space.storage_bits[np.arange(len(space.groups)), space.choice(allocation)].sum() / space.numel)
    percent = 100 if engine.task.quality_kind == "share" else 1
    low, high = sorted((percent * score.quality_low, percent * score.quality_high))
    row: Row = {"what": net, "case": case, "value": percent * score.quality, "unit": engine.task.quality_name}
    return row | {"low": low, "high": high, "kl": score.loss, "bits": bits}


def table(wanted: Sequence[str]) -> list[Row]:
    """All rows of `wanted` ("net" or "net/quantizer", also "mixed/quantizer"); what was measured before is not again."""
    file = REPORTS / "bench_quantizers" / "rows.json"
    rows: list[Row] = json.loads(file.read_text()) if file.exists() else []
    pairs = [(net, name) for net, of in NETS.items() for name in of.quantizers]
    for net, name in [*pairs, *(("mixed", name) for name in MIXED)]:
        label = "resnet20" if net == "mixed" else net
        start = f"{name}, mixed" if net == "mixed" else f"{name}, w"
        known = any(row["what"] == label and str(row["case"]).startswith(start) for row in rows)
        if known or (wanted and net not in wanted and f"{net}/{name}" not in wanted):
            continue
        found = mixed(name) if net == "mixed" else quality(net, name)
        rows = [row for row in rows if row["what"] != "machine"] + found + [machine()]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(rows, indent=1, default=float) + "\n")
        print(*(f"{row['what']} {row['case']}: {row['value']:.4f}" for row in found), sep="\n", flush=True)
    return rows


def draw(rows: Sequence[Row], file: Path) -> None:
    """KL to the float network of every quantizer at every width, a panel a network."""
    figure, panels = plt.subplots(1, len(NETS), figsize=(3.4 * len(NETS), 3.6), layout="constrained")
    for panel, (net, of) in zip(panels, NETS.items(), strict=True):
        for i, name in enumerate(QUANTIZERS):
            found = {str(row["case"]): row["kl"] for row in rows if row["what"] == net and "kl" in row}
            places = [(j, found[f"{name}, {scheme}"]) for j, scheme in enumerate(of.schemes) if f"{name}, {scheme}" in found]
            if places:
                x, y = zip(*places, strict=True)
                panel.plot(x, y, "o-" if len(x) > 1 else "o", color=f"C{i}", markersize=4, label=name.replace("_", " "))
        panel.set(title=net, yscale="log", xticks=range(len(of.schemes)), xticklabels=of.schemes)
        panel.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("KL to the float network, nats")
    max(panels, key=lambda panel: len(panel.lines)).legend(fontsize=7)  # the one that shows them all
    figure.savefig(file, dpi=130)


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
    parser.add_argument("what", choices=["quality", "speed", "hqq"])
    parser.add_argument("wanted", nargs="*", help="quality: networks, or network/quantizer; all where none is named")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    name = "bench_quantizers" if arguments.what == "quality" else f"bench_quantizers_{arguments.what}"
    lines = [f"# bench_quantizers {arguments.what}", ""]
    if arguments.what == "quality":
        rows = table(arguments.wanted)
        lines += [
            "| network | case | quality | 95 % interval (paired) | KL to float | average bits | CPU seconds to quantize |",
            "| --- | --- | ---: | --- | ---: | ---: | ---: |",
        ]
        for row in (row for net in NETS for row in rows if row["what"] == net):
            numbers = f"{row['value']:.4g} | {row['low']:.4g} to {row['high']:.4g} | {row['kl']:.4f} | {row['bits']:.2f}"
            seconds = f"{row['cpu_seconds']:.2f}" if "cpu_seconds" in row else ""
            lines.append(f"| {row['what']} | {row['case']} | {numbers} | {seconds} |")
        lines += [
            "",
            *(f"- {net}: {of.on}." for net, of in NETS.items()),
            "",
            "Quality is accuracy in %, perplexity (less is better) or Spearman's rho. The interval is of the quantized network",
            "on these data: the float quality plus the interval of the paired difference. Average bits are those of the layers",
            "quantized, scales counted. Seconds are of one scheme; those of a quantizer's first scheme include its Hessians.",
            *(f"Machine: {row['case']}." for row in rows if row["what"] == "machine"),
        ]
        draw(rows, REPORTS / name / "quality.png")
    else:
        rows = [*{"speed": speed, "hqq": hqq}[arguments.what](), machine()]
        lines += ["| what | case | value | rival | ratio |", "| --- | --- | ---: | --- | ---: |"]
        for row in rows:
            value = f"{row['value']:.2f} {row['unit']}" if isinstance(row["value"], float) else f"{row['value']} {row['unit']}"
            rival = f"{row['rival']}: {row['rival_value']:.2f}" if "rival" in row else ""
            ratio = f"{row['ratio']:.1f}" if "ratio" in row else ""
            lines.append(f"| {row['what']} | {row['case']} | {value} | {rival} | {ratio} |")
    write(name, lines, rows, arguments.json)


if __name__ == "__main__":
    main()
