"""What was measured: the score of an allocation, the evaluation that records it with its costs, and the sensitivities."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, overload

import numpy as np

from mpsearch.allocation import Allocation, SearchSpace
from mpsearch.divergence import LOSS_FLOOR
from mpsearch.quality import Quality


@dataclass(frozen=True)
class Score:
    """What a task reports of a model on one split.

    Attributes
    ----------
    loss
        Mean divergence from the float model's outputs (`mpsearch.divergence`).
    cross_entropy
        Mean task loss.
    quality, quality_low, quality_high
        The task's own measure (`Quality.score` of the samples' mean) and its 95 % interval *relative to the float model*: that of
        the paired differences (`mpsearch.intervals`) added to the float model's mean.
    noise
        Power of the change of the logits over the power of the float logits.
    n_samples
        Independent samples (texts, not tokens).
    qualities
        The quality of each of them, float32 `[n_samples]`, on the confirm split; empty elsewhere.
    seconds
        Duration of the evaluation.
    verified
        See `Evaluation`.
    proposal_loss
        See `Evaluation`.
    losses
        The loss of each independent sample, float32 `[n_samples]`, on the search split; empty elsewhere.
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
    proposal_loss: float | None = None
    losses: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.float32), repr=False, compare=False)


# The origin of what was trained after the search: its allocation was measured before, with the codes of the quantizer.
FINETUNED = "finetuned"
REFINED = "refined"  # layers quantized once more, jointly (`mpsearch.refiners`)
LATER = (FINETUNED, REFINED)


class Timing(NamedTuple):
    """Milliseconds of a forward pass: median and quartiles of repeated ones; `where` names machine, threads and batch size."""

    median: float
    low: float
    high: float
    where: str


@dataclass(frozen=True)
class Evaluation:
    """An allocation with its measured score and costs; a row of `evaluations.csv`.

    Attributes
    ----------
    trial
        Number of the study's trial; `None` outside of the study.
    origin
        Who proposed it: float (the baseline: an empty allocation), uniform, knapsack, sampler, user (`mpsearch.confirm`); or what
        was done with it after the search, refined or finetuned, with the `seconds` of that on the search split.
    split
        "search" or "confirm".
    packed
        Whether it ran on packed weights instead of dequantized ones.
    measured_ms, measured_ms_low, measured_ms_high, measured_on
        Median and quartiles of the time of a forward pass, where one was timed; machine, threads and batch size.
    verified
        False where its packed outputs were compared with the simulated ones and differed (`mpsearch.packed.agreement`).
    proposal_loss
        The mean loss of that half of the search samples (`mpsearch.intervals.random_half`) which alone samplers are told of; the
        other half decides what is accepted. `None`: it is the loss.
    accepted
        False for a proposal that has not been shown to be better than the additive solution of its costs
        (`mpsearch.pipeline.accept`). One that has gets a second row, in which it is true.
    costs
        By column: the costs other than the size, as their tables predict them.
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
    proposal_loss: float | None = None
    accepted: bool = True
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

    @property
    def told_loss(self) -> float:
        """The loss that samplers learn from: `proposal_loss`, where there is one."""
        return self.loss if self.proposal_loss is None else self.proposal_loss

    def objectives(self, columns: Sequence[str]) -> tuple[float, ...]:
        """What a study minimizes: log10 of `told_loss` (on a linear axis a front is a wall), then the costs of `columns`."""
        return float(np.log10(max(self.told_loss, LOSS_FLOOR))), *(self.cost(column) for column in columns)

    def drop_from(self, baseline: Evaluation, quality: Quality) -> tuple[float, float, float]:
        """(drop, its low, its high): how much worse than the baseline this one is, with the paired 95 % interval.

        See `Quality.drop` for its unit.
        """
        return quality.drop(baseline.quality, self.quality, self.quality_low, self.quality_high)


class EvaluationLog(Sequence[Evaluation]):
    """The evaluations of a run in the order in which they were made; append-only.

    Parameters
    ----------
    known
        Those of an interrupted run.
    record
        Called with each new one before it is added: it writes it to disk.
    """

    def __init__(self, known: Iterable[Evaluation] = (), record: Callable[[Evaluation], None] = lambda evaluation: None) -> None:
        self.record = record
        self._evaluations: list[Evaluation] = []
        self._first: dict[tuple[str, Allocation], Evaluation] = {}
        self._trials: dict[int, Evaluation] = {}
        for evaluation in known:
            self._add(evaluation)

    def append(self, evaluation: Evaluation) -> None:
        """Record an evaluation and add it."""
        self.record(evaluation)
        self._add(evaluation)

    def find(self, split: str, allocation: Allocation) -> Evaluation | None:
        """The first evaluation of an allocation on a split, with the codes of the quantizer (not refined or finetuned ones)."""
        return self._first.get((split, allocation))

    def trial(self, number: int) -> Evaluation | None:
        """The evaluation of a trial of the study."""
        return self._trials.get(number)

    def trials(self) -> list[Evaluation]:
        """The trials from number 0 on, up to the first that is missing."""
        trials: list[Evaluation] = []
        while (evaluation := self._trials.get(len(trials))) is not None:
            trials.append(evaluation)
        return trials

    def on(self, split: str) -> list[Evaluation]:
        """The evaluations on a split, without those of the float model, and the refined and finetuned ones."""
        return [e for e in self._evaluations if e.split == split and e.origin not in ("float", *LATER)]

    def accepted(self) -> list[Evaluation]:
        """Of each allocation that is accepted on the search split, its first evaluation there."""
        accepted = {e.allocation for e in self.on("search") if e.accepted}
        return [e for (split, allocation), e in self._first.items() if split == "search" and allocation in accepted]

    def _add(self, evaluation: Evaluation) -> None:
        self._evaluations.append(evaluation)
        if evaluation.origin not in LATER:
            self._first.setdefault((evaluation.split, evaluation.allocation), evaluation)
        if evaluation.trial is not None:
            self._trials[evaluation.trial] = evaluation

    def __len__(self) -> int:
        return len(self._evaluations)

    @overload
    def __getitem__(self, index: int) -> Evaluation: ...
    @overload
    def __getitem__(self, index: slice) -> list[Evaluation]: ...
    def __getitem__(self, index: int | slice) -> Evaluation | list[Evaluation]:
        return self._evaluations[index]


@dataclass(frozen=True)
class Confirmed:
    """A point on the confirm split, compared with the float model and with the other points there.

    Attributes
    ----------
    scheme
        The scheme of a uniform allocation; `None`: a point of the front.
    drop, drop_low, drop_high
        The loss of quality against the float model (`Quality.drop`), with its paired 95 % interval.
    dominated_by
        The cheapest measured point that costs at most as much and has a lower loss; `None`: it is not dominated.
    significantly_dominated
        Whether the quality of that point is better as well, by more than the paired interval of their difference.
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
    """The increase of the loss when one group alone is quantized, for each scheme.

    Attributes
    ----------
    values
        float64 `[n_groups, n_schemes]`; higher is worse.
    exact
        Whether the values are losses as a search measures them of its trials, and not another metric.
    effects
        float32 `[n, n_groups, n_schemes]`: Gauss-Newton features, where the metric computes them. The predicted loss of an
        allocation is half the squared norm of the sum of its groups' features, plus the rest of each group's own value.
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
