"""What this machine's kernels can run, and how fast: its processor, a self-test, and the latency of each layer in each scheme.

The latency of a network is modelled as the sum over its layers and a constant rest. Layers run on packed weights with the inputs
that they get in the network, in its order, so that caches are about as warm; each figure is the median over rounds that go
through all layers. The rest is the time of whole packed networks, one scheme in all layers, beyond that sum.
"""

from __future__ import annotations

import functools
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch import kernels
from mpsearch.allocation import SearchSpace
from mpsearch.costs.latency import FLOAT, REST, Latency
from mpsearch.evaluation import Timing
from mpsearch.graph.surgery import hooked
from mpsearch.layer import LayerSpec, weight_rows
from mpsearch.packed.layers import QuantizedLayer, kernel_for
from mpsearch.packed.model import installed
from mpsearch.progress import phase
from mpsearch.quantizers.base import Quantizer
from mpsearch.schemes.base import QuantScheme
from mpsearch.tree import tensors_in

LEAST_ROUNDS, MOST_ROUNDS = 7, 100
READ_BYTES = 256 * 2**20

Run = Callable[[], object]
Forward = Callable[[nn.Module, Any], Tensor]


def measure_latency(
    model: nn.Module,
    forward: Forward,
    space: SearchSpace,
    quantizers: Mapping[str, Quantizer],
    inputs: Any,
    seconds: float = 10.0,
) -> list[Latency]:
    """Latency of every layer in every scheme that it may take, of the float layers, and of the rest of the network.

    Parameters
    ----------
    model
        In eval mode, on the CPU or a GPU; left as it was.
    inputs
        One batch of the intended size.
    seconds
        About how long to measure.
    """
    calls = _recorded(model, forward, space.layers, inputs)
    allowed = {la.name: names for group, names in zip(space.groups, space.choices, strict=True) for la in group.layers}
    n = next(len(tensor) for tensor in tensors_in(inputs) if tensor.ndim)
    conditions = (n, torch.get_num_threads(), kernels.active_backend())
    rows, shares = [], 1 + len(space.scheme_names)
    for scheme in (FLOAT, *space.scheme_names):  # one at a time: all together they would evict one another's weights
        layers = [layer for layer in space.layers if scheme == FLOAT or scheme in allowed[layer.name]]
        shapes = {la.name: " ".join("x".join(map(str, x.shape)) for m in la.modules for x in _inputs(calls[m])) for la in layers}
        # Layers that are alike in everything are measured once.
        keys = {la.name: f"{[str(model.get_submodule(m)) for m in la.modules]} {la.shape} {shapes[la.name]}" for la in layers}
        quantized = [] if scheme == FLOAT else [_quantized(model, la, quantizers[scheme], space.schemes[scheme]) for la in layers]
        with installed(model, quantized):
            runs = {keys[layer.name]: _run_of(model, layer, calls) for layer in layers}
            milliseconds = _medians(runs, seconds / shares, f"latency of {scheme}")
        for layer in layers:
            op = layer.kind if scheme == FLOAT else kernel_for(layer.kind, layer.shape, space.schemes[scheme]) or "dequantize"
            rows.append(Latency(layer.name, op, shapes[layer.name], scheme, *conditions, milliseconds[keys[layer.name]]))
    measured = {(row.layer, row.scheme): row.milliseconds for row in rows}
    beyond = []  # what whole networks take beyond the sum of their layers
    for name in space.scheme_names:
        pairs = space.layer_schemes(space.uniform(name))
        with installed(model, [_quantized(model, layer, quantizers[s], space.schemes[s]) for layer, s in pairs]):
            whole = _medians({REST: lambda: forward(model, inputs)}, seconds / (shares - 1))[REST]
        beyond.append(whole - sum(measured[layer.name, s] for layer, s in pairs))
    return [Latency(REST, "", "", "", *conditions, max(median(beyond), 0.0)), *rows]


@torch.no_grad()
def model_latency(models: Mapping[str, nn.Module], forward: Forward, inputs: Any, seconds: float) -> dict[str, Timing]:
    """One forward pass of each model on `inputs`, of interleaved calls that take about `seconds` together."""
    runs = {name: functools.partial(forward, model, inputs) for name, model in models.items()}
    tensor = next(tensors_in(inputs))
    where = f"{_machine(tensor.device)}, batch of {len(tensor) if tensor.dim() else 1}"
    timings = {}
    for name, values in _rounds(runs, seconds).items():
        low, middle, high = quantiles(values, n=4)
        timings[name] = Timing(middle, low, high, where)
    return timings


@dataclass(frozen=True)
class _Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@torch.no_grad()
def _recorded(model: nn.Module, forward: Forward, layers: Sequence[LayerSpec], inputs: Any) -> dict[str, list[_Call]]:
    """Module name -> its calls in one forward pass."""
    calls: dict[str, list[_Call]] = {name: [] for layer in layers for name in layer.modules}

    def hook_for(name: str) -> Any:
        return lambda module, args, kwargs, output: calls[name].append(_Call(args, kwargs, output))

    with hooked(after=[(model.get_submodule(name), hook_for(name)) for name in calls]):
        forward(model, inputs)
    return calls


