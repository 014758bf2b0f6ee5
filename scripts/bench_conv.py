"""Times convolutions with packed weights against PyTorch's float32 and int8 ones, interleaved in this process.

    python scripts/bench_conv.py [--json FILE] [--batches 1 64] [--threads 1 2] [--seconds 0.2]

The layers of ResNet-20 (CIFAR) and some of ImageNet networks, alone, then the whole of ResNet-20, batch norms folded: weights of
4 and 8 bits, symmetric, a float16 scale a channel; with float32 input (`w4`), with the input quantized to int8 with a scale a
sample (`w4a8`) or a static one (`w4a8 static`). All take and give contiguous float32. Of PyTorch's float32 convolution the better
of contiguous and channels-last counts; its int8 convolution (fbgemm) is timed without quantizing its input and dequantizing its
result. Every call is timed alone, in shuffled order; the figure is the lower quartile. A ratio above 1 says that the kernels are
faster.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import random
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from mpsearch import kernels
from mpsearch.graph.fold import fold_batch_norms
from mpsearch.models.resnet import resnet

FLOAT, INT8 = "torch float32", "torch int8"
FLOATS = (FLOAT, f"{FLOAT}, channels-last")
STATIC_SCALE = 0.03
# name: in channels, out channels, height and width of the input, kernel, stride, groups
LAYERS = {
    "resnet20 stem 3x3 3-16 @32": (3, 16, 32, 3, 1, 1),
    "resnet20 3x3 16-16 @32": (16, 16, 32, 3, 1, 1),
    "resnet20 3x3/2 16-32 @32": (16, 32, 32, 3, 2, 1),
    "resnet20 3x3 32-32 @16": (32, 32, 16, 3, 1, 1),
    "resnet20 3x3/2 32-64 @16": (32, 64, 16, 3, 2, 1),
    "resnet20 3x3 64-64 @8": (64, 64, 8, 3, 1, 1),
    "3x3 64-64 @56": (64, 64, 56, 3, 1, 1),
    "1x1 256-64 @56": (256, 64, 56, 1, 1, 1),
    "7x7/2 3-64 @224": (3, 64, 224, 7, 2, 1),
    "depthwise 3x3 128 @28": (128, 128, 28, 3, 1, 128),
    "depthwise 5x5 128 @28": (128, 128, 28, 5, 1, 128),
}
Run = Callable[[Tensor], object]


class PackedLayer(nn.Module):
    """A Conv2d layer on the packed kernels; `how` is "", "a8" or "a8 static"."""

    def __init__(self, layer: nn.Conv2d, bits: int, how: str) -> None:
        super().__init__()
        rows = layer.weight.detach().flatten(1).contiguous()
        quantized = kernels.quantize(rows, bits=bits, group_size=rows.shape[1], symmetric=True)
        self.weight = kernels.pack_conv(
            *quantized, bits=bits, group_size=rows.shape[1], kernel_size=layer.kernel_size, groups=layer.groups
        )
        self.bias = None if layer.bias is None else layer.bias.detach()
        self.options = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        self.run = kernels.conv_a8 if how else kernels.conv
        if how == "a8 static":
            self.options["input_scale"] = STATIC_SCALE

    def forward(self, x: Tensor) -> Tensor:
        """The layer's result."""
        return self.run(x, self.weight, self.bias, **self.options)


def pack_layers(model: nn.Module, bits: int, how: str) -> nn.Module:
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d):
                setattr(parent, name, PackedLayer(child, bits, how))
    return model


def ours(model: nn.Module) -> dict[str, Run]:
    return {
        f"w{bits}{how}": PackedLayer(model, bits, how) if isinstance(model, nn.Conv2d) else pack_layers(model, bits, how)
        for bits in (4, 8)
        for how in ("", "a8", "a8 static")
    }


def floats(model: nn.Module, x: Tensor) -> dict[str, Run]:
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    x_last = x.contiguous(memory_format=torch.channels_last)
    return dict(zip(FLOATS, (model, lambda _: last(x_last)), strict=True))


