"""Allocations become evaluations: scored, with their costs, and on disk before the next.

`SearchEvaluator` scores the proposals of a search on an executor. `ConfirmEvaluator` scores what is reported on the confirm
split, on packed weights, and times a forward pass.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch

from mpsearch.allocation import Allocation
from mpsearch.budget import Budget, feasible
from mpsearch.costs.base import CostTable
from mpsearch.engine.engine import QuantEngine
from mpsearch.errors import InputError
from mpsearch.evaluation import Evaluation, EvaluationLog, Score, Timing
from mpsearch.executors.base import Executor
from mpsearch.executors.in_process import InProcess
from mpsearch.graph.trace import first_samples
from mpsearch.packed.agreement import agrees
from mpsearch.packed.hardware import model_latency
from mpsearch.packed.model import packed
from mpsearch.progress import phase
from mpsearch.runs.proposal_tests import ProposalTests
from mpsearch.runs.samples import SampleFiles

LATENCY_SECONDS = 0.1  # spent on timing each confirmed point


class _Evaluator:
    """Adds the costs to scores and logs the evaluations.

    Parameters
    ----------
    engine
        Scores allocations.
    log
        Where evaluations are looked up and added; a new one by default.
    budgets
        Limits of feasible evaluations.
    costs
        The tables of costs other than the size.
    """

    split: str

    def __init__(
        self,
        engine: QuantEngine,
        log: EvaluationLog | None = None,
        budgets: Sequence[Budget] = (),
        costs: Sequence[CostTable] = (),
    ) -> None:
        self.engine, self.budgets, self.costs = engine, budgets, costs
        self.log = EvaluationLog() if log is None else log

    def add(
        self, allocation: Allocation, origin: str, trial: int | None, score: Score | Evaluation, timing: Timing | None = None
    ) -> Evaluation:
        """The evaluation of a score, logged. A score that is an earlier evaluation took no time."""
        space = self.engine.space
        choice = space.choice(allocation) if allocation else None
        bits = space.size_bits(choice)
        evaluation = Evaluation(
            trial=trial,
            origin=origin,
            allocation=allocation,
            split=self.split,
            loss=score.loss,
            cross_entropy=score.cross_entropy,
            quality=score.quality,
            quality_low=score.quality_low,
            quality_high=score.quality_high,
            size_bytes=(bits + 7) // 8,
            average_bits=(bits - space.other_bits) / space.numel,
            fraction=bits / space.size_bits(),
            feasible=choice is None or feasible(self.budgets, choice),
            n_samples=score.n_samples,
            seconds=score.seconds if isinstance(score, Score) else 0.0,
            packed=timing is not None and choice is not None,
            measured_ms=timing and timing.median,
            measured_ms_low=timing and timing.low,
            measured_ms_high=timing and timing.high,
            measured_on=timing.where if timing else "",
            verified=score.verified,
            proposal_loss=score.proposal_loss,
            accepted=origin != "sampler" or self.split != "search",
            costs={} if choice is None else {table.column: table.cost_of(choice) for table in self.costs},
        )
        self.log.append(evaluation)
        return evaluation


@dataclass
class Pending:
    """An allocation that was submitted; `evaluation` is set when it is done."""

    allocation: Allocation
    origin: str
    trial: int | None
    evaluation: Evaluation | None = None


class SearchEvaluator(_Evaluator):
    """Scores allocations on the search split.

    `executor` is where they are scored, started (by default: this process), `tests` the tests of proposals so far; for the
    other parameters see above. An allocation that was measured before is not measured again, but a trial gets an evaluation of
    its own. A trial that is in the log already must have the same allocation.
    """

    split = "search"

    def __init__(
        self,
        engine: QuantEngine,
        log: EvaluationLog | None = None,
        budgets: Sequence[Budget] = (),
        costs: Sequence[CostTable] = (),
        executor: Executor | None = None,
        tests: ProposalTests | None = None,
    ) -> None:
        super().__init__(engine, log, budgets, costs)
        if executor is None:
            executor = InProcess()
            executor.start(engine)
        self.executor, self.tests = executor, tests or ProposalTests()
        self._running: dict[Future[Score], list[Pending]] = {}
        self._losses: dict[Allocation, np.ndarray] = {}

    def __call__(self, allocation: Allocation, origin: str, trial: int | None = None) -> Evaluation:
        """The allocation's evaluation."""
        return self.result(self.submit(allocation, origin, trial))

    def all(self, allocations: Iterable[Allocation], origin: str) -> list[Evaluation]:
        """The evaluations of several allocations, measured at the same time where there are workers."""
        allocations = list(allocations)
        new = {allocation for allocation in allocations if self.log.find(self.split, allocation) is None}
        title = "uniform allocations" if origin == "uniform" else "additive solutions"
        with phase(title, len(new)) if new else nullcontext(lambda note: None) as advance:
            pending = []
            for allocation in allocations:
                pending.append(self.submit(allocation, origin))  # which in this process measures it
                if allocation in new:
                    new.remove(allocation)
                    advance("")
            return [self.result(each) for each in pending]

    def submit(self, allocation: Allocation, origin: str, trial: int | None = None) -> Pending:
        """Begin to measure an allocation; `result` waits for it."""
        pending = Pending(allocation, origin, trial)
        if trial is not None and (recorded := self.log.trial(trial)) is not None:
            if recorded.allocation != allocation:
                raise InputError(
                    f"Trial {trial} of this run was another allocation than the sampler proposes now: the run cannot be resumed "
                    "(another version of Optuna or of mpsearch?). Start a new run."
                )
            pending.evaluation = recorded
            return pending
        earlier = self.log.find(self.split, allocation)
        if earlier is not None and trial is not None and earlier.trial is not None and earlier.trial > trial:
            earlier = None  # the workers of a killed run were ahead: in this order it is not measured yet
        same = next((future for future, waiting in self._running.items() if waiting[0].allocation == allocation), None)
        if earlier is not None:
            pending.evaluation = earlier if trial is None else self.add(allocation, origin, trial, earlier)
        elif same is not None:
            self._running[same].append(pending)
        else:
            self._running[self.executor.submit(allocation)] = [pending]
            self._collect(timeout=0)
        return pending

    def losses(self, allocation: Allocation, split: str = "search") -> np.ndarray:
        """The loss of each sample, float32 `[n]`; an allocation that this process did not score is scored again.

        On the calibration split it is scored in this process.
        """
        if split == "calibration":
            return self.engine.score(allocation, split).losses
        if allocation not in self._losses:
            self._losses[allocation] = self.executor.submit(allocation).result().losses
        return self._losses[allocation]

    def accept(self, evaluation: Evaluation, origin: str) -> None:
        """Record that a proposal is accepted, unless that is recorded already; `origin`: "knapsack" of an additive solution."""
        if all(e.allocation != evaluation.allocation for e in self.log.accepted()):
            self.log.append(replace(evaluation, trial=None, origin=origin, seconds=0.0, accepted=True))

    def result(self, pending: Pending) -> Evaluation:
        """Wait for what was submitted; whatever else is done by then is logged too."""
        while pending.evaluation is None:
            self._collect()
        return pending.evaluation

    def _collect(self, timeout: float | None = None) -> None:
        for future in wait(self._running, timeout, return_when=FIRST_COMPLETED).done:
            score = future.result()
            for pending in self._running.pop(future):
                self._losses[pending.allocation] = score.losses
                pending.evaluation = self.add(pending.allocation, pending.origin, pending.trial, score)


