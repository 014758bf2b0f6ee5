"""The search: ask, evaluate, tell. The only study in the package.

Optuna proposes one categorical parameter a group. The study lives in memory and the run's table is the record. A run that was
interrupted goes on from its recorded trials, which are added to a new study; with Optuna's own samplers it is replayed (asked
again from the same seed, in order), with recorded allocations looked up instead of measured.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace

import numpy as np
import optuna
import torch

from mpsearch.allocation import Allocation, SearchSpace
from mpsearch.budget import Budget, feasible, restricted
from mpsearch.costs.base import CostTable, mixed
from mpsearch.costs.size import Bytes
from mpsearch.divergence import LOSS_FLOOR
from mpsearch.engine.engine import FLOAT, QuantEngine
from mpsearch.errors import InputError
from mpsearch.evaluation import FINETUNED, Evaluation, Score, SensitivityTable, Timing
from mpsearch.executors.base import Executor
from mpsearch.executors.in_process import InProcess
from mpsearch.graph.trace import first_samples
from mpsearch.optimize.knapsack import front, repair
from mpsearch.packed.agreement import agrees
from mpsearch.packed.hardware import model_latency
from mpsearch.packed.model import packed
from mpsearch.progress import phase
from mpsearch.samplers.base import distributions
from mpsearch.samplers.proposer import Proposer
from mpsearch.samplers.repaired import Repaired

LATENCY_SECONDS = 0.1  # spent on timing each confirmed point

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass
class Pending:
    """What was submitted, and what came of it."""

    allocation: Allocation
    origin: str
    trial: int | None
    evaluation: Evaluation | None = None


class Evaluator:
    """Scores allocations, adds their costs, and records each new evaluation as soon as it is there.

    On the search split the `executor` (started; `None`: this process) scores them. On the confirm split they run here, on packed
    weights, and a forward pass of `latency_batch_size` samples is timed. `costs` are those beside the size. `known` are the
    evaluations of an interrupted run: a trial that is among them is looked up, by number, and must be the same.
    """

    def __init__(
        self,
        engine: QuantEngine,
        budgets: Sequence[Budget],
        record: Callable[[Evaluation], None] = lambda evaluation: None,
        known: Sequence[Evaluation] = (),
        costs: Sequence[CostTable] = (),
        latency_batch_size: int = 1,
        executor: Executor | None = None,
    ) -> None:
        self.engine, self.budgets, self.record, self.costs = engine, budgets, record, costs
        self.latency_batch_size = latency_batch_size
        self.evaluations = list(known)
        self._trials = {(e.split, e.trial): e for e in known if e.trial is not None}
        self._measured: dict[tuple[str, Allocation], Evaluation] = {}
        for e in known:
            if e.origin != FINETUNED:  # the same allocation, but other codes
                self._measured.setdefault((e.split, e.allocation), e)
        self._running: dict[Future[Score], list[Pending]] = {}
        if executor is None:
            executor = InProcess()
            executor.start(engine)
        self.executor = executor
        self._qualities: dict[Allocation, np.ndarray] = {}

    def qualities(self, allocation: Allocation) -> np.ndarray:
        """The quality of each sample of the confirm split, float32 `[n]`; run again where it is not at hand."""
        if allocation not in self._qualities:
            self._qualities[allocation] = self.run_packed(allocation)[0].qualities
        return self._qualities[allocation]

    def __call__(self, allocation: Allocation, origin: str, split: str = "search", trial: int | None = None) -> Evaluation:
        """The allocation's evaluation on the split; a repeat costs nothing, a repeated trial still gets its row."""
        if split == "search":
            return self.result(self.submit(allocation, origin, trial))
        if (split, allocation) not in self._measured:
            start = time.perf_counter()
            score, timing = self.run_packed(allocation)
            self._qualities[allocation] = score.qualities
            score = replace(score, seconds=time.perf_counter() - start)
            self._record(Pending(allocation, origin, None), score, timing)
        return self._measured[split, allocation]

    def submit(self, allocation: Allocation, origin: str, trial: int | None = None) -> Pending:
        """Have the allocation measured on the search split; ask `result` for it. A repeated trial still gets its row."""
        pending = Pending(allocation, origin, trial)
        if trial is not None and ("search", trial) in self._trials:
            pending.evaluation = self._trials["search", trial]
            if pending.evaluation.allocation != allocation:
                raise InputError(
                    f"Trial {trial} of this run was another allocation than the sampler proposes now: the run cannot be gone on "
                    "with (another version of Optuna or of mpsearch?). Start a new run."
                )
            return pending
        earlier = self._measured.get(("search", allocation))
        if earlier is not None and trial is not None and earlier.trial is not None and earlier.trial > trial:
            earlier = None  # a pool's rows come in any order: for this trial that one is still to come
        same = next((f for f, those in self._running.items() if those[0].allocation == allocation), None)
        if earlier is not None:
            if trial is None:
                pending.evaluation = earlier
            else:
                self._record(pending, earlier)
        elif same is not None:
            self._running[same].append(pending)
        else:
            self._running[self.executor.submit(allocation)] = [pending]
            self._collect(timeout=0)
        return pending

    def result(self, pending: Pending) -> Evaluation:
        """What was submitted; whatever else is done by then is recorded too."""
        while pending.evaluation is None:
            self._collect()
        return pending.evaluation

    def _collect(self, timeout: float | None = None) -> None:
        for future in wait(self._running, timeout, return_when=FIRST_COMPLETED).done:
            those = self._running.pop(future)
            for pending in those:
                self._record(pending, future.result())

    def recorded(self) -> list[Evaluation]:
        """The trials of an interrupted run, from the first on, as far as none is missing."""
        found: list[Evaluation] = []
        while ("search", len(found)) in self._trials:
            found.append(self._trials["search", len(found)])
        return found

    def _record(self, pending: Pending, score: Score | Evaluation, timing: Timing | None = None) -> None:
        """Make it an evaluation, on disk before anything else is measured; a `timing` comes with the confirm split."""
        space, allocation = self.engine.space, pending.allocation
        choice = space.choice(allocation) if allocation else None
        bits = space.size_bits(choice)
        confirmed = timing is not None
        split = "confirm" if confirmed else "search"
        pending.evaluation = Evaluation(
            trial=pending.trial,
            origin=pending.origin,
            allocation=allocation,
            split=split,
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
            packed=confirmed and choice is not None,
            measured_ms=timing and timing.median,
            measured_ms_low=timing and timing.low,
            measured_ms_high=timing and timing.high,
            measured_on=timing.where if timing else "",
            verified=score.verified,
            costs={} if choice is None else {table.column: table.cost_of(choice) for table in self.costs},
        )
        self.record(pending.evaluation)
        self.evaluations.append(pending.evaluation)
        self._measured.setdefault((split, allocation), pending.evaluation)

    def run_packed(self, allocation: Allocation) -> tuple[Score, Timing]:
        """Score on the confirm split on packed weights, and the time of a forward pass there.

        The score is `verified` where the packed outputs on the first batch are those that are simulated.
        """
        engine = self.engine
        reference = engine.float_logits("confirm")
        batch = engine.batches("confirm")[0][0]
        inputs = first_samples(batch, self.latency_batch_size)
        with torch.no_grad(), engine.applied(allocation) as model:
            simulated = engine.task.forward(model, batch)
        with packed(engine, allocation) as model:
            score = engine.score_of(model if allocation else None, "confirm")
            if allocation:
                with torch.no_grad():
                    ours = engine.task.forward(model, batch)
                rounds = any(engine.space.schemes[scheme].input_format is not None for scheme in allocation.values())
                score = replace(score, verified=agrees(ours, simulated, reference[: len(ours)], rounds))
            timing = model_latency({"": model}, engine.task.forward, inputs, LATENCY_SECONDS)[""]
        return score, timing