def int8(layer: nn.Conv2d, x: Tensor) -> Run:
    warnings.filterwarnings("ignore", message="torch.quantize_per")  # deprecated; the convolution is what is measured
    scales = layer.weight.detach().abs().flatten(1).amax(1) / 127
    weight = torch.quantize_per_channel(
        layer.weight.detach(), scales, torch.zeros(len(scales), dtype=torch.int64), 0, torch.qint8
    )
    packed = torch.ops.quantized.conv2d_prepack(
        weight, layer.bias.detach(), layer.stride, layer.padding, layer.dilation, layer.groups
    )
    quantized = torch.quantize_per_tensor(x, STATIC_SCALE, 128, torch.quint8).contiguous(memory_format=torch.channels_last)
    return lambda _: torch.ops.quantized.conv2d(quantized, packed, 0.1, 128)


def timed(run: Run, x: Tensor) -> float:
    begin = time.perf_counter()
    run(x)
    return time.perf_counter() - begin


def measure(candidates: dict[str, Run], x: Tensor, seconds: float) -> dict[str, float]:
    """The lower quartile of each candidate's calls, which take about `seconds` each together."""
    calls = []
    for name, run in candidates.items():
        once = min(timed(run, x) for _ in range(3))
        calls += [name] * min(max(int(seconds / once), 5), 300)
    random.Random(0).shuffle(calls)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for name in calls:
        times[name].append(timed(candidates[name], x))
    return {name: statistics.quantiles(taken, n=4)[0] for name, taken in times.items()}


def report(case: str, times: dict[str, float]) -> list[dict[str, object]]:
    """A line of the table, and its rows."""
    best = min(times[name] for name in FLOATS)
    rivals = {FLOAT: best} | ({INT8: times[INT8]} if INT8 in times else {})
    packed = [name for name in times if name.startswith("w")]
    print(f"{case:<44}", *(f"{1e3 * rivals[r]:>9.3f}" if r in rivals else f"{'-':>9}" for r in (FLOAT, INT8)), end="")
    print(*(f"{1e3 * times[name]:>10.3f} {best / times[name]:>4.1f}x" for name in packed), flush=True)
    return [
        {
            "what": "time",
            "case": f"{name}, {case}",
            "value": 1e3 * times[name],
            "unit": "ms",
            "rival": rival,
            "rival_value": 1e3 * taken,
            "ratio": taken / times[name],
        }
        for name in packed
        for rival, taken in rivals.items()
    ]


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=0.2, help="of calls for each candidate and case")
    parser.add_argument("--backend", default=kernels.active_backend(), help=f"one of {', '.join(kernels.available_backends())}")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    torch.backends.quantized.engine = "fbgemm"
    torch.manual_seed(0)
    machine = f"{cpu_name()}, torch {torch.__version__}, backend {options.backend}"
    print(f"Milliseconds, lower quartiles, and times as fast as {FLOAT}; {machine}")
    kinds = [f"w{bits}{how}" for bits in (4, 8) for how in ("", "a8", "a8 static")]
    print(f"{'':<44}", f"{'float32':>9} {'int8':>9}", *(f"{kind:>15}" for kind in kinds))
    rows: list[dict[str, object]] = [{"what": "machine", "case": machine}]
    net = resnet(20)
    fold_batch_norms(net, lambda model, x: model(x), torch.randn(1, 3, 32, 32))
    cases = {
        name: (nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups), (c_in, size, size))
        for name, (c_in, c_out, size, kernel, stride, groups) in LAYERS.items()
    }
    cases["resnet20, the whole network"] = (net, (3, 32, 32))
    with torch.inference_mode(), kernels.use_backend(options.backend):
        for n_threads in options.threads:
            torch.set_num_threads(n_threads)
            for batch in options.batches:
                for name, (model, shape) in cases.items():
                    x = torch.randn(batch, *shape)
                    candidates = floats(model, x) | ours(model)
                    if isinstance(model, nn.Conv2d):
                        candidates[INT8] = int8(model, x)
                    times = measure(candidates, x, options.seconds)
                    rows += report(f"{name}, batch {batch}, {n_threads} threads", times)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
