"""The contract of the sensitivity metrics: the loss increase when one group alone takes a scheme.

To add a metric: write `metrics/<name>.py` with a subclass of `SensitivityMetric` (or of `MeasuredMetric`, which scores the model
for every pair), and `conf/metric/<name>.yaml` with its `_target_`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from mpsearch.allocation import Allocation
from mpsearch.divergence import Divergence
from mpsearch.engine.engine import QuantEngine
from mpsearch.evaluation import Score
from mpsearch.executors.base import Executor
from mpsearch.executors.in_process import InProcess
from mpsearch.layer import LayerSpec, weight_rows
from mpsearch.progress import phase, say_once
from mpsearch.runs.deadline import Deadline

Pair = tuple[str, str]
LONG_SECONDS, LONG_SHARE = 1200.0, 0.4  # of quantizing: as long, or this share of what a deadline leaves, is worth a remark
ESTIMATE_SHARE = 0.05  # of the work is done when the time of all is estimated


class SensitivityMetric(ABC):
    """A way to measure sensitivity; higher is worse, and values of different groups may be added.

    Attributes
    ----------
    name, unit
        Of the metric; the unit "nats" is that of the loss.
    """

    name: ClassVar[str]
    unit: ClassVar[str]

    def unit_for(self, divergence: Divergence) -> str:
        """The unit of the values: `unit`, or the divergence's own for metrics that estimate the loss."""
        return divergence.unit if self.unit == "nats" else self.unit

    @property
    def exact(self) -> bool:
        """Whether the values are the losses that a search measures."""
        return False

    @abstractmethod
    def measure(self, engine: QuantEngine, pairs: Sequence[Pair]) -> Iterator[float]:
        """One value for each (group, scheme) of `pairs`, in their order; each is yielded as soon as it is known."""

    def measure_joint(
        self, engine: QuantEngine, pairs: Sequence[Pair], deadline: Deadline | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.float32]] | None:
        """The values of `pairs` and their Gauss-Newton features `[n, n_pairs]` (`SensitivityTable.effects`), if it has any.

        A metric that needs fewer passes for less exact values leaves some out where `deadline` allows no more.
        """
        return None

    def measure_on(self, executor: Executor, engine: QuantEngine, pairs: Sequence[Pair]) -> Iterator[tuple[Pair, float]]:
        """(pair, value) in the order in which they are measured; by default in this process, whatever the executor."""
        yield from zip(pairs, self.measure(engine, pairs), strict=True)


class MeasuredMetric(SensitivityMetric):
    """Metrics that quantize one group at a time and score the model on the search split."""

    @abstractmethod
    def value(self, score: Score, baseline: Score) -> float:
        """The sensitivity, from the score of the model with one group quantized and that of the float model."""

    def measure(self, engine: QuantEngine, pairs: Sequence[Pair]) -> Iterator[float]:
        """One pass over the search split for each pair."""
        executor = InProcess()
        executor.start(engine)
        yield from (value for _, value in self.measure_on(executor, engine, pairs))

    def measure_on(self, executor: Executor, engine: QuantEngine, pairs: Sequence[Pair]) -> Iterator[tuple[Pair, float]]:
        """One evaluation for each pair, with twice as many pending as there are workers."""
        baseline = executor.submit(Allocation()).result()
        waiting, running = list(reversed(pairs)), dict[Future[Score], Pair]()
        while waiting or running:
            while waiting and len(running) < (2 * executor.workers if executor.workers > 1 else 1):
                group, scheme = waiting.pop()
                running[executor.submit(Allocation({group: scheme}))] = (group, scheme)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), self.value(future.result(), baseline)


def quantize_groups(engine: QuantEngine, pairs: Sequence[Pair], deadline: Deadline | None = None) -> None:
    """Quantize the layers of all (group, scheme) in a phase of its own, for metrics that then use all of them per batch.

    All schemes of a layer follow one another, so that they share what they can. The time left is estimated from the work that
    quantizers expect; where it is too long for a run that ends at the `deadline`, a faster quantizer is proposed.
    """
    layers = layers_by_group(engine)
    steps = list(
        dict.fromkeys((layer, scheme) for name in dict(pairs) for layer in layers[name] for g, scheme in pairs if g == name)
    )
    work = [engine.bank.work(layer.name, scheme) for layer, scheme in steps]
    limit = LONG_SECONDS if deadline is None or deadline.seconds is None else LONG_SHARE * max(deadline.left, 0.0)
    start, all_work, done = time.monotonic(), sum(work), 0.0
    first, first_seconds, is_estimated = 0.0, 0.0, False
    with phase("quantize", len(steps), work=work) as advance:
        for (layer, scheme), size in zip(steps, work, strict=True):
            engine.quantized(layer.name, scheme)
            advance(f"{layer.name} at {scheme}")
            if not done:  # this step also ran the network for the matrices of many layers
                first, first_seconds = size, time.monotonic() - start
            done += size
            if not is_estimated and done - first > ESTIMATE_SHARE * all_work:
                seconds = (time.monotonic() - start - first_seconds) / (done - first) * (all_work - first)
                _propose_faster(engine, scheme, first_seconds + seconds, limit)
                is_estimated = True
    engine.bank.release()


def _propose_faster(engine: QuantEngine, scheme: str, seconds: float, limit: float) -> None:
    """Name a faster quantizer where quantizing takes so many `seconds`, more than the `limit`."""
    if seconds > limit and engine.bank.quantizers[scheme].needs_fisher:
        say_once(
            f"Quantizing all layers in all schemes will take about {seconds / 60:.0f} min, longer than the {limit / 60:.0f} min "
            "that suit this run. quantizer=gptq takes a third of that or less, with larger errors."
        )


def layers_by_group(engine: QuantEngine) -> dict[str, tuple[LayerSpec, ...]]:
    """Group name -> its layers."""
    return {group.name: group.layers for group in engine.space.groups}


def squared_weight_error(engine: QuantEngine, layer: str, scheme: str) -> float:
    """||dW||^2 of a layer in a scheme."""
    weight = weight_rows(engine.model.get_submodule(layer)).float().cpu()
    return (engine.quantized(layer, scheme).dequantize() - weight).double().square().sum().item()
