"""What `bench_search.py` checks beside the searches: the surrogate, the loss at equal bytes, and data that no search saw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from search_problems import Network, Problem
from search_runs import AT_BITS, METRIC_OF, ON_KL, OURS, enough, reference, runs_of, sensitivity

from mpsearch.allocation import Allocation
from mpsearch.budget import Budget
from mpsearch.costs.size import AverageBits
from mpsearch.divergence import LOSS_FLOOR
from mpsearch.evaluation import Score, SensitivityTable
from mpsearch.intervals import paired_interval
from mpsearch.optimize import knapsack
from mpsearch.optimize.pareto import hypervolume, non_dominated
from mpsearch.optimize.surrogate import Surrogate
from mpsearch.pipeline.solve import prediction

SOLVED = f"{OURS}, then solve"
SLOW = ("minilm", "efficientnet_lite0")  # an evaluation costs a second: fewer of them


def near_front(table: SensitivityTable, n: int, seed: int = 99) -> list[np.ndarray]:
    """Random mixed allocations: points of the additive front, 5 to 60 % of whose groups are moved by one or two levels."""
    rng = np.random.default_rng(seed)
    points = knapsack.front(table.losses(), table.space.storage_bits, 60)
    found = []
    for _ in range(n):
        choice = points[rng.integers(len(points))].copy()
        share = rng.uniform(0.05, 0.6)
        for group in range(len(choice)):
            if rng.random() < share:
                choice[group] = np.clip(choice[group] + rng.choice([-2, -1, -1, 1, 1, 2]), 0, table.values.shape[1] - 1)
        found.append(choice)
    return found


class Solved(NamedTuple):
    """What `prediction` reads of an evaluation."""

    allocation: Allocation
    loss: float


def searched(problem: Problem, cache: Path, name: str, n_before: int) -> list[list[Solved]]:
    """What each run of that name measured until it had as many evaluations as ours are compared at."""
    n = max(0, enough(problem) - n_before)
    runs = [run["trials"][:n] for run in runs_of(problem.name, cache) if run["run"] == name and n]
    return [[Solved(allocation_of(problem, trial["code"]), trial["loss"]) for trial in trials] for trials in runs]


def check(problem: Network, cache: Path) -> None:
    """Held-out allocations and the loss at equal bytes, of our searches on each metric: `<problem>-check.json`."""
    space = problem.space
    tables, ours = {}, {}
    for name, metric in METRIC_OF.items():
        if name == ON_KL or any(run["run"] == name for run in runs_of(problem.name, cache)):
            tables[name], n_before, _ = sensitivity(problem, metric, cache)
            ours[name] = searched(problem, cache, name, n_before)
    bits = space.storage_bits / space.numel
    rows = np.arange(len(bits))
    everything = np.array([(t["bits"], t["loss"]) for run in runs_of(problem.name, cache) for t in run["trials"]])
    front = everything[non_dominated(everything)]
    held = {c.tobytes(): c for c in near_front(tables[ON_KL], 40 if problem.name in SLOW else 500)}
    for trial in (trial for runs in ours.values() for trials in runs for trial in trials):
        held.pop(space.choice(trial.allocation).tobytes(), None)
    held_out = np.array(list(held.values()))
    losses = np.array([problem.score(space.allocation(c)).loss for c in held_out])
    least = np.array([front[front[:, 1] <= loss, 0].min(initial=np.inf) for loss in losses])
    keep = bits[rows, held_out].sum(1) <= least + 1
    held_out, losses = held_out[keep], losses[keep]

    limits = np.linspace(bits.min(1).sum(), bits.max(1).sum(), 13 if problem.name in SLOW else 31)[1:] * (1 + 1e-12)
    result: dict[str, Any] = {
        "n": enough(problem),
        "measured": np.log(losses).tolist(),
        "halves": [split_half(problem, choice) for choice in held_out[:200]],
        "limits": limits.tolist(),
    }
    for name, table in tables.items():
        additive = [space.allocation(knapsack.solve(table.losses(), bits, limit)) for limit in limits]
        found: dict[str, Any] = {
            "additive": Surrogate(table.losses(), table.exact).additive(held_out).tolist(),
            "loss_additive": [problem.score(allocation).loss for allocation in additive],
            "surrogates": [],
            "loss_ours": [],
            "loss_solved": [],
        }
        for trials in ours[name]:
            found["surrogates"].append(fitted(table, trials, held_out))
            sizes = np.array([bits[rows, space.choice(trial.allocation)].sum() for trial in trials])
            within = [np.array([t.loss for t in trials])[sizes <= limit].min(initial=np.inf) for limit in limits]
            predicted = [prediction(table, trials, [Budget(AverageBits().table(space), limit)]) for limit in limits]  # type: ignore[arg-type]
            there = [problem.score(allocation).loss for allocation in predicted]
            found["loss_ours"].append(within)
            found["loss_solved"].append(np.minimum(there, np.minimum(within, found["loss_additive"])).tolist())
        result[name] = found
    (cache / f"{problem.name}-check.json").write_text(json.dumps(result))
    print(f"{problem.name}: {len(losses)} held out", flush=True)


def fitted(table: SensitivityTable, trials: list[Solved], held_out: np.ndarray) -> dict[str, list[float]]:
    """What the surrogate, fitted to these trials, says of the ln losses of others."""
    surrogate = Surrogate(table.losses(), table.exact, table.effects)
    choices = np.stack([table.space.choice(trial.allocation) for trial in trials])
    log_losses = np.log([max(trial.loss, LOSS_FLOOR) for trial in trials])
    surrogate.choose_variances(choices, log_losses)
    surrogate.fit(choices, log_losses)
    mean, deviation = surrogate.predict(held_out)
    return {"predicted": mean.tolist(), "deviation": deviation.tolist()}


def allocation_of(problem: Problem, code: str) -> Allocation:
    """The allocation that `Problem.encode` wrote."""
    return problem.space.allocation(np.array([int(c, 36) for c in code]))


def confirm(problem: Network, cache: Path) -> None:
    """At each size the additive optimum beside ours on the confirm split, by the paired interval: `<problem>-confirm.json`."""
    space, quality, engine = problem.space, problem.engine.quality, problem.engine
    on_kl, _, _ = sensitivity(problem, "kl", cache)
    table, n_before, _ = sensitivity(problem, METRIC_OF[OURS], cache)
    runs = runs_of(problem.name, cache)
    bits = space.storage_bits / space.numel
    rows: list[dict[str, Any]] = []
    of_float = engine.score_of(None, "confirm")
    for limit, name in AT_BITS.items():
        best, ours = (space.allocation(knapsack.solve(metric.losses(), bits, limit)) for metric in (on_kl, table))
        theirs = confirm_score(problem, best)
        budget = Budget(AverageBits().table(space), limit)
        ways: dict[str, list[Allocation]] = {"additive": [best], "additive optimum on gauss_newton": [ours], name: [], SOLVED: []}
        for run in runs:
            if run["run"] == name:
                found = min((t for t in run["trials"] if t["bits"] <= limit), key=lambda t: t["loss"])
                ways[name].append(allocation_of(problem, found["code"]))
        for known in searched(problem, cache, OURS, n_before):
            pool = [ours, prediction(table, known, [budget])]  # type: ignore[arg-type]
            pool += [e.allocation for e in known if budget.allows(space.choice(e.allocation))]
            ways[SOLVED].append(min(pool, key=lambda allocation: problem.score(allocation).loss))
        rows += [{"bits": limit, "way": way, **_confirmed(problem, found, theirs)} for way, found in ways.items() if found]
    result = {"quality": quality.name, "kind": quality.kind, "n": of_float.n_samples, "float": of_float.quality, "rows": rows}
    (cache / f"{problem.name}-confirm.json").write_text(json.dumps(result))
    print(f"{problem.name}: {result}", flush=True)


def _confirmed(problem: Network, allocations: list[Allocation], theirs: Score) -> dict[str, Any]:
    """The mean of the seeds' samples beside `theirs`; positive differences are for the better."""
    quality = problem.engine.quality
    scores = [confirm_score(problem, allocation) for allocation in allocations]
    mean = np.mean([score.qualities for score in scores], axis=0, dtype=np.float64)
    each = [float(quality.sign * (score.quality - theirs.quality)) for score in scores]
    base = float(theirs.qualities.mean(dtype=np.float64))
    ends = [quality.sign * (quality.score(base + end) - quality.score(base)) for end in paired_interval(mean, theirs.qualities)]
    return {
        "quality": quality.score(float(mean.mean())),
        "loss": float(np.mean([score.loss for score in scores])),
        "search_loss": float(np.mean([problem.score(allocation).loss for allocation in allocations])),
        "each": each,
        "difference": quality.sign * (quality.score(float(mean.mean())) - quality.score(base)),
        "low": min(ends),
        "high": max(ends),
    }


