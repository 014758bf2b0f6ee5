"""Refine points of a run before they are confirmed (`mpsearch.refiners`), and decide on the search split whether that is kept.

Refined weights lie in the run's folder `refined/<id of the allocation>/`. What is recorded is an evaluation of its own on either
split; on the confirm split only the weights that are kept are scored.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mpsearch.allocation import Allocation
from mpsearch.engine.engine import QuantEngine
from mpsearch.engine.weight_files import WeightFiles
from mpsearch.evaluation import REFINED, Evaluation, EvaluationLog
from mpsearch.pipeline.evaluators import ConfirmEvaluator, SearchEvaluator
from mpsearch.progress import quiet
from mpsearch.refiners.base import Refinement, Refiner
from mpsearch.registry import fields_of

FOLDER = "refined"


class RefiningEvaluator:
    """Scores allocations on the confirm split as `evaluate` does, with their refined weights where these are kept.

    Parameters
    ----------
    evaluate
        Scores the quantizer's weights; its log records all evaluations.
    refiner
        Refines them.
    folder
        Of the run.
    """

    def __init__(self, evaluate: ConfirmEvaluator, refiner: Refiner, folder: Path) -> None:
        self.evaluate, self.refiner, self.folder = evaluate, refiner, folder
        self._refinement: Refinement | None = None
        self._last: tuple[Allocation, ConfirmEvaluator] | None = None  # of one allocation: dense weights take memory
        self._qualities: dict[Allocation, np.ndarray] = {}

    def __call__(self, allocation: Allocation, origin: str) -> Evaluation:
        """The evaluation of the weights that are kept; what was measured before is not measured again."""
        if not self.keeps(allocation):
            return self.evaluate(allocation, origin)
        known = self._known("confirm", allocation)
        return self.refined(allocation)(allocation, REFINED) if known is None else known

    def qualities(self, allocation: Allocation) -> np.ndarray:
        """The quality of each sample, float32 `[n]`."""
        if not self.keeps(allocation):
            return self.evaluate.qualities(allocation)
        if allocation not in self._qualities:
            self._qualities[allocation] = self.refined(allocation).qualities(allocation)
        return self._qualities[allocation]

    def keeps(self, allocation: Allocation) -> bool:
        """Whether the refined weights have the lower loss on the search split, which is measured where it is not known."""
        before = self.evaluate.log.find("search", allocation)
        if not allocation or before is None:
            return False
        after = self._known("search", allocation)
        if after is None:
            start = time.perf_counter()
            refined = self.refined(allocation)
            after = self._scored(refined, allocation, time.perf_counter() - start)
        return after.loss < before.loss

    def refined(self, allocation: Allocation) -> ConfirmEvaluator:
        """Scores the allocation with refined weights; they are read, or else made and written."""
        if self._last is None or self._last[0] != allocation:
            if self._refinement is None:
                self._refinement = self.refiner.start(self.evaluate.engine)
            files = self.evaluate.engine.bank.files
            about = self.refiner, allocation, self.folder
            self._last = None  # frees its memory first
            with quiet():  # a step of the phase in which points are confirmed
                engine = self._refinement(allocation, None if files is None else refined_files(files, *about))
            base = self.evaluate
            parts = base.budgets, base.costs, base.latency_batch_size, base.samples
            log = EvaluationLog(record=base.log.append)  # an empty one: that of the run has the unrefined evaluations
            self._last = allocation, ConfirmEvaluator(engine, log, *parts)
        return self._last[1]

    def _scored(self, refined: ConfirmEvaluator, allocation: Allocation, seconds: float) -> Evaluation:
        def record(evaluation: Evaluation) -> None:
            self.evaluate.log.append(replace(evaluation, seconds=seconds))

        parts = self.evaluate.budgets, self.evaluate.costs
        return SearchEvaluator(refined.engine, EvaluationLog(record=record), *parts)(allocation, REFINED)

    def _known(self, split: str, allocation: Allocation) -> Evaluation | None:
        evaluations = (e for e in self.evaluate.log if e.origin == REFINED and e.split == split)
        return next((e for e in evaluations if e.allocation == allocation), None)


def start_of_training(evaluate: ConfirmEvaluator | RefiningEvaluator, allocation: Allocation) -> ConfirmEvaluator:
    """Scores the allocation with the weights that are kept, from which training starts; its log is that of the run."""
    if isinstance(evaluate, ConfirmEvaluator):
        return evaluate
    base = evaluate.evaluate
    if not evaluate.keeps(allocation):
        return base
    engine = evaluate.refined(allocation).engine
    return ConfirmEvaluator(engine, base.log, base.budgets, base.costs, base.latency_batch_size, base.samples)


def refined_files(files: WeightFiles, refiner: Refiner | Any, allocation: Allocation, folder: Path) -> WeightFiles:
    """The files of an allocation's refined weights; `files` are those of the bank, `refiner` one or its recorded fields."""
    about = fields_of(refiner) if isinstance(refiner, Refiner) else dict(refiner)
    return files.derived(folder / FOLDER / allocation.id, {"refiner": about, "allocation": allocation.to_json()})


def kept_engine(engine: QuantEngine, refiner: Refiner, allocation: Allocation, folder: Path) -> QuantEngine:
    """An engine with the allocation's refined weights."""
    files = engine.bank.files
    return refiner.start(engine)(allocation, None if files is None else refined_files(files, refiner, allocation, folder))


@dataclass(frozen=True)
class Evaluators:
    """What measures more of a finished run, with one log; `refined` refines points before it confirms them, if the run does."""

    search: SearchEvaluator
    confirm: ConfirmEvaluator
    refined: ConfirmEvaluator | RefiningEvaluator

    @property
    def log(self) -> EvaluationLog:
        """All evaluations of the run."""
        return self.confirm.log
