"""What an evaluation and a sensitivity cost, and how well sensitivity metrics rank layers."""

import time
from collections.abc import Iterator

import numpy as np
import torch
from harness import Row, benchmark, interleaved, ratio_row
from networks import choice, load, quantize_all
from scipy.stats import kendalltau

from mpsearch.allocation import Allocation
from mpsearch.engine.engine import FLOAT, QuantEngine
from mpsearch.pipeline.sensitivity import measure_sensitivity

SCHEMES = ("w2", "w3", "w4", "w5", "w6", "w8")
SPLITS = {"digits": {}, "resnet20": {"n_calibration": 1000, "batch_size": 250}}


def engine_of(network: str, prefix_max_bytes: int = 0, seed: int = 0) -> QuantEngine:
    """With everything quantized, which is no part of what is measured."""
    load.cache_clear()
    engine = load(network, SCHEMES, prefix_max_bytes=prefix_max_bytes, seed=seed, **SPLITS[network])
    quantize_all(engine)
    engine.float_logits("search")
    return engine


def random_allocations(engine: QuantEngine, n: int) -> list[Allocation]:
    rng, space = np.random.default_rng(0), engine.space
    return [space.allocation(rng.integers(0, len(space.schemes), len(space.names))) for _ in range(n)]


@benchmark(
    "resnet20_overhead",
    network=("resnet20",),
    allocations=(30,),
    seconds=(10.0,),
    quick={"network": ("digits",), "allocations": (3,), "seconds": (0.01,)},
)
def overhead(network: str, allocations: int, seconds: float) -> Iterator[Row]:
    """Scoring an allocation, and swapping one in and out, against the bare forward passes over the same data."""
    engine = engine_of(network)
    drawn = random_allocations(engine, allocations)
    scored = [engine.score(allocation).seconds for allocation in drawn]

    def forward() -> None:
        with torch.no_grad():
            torch.cat([engine.task.forward(engine.model, x) for x, _ in engine.batches("search")])

    def swap() -> None:
        with engine.applied(drawn[0]):
            pass

    times = interleaved({"forward": forward, "swap in and out": swap}, seconds)
    yield {"case": "score"} | ratio_row(float(np.median(scored)), "bare forward passes", times["forward"])
    yield {"case": "swap in and out"} | ratio_row(times["swap in and out"], "bare forward passes", times["forward"])


@benchmark(
    "prefix",
    network=("digits", "resnet20"),
    allocations=("sensitivity sweep", "neighbours", "random"),
    n=(120,),
    quick={"network": ("digits",), "allocations": ("neighbours",), "n": (5,)},
)
def prefix(network: str, allocations: str, n: int) -> Iterator[Row]:
    """Prefix reuse against whole passes, each allocation scored by both in turn; their scores are equal bit for bit.

    The sensitivity sweep changes one layer at a time; `neighbours` walks from allocation to allocation by one change, as
    searches do; `random` leaves little to reuse.
    """
    with_reuse, without = engine_of(network, 10**9), engine_of(network)
    space, rng = with_reuse.space, np.random.default_rng(0)
    if allocations == "sensitivity sweep":
        drawn = [Allocation({group: scheme}) for group in space.names for scheme in space.schemes][:n]
    else:
        drawn = random_allocations(with_reuse, n)
    if allocations == "neighbours":
        for i in range(1, n):
            change = {space.names[rng.integers(len(space.names))]: space.scheme_names[rng.integers(len(space.schemes))]}
            drawn[i] = Allocation({**drawn[i - 1], **change})
    seconds = {with_reuse: 0.0, without: 0.0}
    for i, allocation in enumerate([FLOAT, *drawn]):
        scores = {}
        for engine in (with_reuse, without)[:: 1 if i % 2 else -1]:
            start = time.process_time()
            scores[engine] = engine.score(allocation)
            seconds[engine] += time.process_time() - start
        if scores[with_reuse] != scores[without]:
            raise AssertionError(f"{allocation}: {scores[with_reuse]} with reuse, {scores[without]} without")
    yield ratio_row(seconds[with_reuse], "whole passes", seconds[without], "s")


@benchmark(
    "resnet20_metrics",
    metric=("kl", "task_loss", "sqnr", "gauss_newton", "fisher", "hawq", "weight_mse"),
    network=("resnet20",),
    quick={"metric": ("sqnr",), "network": ("digits",)},
)
def metrics(metric: str, network: str) -> Iterator[Row]:
    """Kendall's tau of each metric's values with the measured KL divergence on the search data, and processor seconds.

    Of all values, and the mean over schemes of the layers' within a scheme. `kl` is measured on other data of the same size: the
    ceiling.
    """
    reference = measure_sensitivity(engine_of(network), choice("metric", "kl")).values
    engine = engine_of(network, seed=1 if metric == "kl" else 0)
    start = time.process_time()
    values = measure_sensitivity(engine, choice("metric", metric)).values
    seconds = time.process_time() - start
    within = [kendalltau(reference[:, j], values[:, j]).statistic for j in range(values.shape[1])]
    yield {"what": "all values", "value": float(kendalltau(reference, values).statistic), "unit": "tau"}
    yield {"what": "layers within a scheme", "value": float(np.mean(within)), "unit": "tau"}
    yield {"what": "cost", "value": seconds, "unit": "s"}
