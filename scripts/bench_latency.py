"""Whole networks on packed weights against PyTorch's float32, and predicted against measured latency."""

import functools
import itertools
import random
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import Row, benchmark, ratio_row
from networks import packed_copy
from torch import Tensor, nn

from mpsearch.allocation import Allocation, SearchSpace
from mpsearch.costs.latency import REST
from mpsearch.graph.fold import fold_batch_norms
from mpsearch.graph.trace import trace_layers
from mpsearch.models.bert import Bert, Sizes
from mpsearch.models.resnet import ResNet
from mpsearch.packed.hardware import measure_latency, model_latency
from mpsearch.quantizers.round_to_nearest import RoundToNearest
from mpsearch.schemes.input import IntegerInput
from mpsearch.schemes.integer import Integer

A8 = IntegerInput(8)
PREDICTED = {
    "w4": Integer(4),
    "w2a8": Integer(2, input=A8),
    "w4a8": Integer(4, input=A8),
    "w6a8": Integer(6, input=A8),
    "w8a8": Integer(8, input=A8),
}
SCHEMES = PREDICTED | {
    "w4a8g64": Integer(4, 64, symmetric=False, input=A8),
    "w8a8 static": Integer(8, input=IntegerInput(8, "static")),
    "w8a8 static asymmetric": Integer(8, input=IntegerInput(8, "static", symmetric=False)),
    "w4a4": Integer(4, input=IntegerInput(4, symmetric=False)),
}


def mlp() -> nn.Module:
    """784-1024-1024-10."""
    layers = [m for a, b in itertools.pairwise((784, 1024, 1024, 10)) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {  # the network, a batch of inputs for it
    "resnet20": (lambda: ResNet(20), lambda n: torch.randn(n, 3, 32, 32)),
    "minilm": (lambda: Bert(Sizes()), lambda n: torch.randint(1000, 30_000, (n, 128))),
    "mlp": (mlp, lambda n: torch.randn(n, 784)),
}


def forward(model: nn.Module, inputs: Any) -> Tensor:
    return model(inputs)


@functools.lru_cache(maxsize=1)
def built(name: str) -> tuple[nn.Module, SearchSpace]:
    """With random weights, on which time does not depend, batch norms folded."""
    torch.manual_seed(0)
    build, inputs = NETWORKS[name]
    net = build().eval().requires_grad_(False)
    fold_batch_norms(net, forward, inputs(2))
    return net, SearchSpace.build(trace_layers(net, forward, inputs(1)), SCHEMES)


@benchmark(
    "latency",
    network=tuple(NETWORKS),
    batch=(1, 64),
    threads=(1, 2),
    seconds=(5.0,),
    allocations=(20,),
    quick={"network": ("mlp",), "batch": (1,), "threads": (1,), "seconds": (0.01,), "allocations": (1,)},
)
def latency(network: str, batch: int, seconds: float, allocations: int) -> Iterator[Row]:
    """Networks on packed weights against PyTorch's float32, called in turn, and what was predicted against what they take.

    ResNet-20 on 32 x 32 images, all-MiniLM-L6-v2 on 128 tokens and an MLP, random weights. Predictions are sums of the table that
    `mpsearch hardware` measures; their error is the median over random allocations.
    """
    (net, space), inputs = built(network), NETWORKS[network][1](batch)
    packed = {scheme: packed_copy(net, dict.fromkeys(space.names, SCHEMES[scheme])) for scheme in SCHEMES}
    times = {name: time.median for name, time in model_latency({"float32": net, **packed}, forward, inputs, seconds).items()}
    for scheme in SCHEMES:
        yield {"case": scheme} | ratio_row(times[scheme] / 1e3, "torch float32", times["float32"] / 1e3)
    predicted = SearchSpace.build(space.layers, PREDICTED)
    table = measure_latency(net, forward, predicted, dict.fromkeys(PREDICTED, RoundToNearest()), inputs, seconds)
    milliseconds = {(row.layer, row.scheme): row.milliseconds for row in table}
    draw, errors = random.Random(0), []
    for _ in range(allocations):  # each alone: called in turn they would evict one another's weights
        allocation = Allocation((group, draw.choice(list(PREDICTED))) for group in predicted.names)
        model = packed_copy(net, {name: SCHEMES[scheme] for name, scheme in allocation.items()})
        taken = model_latency({"": model}, forward, inputs, seconds / allocations)[""].median
        errors.append((milliseconds[REST, REST] + sum(milliseconds[pair] for pair in allocation.items())) / taken - 1)
    yield {"what": "prediction", "value": statistics.median(map(abs, errors)), "unit": "relative error, median"}
