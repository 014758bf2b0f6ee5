"""Train a point of a finished run as it is stored (quantization-aware training), and score it on both splits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mpsearch.allocation import Allocation
from mpsearch.evaluation import FINETUNED, Evaluation, EvaluationLog
from mpsearch.pipeline.evaluators import ConfirmEvaluator, SearchEvaluator
from mpsearch.quality import Quality
from mpsearch.training.finetune import Finetuned, Training
from mpsearch.training.finetune import finetune as train


@dataclass(frozen=True)
class TrainingSummary:
    """How a training went: the best of its `epochs`, the search loss before and after, the quality before and after on the
    confirm split, and how much lower it became, with the paired 95 % interval (drop, low, high; see `Quality.drop`).
    """

    best_epoch: int
    epochs: int
    loss_before: float
    loss_after: float
    quality_before: float
    quality_after: float
    drop: tuple[float, float, float]
    seconds: float


def summarized(trained: Finetuned, epochs: int, quality: Quality, before: np.ndarray, after: np.ndarray) -> TrainingSummary:
    """`before` and `after`: the quality of each sample of the confirm split, float32 `[n]`."""
    was, now = (quality.score(float(values.mean(dtype="float64"))) for values in (before, after))
    drop = quality.paired_drop(after, before)
    return TrainingSummary(trained.epoch, epochs, trained.losses[0], min(trained.losses), was, now, drop, trained.seconds)


def train_point(
    evaluate: ConfirmEvaluator, allocation: Allocation, training: Training, folder: Path
) -> tuple[Finetuned, Evaluation, ConfirmEvaluator]:
    """Train an allocation, or resume from its checkpoint in the run's `folder`; record its evaluations on both splits.

    Evaluations of the same training that are recorded already are not repeated. Also returns the evaluation on the confirm split,
    and what evaluates the trained weights.
    """
    trained = train(evaluate.engine, allocation, training, folder / "finetuned")
    known: dict[str, Evaluation] = {}
    for e in evaluate.log:
        if e.origin == FINETUNED and e.allocation == allocation:
            known = {e.split: e} if e.split == "search" else {**known, e.split: e}  # a new training begins on the search split
    if "search" in known and known["search"].loss != min(trained.losses):
        known = {}

    def record(evaluation: Evaluation) -> None:
        if evaluation.split == "search":
            evaluation = replace(evaluation, seconds=trained.seconds)
        known[evaluation.split] = evaluation
        evaluate.log.append(evaluation)

    parts = trained.engine, EvaluationLog(record=record), evaluate.budgets, evaluate.costs
    after = ConfirmEvaluator(*parts, evaluate.latency_batch_size, evaluate.samples)
    if "search" not in known:
        SearchEvaluator(*parts)(allocation, FINETUNED)
    if "confirm" not in known:
        after(allocation, FINETUNED)
    return trained, known["confirm"], after