def search(
    evaluate: Evaluator,
    sensitivity: SensitivityTable,
    sampler: optuna.samplers.BaseSampler,
    *,
    n_trials: int,
    n_seeds: int = 20,
    max_seconds: float | None = None,
    objectives: Sequence[CostTable] = (),
    in_flight: int = 1,
    finished: Callable[[optuna.trial.FrozenTrial, Evaluation], None] = lambda trial, evaluation: None,
) -> list[Evaluation]:
    """Measure the float model and the uniform allocations, then run `n_trials` trials; returns all evaluations.

    `objectives` are the one or two costs that the study weighs against the loss, the size where there is none. The study begins
    with the uniform allocations within the budgets and `n_seeds` exact knapsack solutions along the front (where there are two
    costs: of each, and of both in equal parts); then `sampler` goes on from there (one of Optuna's is wrapped so that its
    proposals stay within the budgets).

    `in_flight` trials are proposed before the first of them is told, and they are told in the order proposed, whatever the order
    in which they are done: the trials depend on this number, but not on how many workers there are. `finished` is
    called with each that is told.
    """
    space, budgets = evaluate.engine.space, evaluate.budgets
    names = space.names
    objectives = objectives or [Bytes().table(space)]
    columns = [table.column for table in objectives]
    evaluate(FLOAT, "float")
    uniform = list(dict.fromkeys(space.uniform(scheme) for scheme in space.scheme_names))
    within = [a for a in uniform if feasible(budgets, space.choice(a))]
    for pending in [evaluate.submit(allocation, "uniform") for allocation in uniform if allocation not in within]:
        evaluate.result(pending)

    origins = dict.fromkeys(within, "uniform")
    space, budgets = restricted(space, budgets)
    losses = replace(sensitivity, space=space).losses()
    tables = [space.storage_bits if table.column == "size_bytes" else table.values for table in objectives]
    if len(tables) > 1:
        tables.append(mixed(tables, [1.0] * len(tables), space.allowed))
    for values in tables:
        for allocation in knapsack_seeds(space, losses, budgets, n_seeds // len(tables), values):
            origins.setdefault(allocation, "knapsack")
    proposer = sampler if isinstance(sampler, Proposer) else _within_budgets(sampler, space, losses, budgets)
    study = optuna.create_study(directions=["minimize"] * (1 + len(columns)), sampler=proposer)
    parameters = distributions(names, space.choices)
    seeds = list(origins)
    running: deque[tuple[optuna.Trial | int, Pending]] = deque()  # a number: one that was recorded

    def tell() -> Evaluation:
        trial, pending = running.popleft()
        evaluation = evaluate.result(pending)
        finished(study.tell(trial, _values(evaluation, columns)), evaluation)
        return evaluation

    # What was recorded is added as it was; the last of it are still running as the next is asked for, as they were.
    recorded = evaluate.recorded() if isinstance(sampler, Proposer) else []
    for number, found in enumerate(recorded):
        while len(running) >= in_flight:
            tell()
        allocation = seeds[number] if number < len(seeds) else found.allocation
        params = dict(found.allocation)
        study.add_trial(optuna.create_trial(state=optuna.trial.TrialState.RUNNING, params=params, distributions=parameters))
        running.append((number, evaluate.submit(allocation, "sampler", number)))
    for allocation in seeds[len(recorded) :]:
        study.enqueue_trial(dict(allocation))

    start = time.monotonic()
    with phase("search", n_trials, done=len(recorded)) as advance:

        def told_one() -> None:
            evaluation = tell()
            advance(f"{evaluation.average_bits:.2f} bits: loss {evaluation.loss:.3g}")

        for number in range(len(recorded), n_trials):
            while len(running) >= in_flight:
                told_one()
            late = max_seconds is not None and time.monotonic() - start > max_seconds
            if late or proposer.exhausted(study):
                break
            trial = study.ask(parameters)
            params = trial.params  # a copy of them all, every time
            allocation = Allocation((name, params[name]) for name in names)
            running.append((trial, evaluate.submit(allocation, origins.get(allocation, "sampler"), number)))
        while running:
            told_one()
    for pending in [evaluate.submit(allocation, "uniform") for allocation in uniform]:  # also those that no trial reached
        evaluate.result(pending)
    return evaluate.evaluations


def _values(evaluation: Evaluation, columns: Sequence[str]) -> tuple[float, ...]:
    """What a study is told: losses in log10, where a front is a line and not a wall."""
    return float(np.log10(max(evaluation.loss, LOSS_FLOOR))), *(evaluation.cost(column) for column in columns)


def check_sampler(sampler: optuna.samplers.BaseSampler, space: SearchSpace, budgets: Sequence[Budget]) -> None:
    """Raise `InputError` where the sampler cannot search this space, or no allocation is within all budgets together."""
    if not isinstance(sampler, Proposer):  # which checked it when it was made
        space, budgets = restricted(space, budgets)
        _within_budgets(sampler, space, np.where(space.allowed, 0.0, np.inf), budgets)


def _within_budgets(
    sampler: optuna.samplers.BaseSampler, space: SearchSpace, losses: np.ndarray, budgets: Sequence[Budget]
) -> Repaired:
    tables = [compact(space, budget.table.values) for budget in budgets]
    return Repaired(sampler, space.names, space.choices, compact(space, losses), tables, [budget.room for budget in budgets])


def compact(space: SearchSpace, table: np.ndarray) -> np.ndarray:
    """`[n_groups, n_schemes]` -> `[n_groups, n_choices]`: only what each group may take, in its order, padded with infinity."""
    rows = [values[allowed] for values, allowed in zip(table, space.allowed, strict=True)]
    padded = np.full((len(rows), max(len(row) for row in rows)), np.inf)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
    return padded


def knapsack_seeds(
    space: SearchSpace, losses: np.ndarray, budgets: Sequence[Budget], n: int, values: np.ndarray | None = None
) -> list[Allocation]:
    """At most `n` (0, or 2 and more) exact solutions of the additive problem, spread over the costs that the budgets allow.

    `values` `[n_groups, n_schemes]` is the objective's cost table, `None` the stored bits. Ordered so that any first few are
    spread too (van der Corput): a short run sees the whole front.
    """
    if n < 2:
        return []
    values = space.storage_bits if values is None else values
    limit = np.inf
    # A budget on the objective (in whichever unit) moves the upper end, so that all seeds fall on this side of it.
    for budget in budgets:
        scale = budget.table.values.sum() / values.sum()  # not entry by entry: what costs nothing is 0 in both
        if np.allclose(budget.table.values, scale * values, atol=0):
            limit = min(limit, budget.room / scale)
    found = front(losses, values, n, limit)
    tables, rooms = [budget.table.values for budget in budgets], [budget.room for budget in budgets]
    spread = sorted(range(len(found)), key=lambda i: f"{i:b}"[::-1])
    return list(dict.fromkeys(space.allocation(repair(found[i], losses, tables, rooms)) for i in spread))