class ConfirmEvaluator(_Evaluator):
    """Scores allocations on the confirm split in this process, on packed weights.

    A forward pass of `latency_batch_size` samples is timed, and what each sample scored is kept in `samples`; for the other
    parameters see above. An allocation that was confirmed before is not run again.
    """

    split = "confirm"

    def __init__(
        self,
        engine: QuantEngine,
        log: EvaluationLog | None = None,
        budgets: Sequence[Budget] = (),
        costs: Sequence[CostTable] = (),
        latency_batch_size: int = 1,
        samples: SampleFiles | None = None,
    ) -> None:
        super().__init__(engine, log, budgets, costs)
        self.latency_batch_size, self.samples = latency_batch_size, samples
        self._qualities: dict[Allocation, np.ndarray] = {}

    def __call__(self, allocation: Allocation, origin: str) -> Evaluation:
        """The allocation's evaluation."""
        earlier = self.log.find(self.split, allocation)
        if earlier is not None:
            return earlier
        start = time.perf_counter()
        score, timing = self.run_packed(allocation)
        self._qualities[allocation] = score.qualities
        if self.samples is not None and allocation:
            self.samples.write(allocation, origin, score)  # before the row, which says that the point is confirmed
        return self.add(allocation, origin, None, replace(score, seconds=time.perf_counter() - start), timing)

    def qualities(self, allocation: Allocation) -> np.ndarray:
        """The quality of each sample, float32 `[n]`; an allocation that this process did not confirm is run again."""
        if allocation not in self._qualities:
            self._qualities[allocation] = self.run_packed(allocation)[0].qualities
        return self._qualities[allocation]

    def run_packed(self, allocation: Allocation) -> tuple[Score, Timing]:
        """The score on packed weights, and the time of a forward pass.

        The score is `verified` where the packed outputs of the first batch agree with the simulated ones.
        """
        engine = self.engine
        reference = engine.float_logits(self.split)
        batch = engine.batches(self.split)[0][0]
        simulated = None
        if allocation:
            with torch.no_grad(), engine.applied(allocation) as model:
                simulated = engine.task.forward(model, batch)
        if not engine.bank.holds_all:
            engine.release()  # packed weights take the place of a large network's dense ones
        with packed(engine, allocation) as model:
            if simulated is None:
                score = engine.scorer.score(None, self.split)
            else:
                outputs = engine.scorer.outputs(model, self.split)
                first = next(outputs)
                has_quantized_inputs = any(engine.space.schemes[name].input_format is not None for name in allocation.values())
                verified = agrees(first, simulated, reference[: len(first)], has_quantized_inputs)
                score = replace(engine.scorer.score(itertools.chain([first], outputs), self.split), verified=verified)
            inputs = first_samples(batch, self.latency_batch_size)
            timing = model_latency({"": model}, engine.task.forward, inputs, LATENCY_SECONDS)[""]
        return score, timing
