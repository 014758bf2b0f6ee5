"""When a trial may stop early: after a few batches of the search data it is plain that it will not reach the front.

All trials run on the same batches in the same order, so that what a whole loss will be is known from the loss of the first ones:
ln L = ln L_r + c_r + noise, where c_r says how much easier or harder the first batches are, and the noise is small, because the
samples are the same. Both are read off the trials that were measured whole. A trial stops at rung r where the lower end of the
interval of its whole loss lies above the front at its cost. Racing on paired samples is Maron and Moore's (1994, "Hoeffding
races"); rungs are those of successive halving (Jamieson and Talwalkar 2016).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mpsearch.errors import InputError
from mpsearch.evaluation import Evaluation, Stop

Floats = NDArray[np.float64]

FEWEST = 8  # whole evaluations that an interval needs
NEAREST = 24  # in loss, to the front's, that it is taken from
WIDTH = 2.0  # standard deviations: one trial in forty is stopped that would have reached the front
RIDGE = 1.0  # nats squared: prior sum of squares of the slope's pull to 1
LEAST_SLOPE = 0.25
UNKNOWN = 1.0  # nats: how well a first part says the whole, before trials have shown it
LOSS_FLOOR = 1e-9  # nats: below it float rounding is all there is


def rungs(shares: Sequence[float], n_batches: int) -> list[int]:
    """The numbers of batches after which a trial may stop: `shares` of all, whole, rising, fewer than all."""
    for share in shares:
        if not (isinstance(share, int | float) and 0 < share < 1):
            raise InputError(f"rungs are parts of the search data, numbers between 0 and 1; '{share}' came. For none: rungs=[].")
    return sorted({max(1, round(share * n_batches)) for share in shares} - {n_batches})


def whole_losses(at: Floats, first: Floats, whole: Floats) -> tuple[Floats, Floats]:
    """(means, standard deviations) [k] of ln whole losses, where the first samples' ln losses are `at` [k].

    `first` and `whole` [m] are those of trials that were measured whole. With fewer than `FEWEST` the deviations are `UNKNOWN`.
    """
    if len(first) < FEWEST:
        return at + (np.mean(whole - first) if len(first) else 0.0), np.full(len(at), UNKNOWN)
    means, deviations = np.empty(len(at)), np.empty(len(at))
    for i, x in enumerate(at):
        near = np.argsort(np.abs(first - x), kind="stable")[:NEAREST]
        slope, intercept, deviations[i] = _line(first[near], whole[near])
        means[i] = slope * x + intercept
    return means, deviations


def stops(
    batches: Sequence[int], told: Sequence[Evaluation], costs: Mapping[str, float], seen: int = 0, revisits: bool = False
) -> list[Stop]:
    """What a trial of these `costs` (by column) may lose at most after each of `batches`, given the trials `told` so far.

    The first `seen` rungs it has passed before. A sampler that `revisits` what was left early sees each at the first rung.
    """
    never = [(n, np.inf) for n in batches]
    whole = [e for e in told if len(e.rung_losses) == len(batches) and not e.stopped and LOSS_FLOOR < e.loss < np.inf]
    no_dearer = (e for e in told if e.feasible and not e.stopped and all(e.cost(name) <= cost for name, cost in costs.items()))
    front = min((e.loss for e in no_dearer), default=np.inf)
    if not batches or len(whole) < FEWEST or not np.isfinite(front) or front <= LOSS_FLOOR:
        return never
    if revisits and not seen:
        return [(batches[0], -1.0), *never[1:]]
    level = np.log(front)
    near = sorted(whole, key=lambda e: abs(np.log(e.loss) - level))[:NEAREST]
    losses = np.log([e.loss for e in near])
    found = never[:seen]
    for i, n in enumerate(batches[seen:], start=seen):
        slope, intercept, deviation = _line(np.log([max(e.rung_losses[i], LOSS_FLOOR) for e in near]), losses)
        found.append((n, float(np.exp((level + WIDTH * deviation - intercept) / slope))))
    return found


def _line(first: Floats, whole: Floats) -> tuple[float, float, float]:
    """(slope, intercept, standard deviation of a new value) of whole [m] over first [m]; a ridge pulls the slope to 1."""
    x, rest = first - first.mean(), whole - first
    x, rest, middle = x, rest - rest.mean(), rest.mean()
    bend = float(x @ rest / (x @ x + RIDGE))
    left = rest - bend * x
    slope = max(1 + bend, LEAST_SLOPE)
    deviation = np.sqrt(left @ left / (len(x) - 2) * (1 + 1 / len(x)))
    return slope, float(middle + (1 - slope) * first.mean()), float(deviation)
