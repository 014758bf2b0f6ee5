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

from mpsearch.errors import InputError
from mpsearch.evaluation import Evaluation, Stop

FEWEST = 8  # whole evaluations that an interval needs
NEAREST = 24  # in loss, to the front's, that it is taken from
WIDTH = 2.0  # standard deviations: one trial in forty is stopped that would have reached the front
LOSS_FLOOR = 1e-9  # nats: below it float rounding is all there is


def rungs(shares: Sequence[float], n_batches: int) -> list[int]:
    """The numbers of batches after which a trial may stop: `shares` of all, whole, rising, fewer than all."""
    for share in shares:
        if not (isinstance(share, int | float) and 0 < share < 1):
            raise InputError(f"rungs are parts of the search data, numbers between 0 and 1; '{share}' came. For none: rungs=[].")
    return sorted({max(1, round(share * n_batches)) for share in shares} - {n_batches})


def stops(batches: Sequence[int], told: Sequence[Evaluation], costs: Mapping[str, float]) -> list[Stop]:
    """What a trial of these `costs` (by column) may lose at most after each of `batches`, given the trials `told` so far."""
    whole = [e for e in told if len(e.rung_losses) == len(batches) and not e.stopped and 0 < e.loss < np.inf]
    no_dearer = (e for e in told if e.feasible and not e.stopped and all(e.cost(name) <= cost for name, cost in costs.items()))
    front = min((e.loss for e in no_dearer), default=np.inf)
    if len(whole) < FEWEST or not np.isfinite(front) or front <= LOSS_FLOOR:
        return [(n, np.inf) for n in batches]
    level = np.log(front)
    near = sorted(whole, key=lambda e: abs(np.log(e.loss) - level))[:NEAREST]
    found: list[Stop] = []
    for i, n in enumerate(batches):
        rest = np.log([e.loss / max(e.rung_losses[i], LOSS_FLOOR) for e in near])
        wide = WIDTH * rest.std(ddof=1) * np.sqrt(1 + 1 / len(rest))
        found.append((n, float(np.exp(level - rest.mean() + wide))))
    return found
