"""The search: ask, evaluate, tell."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from mpsearch.engine.engine import FLOAT
from mpsearch.evaluation import Evaluation, EvaluationLog
from mpsearch.pipeline.accept import accept, seconds_of
from mpsearch.pipeline.evaluators import Pending, SearchEvaluator
from mpsearch.pipeline.seeds import Seeds, uniform_allocations
from mpsearch.progress import phase
from mpsearch.runs.deadline import Deadline
from mpsearch.samplers.base import Choice, Sampler

TRIALS_SHARE = 0.7  # of the time for the search; the rest is for the references of proposals


def search(
    evaluate: SearchEvaluator,
    sampler: Sampler,
    *,
    n_trials: int,
    n_seeds: int = 20,
    deadline: Deadline | None = None,
    in_flight: int = 1,
    finished: Callable[[Evaluation], None] = lambda evaluation: None,
) -> EvaluationLog:
    """Evaluate the float model and the uniform allocations, then `n_trials` proposals, and accept those that are better.

    Returns the log of all evaluations. What is accepted, `mpsearch.pipeline.accept` says.

    Parameters
    ----------
    evaluate
        Its log holds the evaluations of an interrupted run, which is resumed.
    sampler
        Proposes what follows the seeds.
    n_seeds
        Exact knapsack solutions, at most, that the study begins with after the uniform allocations; see `Seeds`.
    deadline
        When all of this should end; `None`: no limit. The uniform allocations are measured however late it is.
    in_flight
        Trials that are proposed before the first of them is told. They are told in the order proposed, so that the trials depend
        on this number, and not on the number of workers or their speed.
    finished
        Called with each trial when it is told.
    """
    space, deadline = evaluate.engine.space, deadline or Deadline()
    evaluate(FLOAT, "float")
    seeds = Seeds(sampler.problem, n_seeds)
    evaluate.all(seeds.infeasible, "uniform")
    trials = _Trials(evaluate, sampler, seeds)
    trials_end = deadline.part(TRIALS_SHARE)
    with phase("search", n_trials, done=trials.n_recorded) as advance:
        pending = _InFlight(evaluate, sampler, trials.n_recorded, finished, advance)
        for trial in range(n_trials):
            pending.tell(leave=in_flight - 1)
            late = not trials_end.affordable(1, seconds_of(evaluate.log))
            if trial >= trials.n_recorded and (late or sampler.exhausted()):
                if late:
                    deadline.leave_out(f"{n_trials - trial} of {n_trials} trials")
                break
            allocation = space.allocation(sampler.ask(trials.given(trial)))
            pending.add(evaluate.submit(allocation, seeds.origin(allocation), trial))
        pending.tell(leave=0)
    evaluate.all(uniform_allocations(space), "uniform")  # also those that no trial reached
    accept(evaluate, sampler.problem, deadline)
    return evaluate.log


class _Trials:
    """What a trial is given instead of a proposal: a seed, or what was recorded of it before the run was interrupted."""

    def __init__(self, evaluate: SearchEvaluator, sampler: Sampler, seeds: Seeds) -> None:
        space, recorded = evaluate.engine.space, evaluate.log.trials()
        self.n_recorded = len(recorded)
        given = seeds.allocations
        if not sampler.replayable:
            given = [*given, *(e.allocation for e in recorded[len(given) :])]
        self._given = [space.choice(allocation) for allocation in given]

    def given(self, trial: int) -> Choice | None:
        """Scheme indices `[n_groups]`; `None`: the sampler is asked."""
        return self._given[trial] if trial < len(self._given) else None


class _InFlight:
    """The trials that were proposed and not told yet; told in the order proposed."""

    def __init__(
        self,
        evaluate: SearchEvaluator,
        sampler: Sampler,
        n_recorded: int,
        finished: Callable[[Evaluation], None],
        advance: Callable[[str], None],
    ) -> None:
        self.evaluate, self.sampler, self.finished, self.advance = evaluate, sampler, finished, advance
        self.columns = [table.column for table in sampler.problem.objectives]
        self.n_recorded = n_recorded
        self._pending: deque[Pending] = deque()

    def add(self, pending: Pending) -> None:
        """The next trial, submitted."""
        self._pending.append(pending)

    def tell(self, leave: int) -> None:
        """Wait for the oldest and tell the sampler, until `leave` are left."""
        while len(self._pending) > leave:
            pending = self._pending.popleft()
            evaluation = self.evaluate.result(pending)
            assert pending.trial is not None
            self.sampler.tell(pending.trial, evaluation.objectives(self.columns))
            self.finished(evaluation)
            if pending.trial >= self.n_recorded:
                self.advance(f"{evaluation.average_bits:.2f} bits: loss {evaluation.loss:.3g}")
