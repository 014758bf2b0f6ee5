"""Times whole networks on packed weights against PyTorch's float32, and what was predicted for them against what they take.

    python scripts/bench_latency.py [--json FILE] [--batch-sizes 1 64] [--threads 1 2] [--seconds 5] [--allocations 20]

ResNet-20 on 32 x 32 images (batch norms folded on both sides), a transformer of MiniLM's shapes (6 layers, width 384, 128 tokens)
and an MLP (784-1024-1024-10), random weights: time does not depend on them. The networks are called in turn in this process; the
figures are medians. PyTorch's OpenMP threads spin briefly, as under the mpsearch command. Predictions are sums of the table that
`mpsearch hardware` measures; their error is the median over random allocations. A ratio above 1 says that the packed network is
faster.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as the mpsearch command sets it, for both sides

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpsearch import kernels
from mpsearch.allocation import Allocation, SearchSpace
from mpsearch.costs.latency import REST
from mpsearch.graph.fold import fold_batch_norms
from mpsearch.graph.trace import trace_layers
from mpsearch.layer import weight_rows
from mpsearch.models.resnet import ResNet
from mpsearch.packed.hardware import facts, measure_latency, model_latency
from mpsearch.packed.model import QuantizedLayer, pack
from mpsearch.quantizers.round_to_nearest import RoundToNearest
from mpsearch.schemes.input import IntegerInput
from mpsearch.schemes.integer import Integer

A8 = IntegerInput(8)
SCHEMES = {
    "w4": Integer(4),
    "w2a8": Integer(2, input=A8),
    "w4a8": Integer(4, input=A8),
    "w6a8": Integer(6, input=A8),
    "w8a8": Integer(8, input=A8),
    "w4a8g64": Integer(4, 64, symmetric=False, input=A8),
    "w8a8 static": Integer(8, input=IntegerInput(8, "static")),
    "w8a8 static asymmetric": Integer(8, input=IntegerInput(8, "static", symmetric=False)),
    "w4a4": Integer(4, input=IntegerInput(4, symmetric=False)),
}
PREDICTED = ("w4", "w2a8", "w4a8", "w6a8", "w8a8")


class Attention(nn.Module):
    """Post-norm transformer layer, as in BERT (Devlin et al. 2019)."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.dense, self.up, self.down = nn.Linear(width, width), nn.Linear(width, inner), nn.Linear(inner, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        q, k, v = (of(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for of in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.norms[0](x + self.dense(attended))
        return self.norms[1](x + self.down(F.gelu(self.up(x))))


class MiniLM(nn.Module):
    """Token numbers [n, 128] -> sentence embeddings [n, 384]; the shapes of all-MiniLM-L6-v2."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(30_522, 384), nn.Embedding(512, 384)
        self.layers = nn.Sequential(*(Attention(384, 12, 1536) for _ in range(6)))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return self.layers(self.words(x) + self.places(torch.arange(x.shape[1]))).mean(1)


def networks() -> dict[str, tuple[nn.Module, Callable[[int], Tensor]]]:
    """Name -> network, and what makes a batch of inputs for it."""
    sizes = (784, 1024, 1024, 10)
    layers = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return {
        "ResNet-20": (ResNet(20), lambda n: torch.randn(n, 3, 32, 32)),
        "MiniLM": (MiniLM(), lambda n: torch.randint(30_522, (n, 128))),
        "MLP": (nn.Sequential(*layers[:-1]), lambda n: torch.randn(n, 784)),
    }


def forward(model: nn.Module, inputs: Any) -> Tensor:
    return model(inputs)


def packed_copy(net: nn.Module, space: SearchSpace, allocation: Allocation) -> nn.Module:
    layers = []
    for layer in space.layers:
        weight = RoundToNearest().quantize(weight_rows(net.get_submodule(layer.name)), SCHEMES[allocation[layer.name]])
        layers.append(QuantizedLayer(layer.kind, layer.modules, weight))
    return pack(copy.deepcopy(net), layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=5.0, help="of measuring for each table")
    parser.add_argument("--allocations", type=int, default=20, help="random ones, to compare predictions with")
    parser.add_argument("--networks", nargs="+", default=list(networks()))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    machine = (
        f"{facts()['processor'].split(',')[0]}, {os.cpu_count()} cores, torch {torch.__version__}, {kernels.active_backend()}"
    )
    print(machine)
    rows: list[dict[str, Any]] = [{"what": "machine", "case": machine}]

    for name, (net, make) in networks().items():
        if name not in options.networks:
            continue
        torch.manual_seed(0)
        net.eval().requires_grad_(False)
        if name == "ResNet-20":
            fold_batch_norms(net, forward, make(2))
        space = SearchSpace.build(trace_layers(net, forward, make(1)), SCHEMES)
        variants = {scheme: packed_copy(net, space, space.uniform(scheme)) for scheme in SCHEMES}
        for n_threads in options.threads:
            torch.set_num_threads(n_threads)
            for batch_size in options.batch_sizes:
                inputs = make(batch_size)
                timings = model_latency({"float32": net, **variants}, forward, inputs, options.seconds)
                taken = {name: timing.median for name, timing in timings.items()}
                base = taken.pop("float32")
                case = f"{name}, batch {batch_size}, {n_threads} threads"
                print(f"\n{case}: torch float32 {base:.3f} ms")
                for scheme, ms in taken.items():
                    print(f"  {scheme:<22} {ms:9.3f} ms {base / ms:6.2f} x float32")
                    of = {"what": "latency", "case": f"{case}, {scheme}", "value": ms, "unit": "ms"}
                    rows.append({**of, "rival": "torch float32", "rival_value": base, "ratio": base / ms})
                rows.append(predictions(net, space, inputs, case, options))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


def predictions(net: nn.Module, whole: SearchSpace, inputs: Tensor, case: str, options: argparse.Namespace) -> dict[str, Any]:
    """How far the sums of the layers' latencies are from what networks of random allocations take."""
    space = SearchSpace.build(whole.layers, {scheme: SCHEMES[scheme] for scheme in PREDICTED})
    table = measure_latency(net, forward, space, dict.fromkeys(PREDICTED, RoundToNearest()), inputs, options.seconds)
    found = {(row.layer, row.scheme): row.milliseconds for row in table}
    draw = random.Random(0)
    drawn = [Allocation((g, draw.choice(PREDICTED)) for g in space.names) for _ in range(options.allocations)]
    errors = []
    for allocation in drawn:  # each alone: called in turn they would evict one another's weights
        model = packed_copy(net, space, allocation)
        taken = model_latency({"": model}, forward, inputs, options.seconds / len(drawn))[""].median
        errors.append((found[REST, REST] + sum(found[pair] for pair in allocation.items())) / taken - 1)
    off = statistics.median(abs(error) for error in errors)
    print(f"  predicted: {100 * off:.1f} % off (median of {len(errors)}), mean bias {100 * statistics.fmean(errors):+.1f} %")
    return {"what": "prediction", "case": case, "value": off, "unit": "relative error, median"}


if __name__ == "__main__":
    main()
