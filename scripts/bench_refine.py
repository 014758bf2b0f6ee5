"""What refiners make of allocations: KL on data on which nothing was chosen, at equal bytes, and the seconds that it takes."""

import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from harness import Row, benchmark, ratio_interval
from networks import choice, load

from mpsearch.allocation import Allocation
from mpsearch.engine.engine import QuantEngine
from mpsearch.engine.weight_bank import WeightBank
from mpsearch.intervals import cluster_values
from mpsearch.optimize.knapsack import solve
from mpsearch.pipeline.sensitivity import measure_sensitivity
from mpsearch.refiners.base import Refiner
from mpsearch.refiners.distillation import Distillation
from mpsearch.refiners.error_propagation import ErrorPropagation

WIDTHS = ("w2", "w3", "w4", "w6", "w8")
SPLITS: dict[str, dict[str, Any]] = {
    "digits": {},
    "resnet20": {"n_calibration": 500, "n_search": 500, "n_confirm": 2000},
    "stories260k": {"n_calibration": 64, "n_search": 16, "n_confirm": 64},
    "minilm": {"n_calibration": 100, "n_search": 50, "n_confirm": 400},
    "efficientnet_lite0": {"n_calibration": 128, "n_search": 72},
}


class Method(NamedTuple):
    """A quantizer, and what is done after it."""

    quantizer: str
    refiner: Refiner | None


METHODS = {
    "no refinement": Method("kronecker_descent", None),
    "GPTQ": Method("gptq", ErrorPropagation(0.01, 0.0, residuals=False)),
    "GPTAQ": Method("gptq", ErrorPropagation(0.01, 1.0, residuals=False)),
    "full step": Method("kronecker_descent", ErrorPropagation(0.1, 1.0, residuals=False)),
    "half step": Method("kronecker_descent", ErrorPropagation(0.1, 0.5, residuals=False)),
    "held out": Method("kronecker_descent", ErrorPropagation(residuals=False)),
    "held out, residuals": Method("kronecker_descent", ErrorPropagation()),
    "distillation": Method("kronecker_descent", Distillation()),
}
RIVALS = ("no refinement", "GPTQ")


def with_quantizer(engine: QuantEngine, name: str) -> QuantEngine:
    """An engine of the same model, data and calibration whose bank is quantized by another quantizer."""
    bank = engine.bank
    quantizers = dict.fromkeys(bank.space.schemes, choice("quantizer", name))
    other = WeightBank(bank.model, bank.space, quantizers, bank.calibration, bank.correction)
    return QuantEngine.from_parts(engine.scorer, other, engine.prefix_cache and engine.prefix_cache.emptied())


@functools.lru_cache(maxsize=1)
def network_of(name: str) -> tuple[QuantEngine, np.ndarray]:
    """An engine of the default quantizer, and the diagonal Fisher sensitivities of weights rounded by a clip search."""
    engine = load(name, WIDTHS, "kronecker_descent", shared=True, **SPLITS[name])
    return engine, measure_sensitivity(with_quantizer(engine, "clip_search"), choice("metric", "fisher")).losses()


def sample_losses(engine: QuantEngine, allocation: Allocation) -> np.ndarray:
    """The divergence from the float model of each independent sample of the confirm split, float64 `[n]`."""
    reference = engine.float_logits("confirm")
    with engine.applied(allocation) as model, torch.no_grad():
        outputs = torch.cat([engine.task.forward(model, inputs) for inputs, _ in engine.batches("confirm")])
    losses = engine.divergence.rows(outputs, reference).double().cpu().numpy()
    clusters = engine.task.clusters("confirm")
    return losses if clusters is None else cluster_values(losses, clusters.numpy())


def compared(network: str, bits: float, methods: Sequence[str]) -> Iterator[Row]:
    """A row for each method, on one allocation of `bits` per weight: the exact additive solution of the sensitivities."""
    engine, losses = network_of(network)
    space = engine.space
    allocation = space.allocation(solve(losses, space.storage_bits, bits * space.numel))
    measured: dict[str, tuple[np.ndarray, float]] = {}
    for name in methods:
        method = METHODS[name]
        base = engine if method.quantizer == "kronecker_descent" else with_quantizer(engine, method.quantizer)
        start = time.process_time()
        refined = base if method.refiner is None else method.refiner.start(base)(allocation)
        seconds = time.process_time() - start
        measured[name] = sample_losses(refined, allocation), seconds
    for name, (losses, seconds) in measured.items():
        rival, gptq = (measured[rival][0] for rival in RIVALS)
        kl, other = float(losses.mean()), float(rival.mean())
        low, high = ratio_interval(losses, rival)
        row = {"case": name, "method": name, "value": kl, "unit": "nats", "rival": RIVALS[0], "rival_value": other}
        row |= {"ratio": other / kl, "kl": kl, "kl_ratio": kl / other, "low": low, "high": high}
        yield {"what": "KL", **row, "over_gptq": kl / float(gptq.mean()), "cpu_seconds": seconds}


CHART = {"x": "bits", "y": "kl_ratio", "line": "method", "panel": "network", "log": ""}


@benchmark(
    "refine",
    network=tuple(SPLITS),
    bits=(2.25, 2.5, 3.0, 4.0),
    quick={"network": ("digits",), "bits": (2.5,)},
    chart=CHART,
)
def refine(network: str, bits: float) -> Iterator[Row]:
    """The default refiner on the exact additive solution of diagonal Fisher sensitivities at `bits` per weight.

    `kl` is measured on the confirm split, on which nothing is chosen, of the same allocation and bytes throughout; `kl_ratio` and
    its 95 % interval (a bootstrap of the samples) compare it with the allocation as `kronecker_descent` quantizes it, `ratio` is
    its inverse, `over_gptq` compares it with GPTQ as its authors run it: layer after layer, on the inputs that quantized layers
    make (Frantar et al. 2023). Processor seconds are those of the refinement, quantizing again included. A search keeps refined
    weights only where their loss on the search split is lower; here they count in any case.
    """
    yield from compared(network, bits, (*RIVALS, "held out, residuals"))


@benchmark(
    "refine_methods",
    network=("digits", "resnet20", "stories260k"),
    bits=(2.5,),
    quick={"network": ("digits",)},
    chart=CHART | {"x": "network", "panel": "what"},
)
def refine_methods(network: str, bits: float) -> Iterator[Row]:
    """Refiners on the same allocations; see bench_refine for the columns.

    `GPTAQ` (Li et al. 2025) regresses on the quantized inputs; `full step` and `half step` (QEP: Arai and Ichikawa 2025) do so
    with the default quantizer; `held out` chooses damping and step for each layer on samples that neither was fitted to;
    `residuals` makes up for the errors that a residual connection brings, too, which is the default, `error_propagation`;
    `distillation` then trains codes, scales and biases by the KL of the outputs, and takes the result with the lowest loss on the
    search split.
    """
    yield from compared(network, bits, tuple(METHODS))
