"""The search: ask, evaluate, tell. The only study in the package.

Optuna proposes one categorical parameter a group. The study lives in memory and the run's table is the record. A run that was
interrupted goes on from its recorded trials, which are added to a new study; with Optuna's own samplers it is replayed (asked
again from the same seed, in order), with recorded allocations looked up instead of measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import optuna

from mpsearch.allocation import Allocation, SearchSpace
from mpsearch.budget import Budget
from mpsearch.costs.base import CostTable
from mpsearch.engine import FLOAT, QuantEngine
from mpsearch.errors import InputError
from mpsearch.evaluation import Evaluation, Score, SensitivityTable
from mpsearch.hardware import model_latency
from mpsearch.knapsack import front, repair
from mpsearch.packed import packed
from mpsearch.progress import phase
from mpsearch.samplers.base import distributions
from mpsearch.samplers.proposer import Proposer
from mpsearch.samplers.repaired import Repaired
from mpsearch.trace import first_samples

# Losses are told in log10, where a front is a line and not a wall; below this floor (nats) float rounding is all there is.
LOSS_FLOOR = 1e-9
LATENCY_SECONDS = 0.1  # spent on timing each confirmed point

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Evaluator:
    """Scores allocations with the engine, adds their costs, and records each new evaluation before it returns it.

    On the confirm split they run on packed weights, and a forward pass of `latency_batch_size` samples is timed. `costs` are
    those beside the size. `known` are the evaluations of an interrupted run: a trial that is among them is looked up, by number,
    and must be the same.
    """

    def __init__(
        self,
        engine: QuantEngine,
        budgets: Sequence[Budget],
        record: Callable[[Evaluation], None] = lambda evaluation: None,
        known: Sequence[Evaluation] = (),
        costs: Sequence[CostTable] = (),
        latency_batch_size: int = 1,
    ) -> None:
        self.engine, self.budgets, self.record, self.costs = engine, budgets, record, costs
        self.latency_batch_size = latency_batch_size
        self.evaluations = list(known)
        self._trials = {(e.split, e.trial): e for e in known if e.trial is not None}
        self._measured = {(e.split, e.allocation): e for e in known}
        self._qualities: dict[Allocation, np.ndarray] = {}

    def qualities(self, allocation: Allocation) -> np.ndarray:
        """The quality of each sample of the confirm split, float32 `[n]`; run again where it is not at hand."""
        if allocation not in self._qualities:
            self._qualities[allocation] = self.run_packed(allocation)[0].qualities
        return self._qualities[allocation]

    def __call__(self, allocation: Allocation, origin: str, split: str = "search", trial: int | None = None) -> Evaluation:
        """The allocation's evaluation on the split; a repeat costs nothing, a repeated trial still gets its row."""
        if trial is None and (split, allocation) in self._measured:
            return self._measured[split, allocation]
        if trial is not None and (split, trial) in self._trials:
            found = self._trials[split, trial]
            if found.allocation != allocation:
                raise InputError(
                    f"Trial {trial} of this run was another allocation than the sampler proposes now: the run cannot be gone on "
                    "with (another version of Optuna or of mpsearch?). Start a new run."
                )
            return found
        start = time.perf_counter()
        earlier = self._measured.get((split, allocation))
        evaluation = self._measure(allocation, origin, split, trial, earlier, start)
        self.record(evaluation)
        self.evaluations.append(evaluation)
        self._measured.setdefault((split, allocation), evaluation)
        return evaluation

    def recorded(self) -> list[Evaluation]:
        """The trials of an interrupted run, from the first on, as far as none is missing."""
        found: list[Evaluation] = []
        while ("search", len(found)) in self._trials:
            found.append(self._trials["search", len(found)])
        return found

    def _measure(
        self, allocation: Allocation, origin: str, split: str, trial: int | None, earlier: Evaluation | None, start: float
    ) -> Evaluation:
        space = self.engine.space
        choice = space.choice(allocation) if allocation else None
        bits = space.size_bits(choice)
        score: Score | Evaluation
        milliseconds = None
        if earlier is None and split == "confirm":
            score, milliseconds = self.run_packed(allocation)
            self._qualities[allocation] = score.qualities
        else:
            score = earlier or self.engine.score(allocation, split)
        return Evaluation(
            trial=trial,
            origin=origin,
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
            feasible=choice is None or all(budget.allows(choice) for budget in self.budgets),
            n_samples=score.n_samples,
            seconds=time.perf_counter() - start,
            packed=split == "confirm" and choice is not None,
            measured_ms=milliseconds,
            costs={} if choice is None else {table.column: table.of(choice) for table in self.costs},
        )

    def run_packed(self, allocation: Allocation) -> tuple[Score, float]:
        """Score on the confirm split on packed weights, and milliseconds of a forward pass there."""
        engine = self.engine
        engine.float_logits("confirm")
        inputs = first_samples(engine.batches("confirm")[0][0], self.latency_batch_size)
        with packed(engine, allocation) as model:
            score = engine.score_of(model if allocation else None, "confirm")
            milliseconds = model_latency({"": model}, engine.task.forward, inputs, LATENCY_SECONDS)[""]
        return score, milliseconds


