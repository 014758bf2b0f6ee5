"""What was measured: the score of an allocation, the evaluation that records it with its costs, and each layer alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mpsearch.allocation import Allocation, SearchSpace
from mpsearch.quality import Quality


@dataclass(frozen=True)
class Score:
    """What a task reports of a model on one split.

    `loss` is the mean divergence from the float model's outputs (`mpsearch.divergence`), `cross_entropy` the mean task loss,
    `quality` the task's own measure (`Quality.score` of the samples' mean). `quality_low` and `quality_high` bound its 95 %
    interval *relative to the float model*: that of the paired differences (`mpsearch.intervals`) added to the float model's mean.
    `noise` is the power of the logits' change over the power of the float logits. `n_samples` counts independent samples (texts,
    not tokens), `qualities` are their own, float32 `[n_samples]`, on the confirm split; elsewhere they are not kept.
    `seconds` is what it took. `verified`: see `Evaluation`.
    """

    loss: float
    cross_entropy: float
    quality: float
    quality_low: float
    quality_high: float
    noise: float
    n_samples: int
    qualities: np.ndarray = field(repr=False, compare=False)
    seconds: float = field(default=0.0, compare=False)
    verified: bool = True


# The origin of what was trained after the search: its allocation was measured before, with the codes of the quantizer.
FINETUNED = "finetuned"


class Timing(NamedTuple):
    """Milliseconds of a forward pass: median and quartiles of repeated ones; `where` names machine, threads and batch size."""

    median: float
    low: float
    high: float
    where: str


@dataclass(frozen=True)
class Evaluation:
    """An allocation with its measured score and costs; a row of `evaluations.csv`.

    `origin` says who proposed it: float (the baseline: an empty allocation), uniform, knapsack or sampler, or finetuned: trained
    after the search, `seconds` those of the training on the search split. `packed` says that it
    ran on packed weights, and not on dequantized ones; `measured_ms` is the median time of a forward pass, where one was timed,
    `measured_ms_low` and `measured_ms_high` the quartiles of repeated ones, `measured_on` machine, threads and batch size.
    `verified` is false where its packed outputs were compared with the simulated ones and differed (`mpsearch.packed.agreement`).
    `costs` are those beside the size, by their column, as their tables predict them.
    """

    trial: int | None
    origin: str
    allocation: Allocation
    split: str
    loss: float
    cross_entropy: float
    quality: float
    quality_low: float
    quality_high: float
    size_bytes: int
    average_bits: float
    fraction: float
    feasible: bool
    n_samples: int
    seconds: float
    packed: bool = False
    measured_ms: float | None = None
    measured_ms_low: float | None = None
    measured_ms_high: float | None = None
    measured_on: str = ""
    verified: bool = True
    costs: Mapping[str, float] = field(default_factory=dict)

    @property
    def average_bits_all(self) -> float:
        """Bits per parameter of the whole model, where its float32 form has 32; `average_bits` is that of searched weights."""
        return 32 * self.fraction

    def cost(self, column: str) -> float:
        """A cost by its column: "size_bytes", "average_bits", "fraction", or one of `costs`."""
        return self.costs[column] if column in self.costs else getattr(self, column)

    def costs_at_most(self, other: Evaluation, columns: Sequence[str]) -> bool:
        """Whether it costs at most what the other does, by each of these columns."""
        return all(self.cost(column) <= other.cost(column) for column in columns)

    def drop_from(self, baseline: Evaluation, quality: Quality) -> tuple[float, float, float]:
        """(drop, its low, its high): how much worse than the baseline this one is, with the paired 95 % interval.

        See `Quality.drop` for its unit.
        """
        return quality.drop(baseline.quality, self.quality, self.quality_low, self.quality_high)


@dataclass(frozen=True)
class Confirmed:
    """A point on the confirm split, compared with the float model and with the other points there.

    `scheme` names a uniform allocation, `None` a point of the front. `drop` is how much worse than the float model it is
    (`Quality.drop`), with its paired 95 % interval. `dominated_by` is the cheapest measured point that costs at most as much and
    has a lower loss (`None`: not dominated); `significantly_dominated` says that its quality is better as well, by more than the
    paired interval of their difference.
    """

    evaluation: Evaluation
    scheme: str | None
    drop: float
    drop_low: float
    drop_high: float
    dominated_by: Evaluation | None
    significantly_dominated: bool


@dataclass(frozen=True)
class SensitivityTable:
    """What one group alone in a scheme does to the score: `values` float64 `[n_groups, n_schemes]`, higher is worse.

    `exact` says that they are what a search measures of its trials: the loss. `effects`, float32
    `[n, n_groups, n_schemes]`, are there where the metric knows what groups do together: their loss is half the squared sum of
    their effects, and what is left of each one's own value.
    """

    metric: str
    unit: str
    values: np.ndarray
    space: SearchSpace
    exact: bool = False
    effects: np.ndarray | None = None

    def losses(self) -> np.ndarray:
        """`values`, infinite where a group may not take a scheme.

        A scheme that broke the model (an infinite loss, or none) counts ten times the worst that was measured.
        """
        measured = self.values[self.space.allowed & np.isfinite(self.values)]
        broken = 10 * max(float(measured.max(initial=0.0)), 1.0)
        return np.where(self.space.allowed, np.where(np.isfinite(self.values), self.values, broken), np.inf)