def _inputs(calls: Sequence[_Call]) -> Iterator[Tensor]:
    return (next(tensors_in((call.args, call.kwargs))) for call in calls)


def _run_of(model: nn.Module, layer: LayerSpec, calls: Mapping[str, list[_Call]]) -> Run:
    """All calls of the layer's modules in one forward pass."""
    pairs = [(model.get_submodule(name), call) for name in layer.modules for call in calls[name]]

    def run() -> None:
        for module, call in pairs:
            module(*call.args, **call.kwargs)

    return run


def _quantized(model: nn.Module, layer: LayerSpec, quantizer: Quantizer, scheme: QuantScheme) -> QuantizedLayer:
    weight = weight_rows(model.get_submodule(layer.modules[0])).float().cpu()
    return QuantizedLayer(layer.kind, layer.modules, quantizer.quantize(weight, scheme))


@torch.no_grad()
def _medians(runs: Mapping[str, Run], seconds: float, what: str = "") -> dict[str, float]:
    """Milliseconds of each, the median over rounds of all."""
    return {name: median(values) for name, values in _rounds(runs, seconds, what).items()}


def _rounds(runs: Mapping[str, Run], seconds: float, what: str = "") -> dict[str, list[float]]:
    """Milliseconds of each run in each round; the first round warms up and determines the number of rounds."""
    once = sum(_milliseconds(run) for run in runs.values())
    n_rounds = min(max(round(1e3 * seconds / max(once, 1e-3)), LEAST_ROUNDS), MOST_ROUNDS)
    times: dict[str, list[float]] = {name: [] for name in runs}
    with phase(what, n_rounds) if what else nullcontext(lambda note="": None) as advance:
        for _ in range(n_rounds):
            for name, run in runs.items():
                times[name].append(_milliseconds(run))
            advance("")
    return times


def _milliseconds(run: Run) -> float:
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return 1e3 * (time.perf_counter() - start)


def facts() -> dict[str, str]:
    """Processor, caches, instruction sets, read bandwidth and GPUs, described in words."""
    used, threads = kernels.active_backend(), torch.get_num_threads()
    known = {
        "processor": f"{_processor()}, {len(os.sched_getaffinity(0))} cores, {threads} threads used",
        "caches": _caches(),
        "kernels": ", ".join(f"{name} (used)" if name == used else name for name in kernels.available_backends()),
        "read bandwidth": ", ".join(f"{_read_rate(n):.1f} GB/s with {n} threads" for n in sorted({1, threads})),
    }
    if not torch.cuda.is_available():
        return {**known, "GPU": "none answers"}
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        memory = f"{p.total_memory / 2**30:.0f} GiB, {p.multi_processor_count} multiprocessors"
        known[f"cuda:{i}"] = f"{p.name}, compute capability {p.major}.{p.minor}, {memory}"
    return known


def self_test() -> list[tuple[str, int, int]]:
    """Each backend of the kernels against the specification: (backend, cases, cases that differ).

    Codes, packed bits and products with int8 inputs must be equal to the bit, products with float inputs within their bound.
    """
    report = []
    for backend in kernels.available_backends()[1:]:
        cases = [_differs(backend, bits, symmetric) for bits in range(1, 9) for symmetric in (True, False)]
        report.append((backend, len(cases), sum(cases)))
    return report


def _differs(backend: str, bits: int, symmetric: bool) -> bool:
    generator = torch.Generator().manual_seed(bits)
    weight, x = torch.randn(37, 150, generator=generator), torch.randn(5, 150, generator=generator)
    settings: dict[str, Any] = {"bits": bits, "group_size": 64, "symmetric": symmetric, "ratios": torch.tensor([1.0, 0.9, 0.8])}
    results = []
    for name in ("reference", backend):
        with kernels.use_backend(name):
            codes, scales, zero_points = kernels.quantize(weight, **settings)
            packed = kernels.pack_weight(codes, scales, zero_points, bits=bits, group_size=64)
            dense = kernels.dequantize(
                kernels.pack(codes, bits), scales, zero_points, bits=bits, rows=37, columns=150, group_size=64
            )
            results.append((codes, scales, dense, kernels.rotate(x), kernels.linear_a8(x, packed), kernels.linear(x, packed)))
    *exact, products = zip(*results, strict=True)
    bound = 158 * 2**-24 * (x.abs() @ results[0][2].abs().T)
    return not all(torch.equal(a, b) for a, b in exact) or bool(((products[0] - products[1]).abs() > bound).any())


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    n = torch.get_num_threads()
    return f"{_processor()}, {n} thread{'s' if n > 1 else ''}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _caches() -> str:
    folders = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"))
    described = [[(folder / name).read_text().strip() for name in ("level", "type", "size")] for folder in folders]
    return ", ".join(f"L{level} {size}" for level, kind, size in described if kind != "Instruction") or "unknown"


def _read_rate(n_threads: int) -> float:
    """GB/s at which a dot product reads memory that no cache holds."""
    before = torch.get_num_threads()
    data = torch.ones(READ_BYTES // 4)
    torch.set_num_threads(n_threads)
    try:
        best = min(_milliseconds(lambda: torch.dot(data, data)) for _ in range(5))
    finally:
        torch.set_num_threads(before)
    return READ_BYTES / best / 1e6