def search(
    evaluate: Evaluator,
    sensitivity: SensitivityTable,
    sampler: optuna.samplers.BaseSampler,
    *,
    n_trials: int,
    n_seeds: int = 20,
    max_seconds: float | None = None,
    objective: CostTable | None = None,
) -> list[Evaluation]:
    """Measure the float model and the uniform allocations, then run `n_trials` trials; returns all evaluations.

    `objective` is the cost that the study weighs against the loss, `None` the size. The study begins with the uniform
    allocations within the budgets and `n_seeds` exact knapsack solutions along the front; then `sampler` goes on from there (one
    of Optuna's is wrapped so that its proposals stay within the budgets).
    """
    space, budgets = evaluate.engine.space, evaluate.budgets
    names, losses = space.names, sensitivity.losses()
    column = "size_bytes" if objective is None else objective.column
    evaluate(FLOAT, "float")
    uniform = list(dict.fromkeys(space.uniform(scheme) for scheme in space.scheme_names))
    within = [a for a in uniform if all(budget.allows(space.choice(a)) for budget in budgets)]
    for allocation in uniform:
        if allocation not in within:
            evaluate(allocation, "uniform")

    origins = dict.fromkeys(within, "uniform")
    for allocation in knapsack_seeds(space, losses, budgets, n_seeds, None if objective is None else objective.values):
        origins.setdefault(allocation, "knapsack")
    proposer = sampler if isinstance(sampler, Proposer) else _within_budgets(sampler, space, losses, budgets)
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=proposer)
    parameters = distributions(names, space.choices)
    seeds = list(origins)
    recorded = evaluate.recorded() if isinstance(sampler, Proposer) else []
    for number, found in enumerate(recorded):
        known = evaluate(seeds[number] if number < len(seeds) else found.allocation, "sampler", trial=number)
        study.add_trial(
            optuna.create_trial(params=dict(known.allocation), distributions=parameters, values=_values(known, column))
        )
    for allocation in seeds[len(recorded) :]:
        study.enqueue_trial(dict(allocation))

    start = time.monotonic()
    with phase("search", n_trials, done=len(recorded)) as advance:
        for number in range(len(recorded), n_trials):
            late = max_seconds is not None and time.monotonic() - start > max_seconds
            if late or proposer.exhausted(study):
                break
            trial = study.ask(parameters)
            allocation = Allocation((name, trial.params[name]) for name in names)
            evaluation = evaluate(allocation, origins.get(allocation, "sampler"), trial=number)
            study.tell(trial, _values(evaluation, column))
            advance(f"{evaluation.average_bits:.2f} bits: KL {evaluation.loss:.3g}")
    for allocation in uniform:  # also those that the trials did not reach
        evaluate(allocation, "uniform")
    return evaluate.evaluations


def _values(evaluation: Evaluation, column: str) -> tuple[float, float]:
    """What a study is told."""
    return float(np.log10(max(evaluation.loss, LOSS_FLOOR))), evaluation.cost(column)


def check_sampler(sampler: optuna.samplers.BaseSampler, space: SearchSpace, budgets: Sequence[Budget]) -> None:
    """Raise `InputError` where the sampler cannot search this space, or no allocation is within all budgets together."""
    if not isinstance(sampler, Proposer):  # which checked it when it was made
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
