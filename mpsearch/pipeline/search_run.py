"""A search of a prepared model in a run folder: sensitivities, trials, confirmation."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mpsearch.errors import InputError
from mpsearch.evaluation import Confirmed, Evaluation, EvaluationLog
from mpsearch.executors.base import Executor
from mpsearch.metrics.base import SensitivityMetric
from mpsearch.pipeline.confirm import confirm, selected
from mpsearch.pipeline.evaluators import ConfirmEvaluator, SearchEvaluator
from mpsearch.pipeline.finetune import train_point
from mpsearch.pipeline.goal import Goal
from mpsearch.pipeline.live import LiveReport
from mpsearch.pipeline.mirror import Mirror
from mpsearch.pipeline.prepare import Model, Prepared, planned_engine
from mpsearch.pipeline.refine import RefiningEvaluator, start_of_training
from mpsearch.pipeline.result import Result
from mpsearch.pipeline.resume import check_resumed
from mpsearch.pipeline.search import search
from mpsearch.pipeline.sensitivity import measured_sensitivity
from mpsearch.pipeline.workspace import Workspace
from mpsearch.progress import phase, quiet, read_phases
from mpsearch.quality import Quality
from mpsearch.refiners.base import Refiner
from mpsearch.registry import fields_of
from mpsearch.runs.deadline import SEARCH_SHARE, Deadline
from mpsearch.runs.proposal_tests import ProposalTests
from mpsearch.runs.run import Run, RunFolder
from mpsearch.runs.samples import SampleFiles
from mpsearch.runtimes.base import Runtime
from mpsearch.samplers.base import Problem, build_sampler, check_sampler
from mpsearch.training.finetune import Training


@dataclass(frozen=True)
class SearchRun:
    """What a search is made of; the caller holds the lock of the run's folder."""

    model: Model
    prepared: Prepared
    goal: Goal
    metric: SensitivityMetric
    sampler: Any
    executor: Executor
    run: RunFolder
    seed: int
    in_flight: int
    max_drop: float
    training: Training | None
    mirror: str | None
    confirm_points: int | None
    refiner: Refiner | None
    exporter: str

    def identity(self) -> dict[str, Any]:
        """What identifies the run: that of the prepared model, and what its trials depend on. JSON-able."""
        unit = self.metric.unit_for(self.prepared.divergence)
        return {
            **self.prepared.identity,
            "metric": {"name": self.metric.name, "unit": unit, "exact": self.metric.exact, **fields_of(self.metric)},
            "trials": {"in_flight": self.in_flight},
            "budgets": {budget.table.name: budget.limit for budget in self.goal.budgets},
            "objectives": [table.column for table in self.goal.objectives],
            "max_drop": self.max_drop,
            "costs": [table.column for table in self.goal.other_costs],
            "cost_settings": {name: fields_of(cost) for name, cost in self.goal.costs.items()},
            **({} if self.refiner is None else {"refiner": fields_of(self.refiner)}),
            **({} if self.exporter == Runtime.exporter else {"exporter": self.exporter}),
        }

    def search(self, n_trials: int, n_seeds: int, deadline: Deadline) -> Result:
        """Measure, search and confirm; or resume."""
        goal, prepared, space = self.goal, self.prepared, self.prepared.space
        check_sampler(self.sampler, space, goal.objectives, goal.budgets, self.seed)
        with self.executor:
            engine = prepared.engine(self.run.path)
            parts = self.model, prepared.task, prepared.plan, prepared.options, prepared.not_searched, self.run.path.absolute()
            self.executor.start(engine, functools.partial(planned_engine, *parts, seed=self.seed, name=prepared.name))
            identity = self.identity()
            quality = Quality(prepared.task.quality_name, prepared.task.quality_kind)
            known_sensitivity, known = self._known(identity, quality)
            check_resumed(engine, self.run, known)
            sensitivity = measured_sensitivity(engine, self.metric, self.run, known_sensitivity, self.executor, deadline)
            log = EvaluationLog(known, self.run.recorder(space, quality.name, identity["costs"]))
            shared = engine, log, goal.budgets, goal.other_costs
            mirror = self._mirror(identity["objectives"])

            def record() -> Run:
                columns = identity["budgets"], identity, identity["objectives"], identity["costs"]
                return Run(space, quality.name, tuple(log), sensitivity, *columns)

            live = LiveReport(record, self.run.path)

            def finished(evaluation: Evaluation) -> None:
                if mirror is not None:
                    mirror(evaluation)
                live.searched(evaluation)

            with mirror or contextlib.nullcontext():
                search(
                    SearchEvaluator(*shared, self.executor, ProposalTests(self.run)),
                    build_sampler(self.sampler, Problem(sensitivity, goal.objectives, goal.budgets, self.seed)),
                    n_trials=n_trials,
                    n_seeds=n_seeds,
                    deadline=deadline.part(SEARCH_SHARE),
                    in_flight=self.in_flight,
                    finished=finished,
                )
            evaluate = ConfirmEvaluator(*shared, goal.batch_size, SampleFiles(self.run.path))
            refined = evaluate if self.refiner is None else RefiningEvaluator(evaluate, self.refiner, self.run.path)
            run, confirmed = self._confirmed(refined, record, live, deadline)
        workspace = Workspace(prepared, engine, self.run.path, self.refiner)
        return Result(run, self.run.path, workspace, goal.costs, confirmed)

    def _known(self, identity: dict[str, Any], quality: Quality) -> tuple[Any, list[Any]]:
        """What an interrupted run has measured; a new folder is marked as this run's."""
        space = self.prepared.space
        self.prepared.record(self.run.path)
        self.run.identify(identity)
        for table in ("sensitivity", "evaluations"):
            self.run.drop_incomplete_row(table)
        known = self.run.read_sensitivity(space, self.metric.name)
        return known, self.run.read_evaluations(space, quality, identity["costs"])

    def _mirror(self, objectives: Sequence[str]) -> Mirror | None:
        name = "/".join(self.run.path.parts[-2:])  # the runs of a sweep are 0, 1, 2
        return Mirror(self.mirror, name, self.prepared.space, objectives) if self.mirror else None

    def _refine_seconds(self) -> float:
        """About how long an allocation takes to refine: twice as long as to quantize each layer in one scheme."""
        seconds = sum(each.seconds for each in read_phases(self.run.path) if each.what == "quantize")
        return 2 * seconds / len(self.prepared.space.schemes)

    def _confirmed(
        self, evaluate: ConfirmEvaluator | RefiningEvaluator, record: Callable[[], Run], live: LiveReport, deadline: Deadline
    ) -> tuple[Run, list[Confirmed]]:
        run = record()
        if not run.front:
            raise InputError("No trial was run, so there is no front. Give n_trials above 0.")
        confirmed = confirm(evaluate, run, self.confirm_points, live.confirmed, deadline, self._refine_seconds())
        deadline.record(self.run.path)
        if self.training is not None:
            points = selected(run, self.confirm_points)
            with phase("finetune", len(points)) as advance:
                for point in points:
                    with quiet():
                        start = start_of_training(evaluate, point.allocation)
                        _, trained, _ = train_point(start, point.allocation, self.training, self.run.path)
                    advance(f"{point.average_bits:.2f} bits: {run.quality.label} {run.quality.text(trained.quality)}")
        return record(), confirmed