@torch.no_grad()
def fronts(problem: Network, cache: Path, n_most: int = 500) -> None:
    """The hypervolume of whole fronts on (the first `n_most` images of) the confirm split: `<problem>-fronts.json`."""
    space, engine = problem.space, problem.engine
    n_batches = -(-n_most // len(engine.batches("confirm")[0][1]))
    inputs = [x for x, _ in engine.batches("confirm")][:n_batches]

    def logits(allocation: Allocation) -> torch.Tensor:
        with engine.applied(allocation) as model:
            return torch.cat([problem.task.forward(model, x) for x in inputs])

    truth = logits(Allocation())
    bits, _ = reference(problem)
    worst = engine.divergence.mean(logits(space.uniform(space.scheme_names[0])), truth)
    rows, losses = [], {}
    for run in runs_of(problem.name, cache):
        if run["seed"] == 0 and run["run"] in (*METRIC_OF, "ILP on KL", "ILP on gauss_newton (values alone)"):
            trials = run["trials"][: enough(problem) - run["before"]] if run["run"] in METRIC_OF else run["trials"]
            front = [trials[i] for i in np.flatnonzero(non_dominated(np.array([(t["bits"], t["loss"]) for t in trials])))]
            for trial in front:
                if trial["code"] not in losses:
                    losses[trial["code"]] = engine.divergence.mean(logits(allocation_of(problem, trial["code"])), truth)
            points = [(t["bits"], losses[t["code"]]) for t in front]
            value = hypervolume(*np.array(points).T, bits, worst)
            rows.append({"run": run["run"], "total": run["before"] + len(trials), "points": points, "hypervolume": value})
            print(run["run"], len(points), value, flush=True)
    (cache / f"{problem.name}-fronts.json").write_text(json.dumps({"n": len(truth), "rows": rows}))


def confirm_score(problem: Network, allocation: Allocation) -> Score:
    """On the confirm split, with the quality of each sample."""
    with problem.engine.applied(allocation) as model:
        return problem.engine.score_of(model, "confirm")


@torch.no_grad()
def split_half(problem: Network, choice: np.ndarray) -> tuple[float, float]:
    """The loss on the even and on the odd samples of the search split."""
    engine = problem.engine
    log_p = engine.float_logits("search").log_softmax(-1)
    with engine.applied(engine.space.allocation(choice)) as model:
        log_q = engine.scorer.outputs(model, "search").log_softmax(-1)
    each = (log_p.exp() * (log_p - log_q)).sum(-1).double()
    return each[::2].mean().item(), each[1::2].mean().item()
