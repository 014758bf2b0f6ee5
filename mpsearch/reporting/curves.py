"""What a run's evaluations say of the search itself: predicted and measured losses, and the hypervolume as it grew."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mpsearch.evaluation import LATER, Evaluation, SensitivityTable
from mpsearch.optimize.pareto import hypervolume
from mpsearch.optimize.surrogate import Surrogate
from mpsearch.reporting.tables import evenly
from mpsearch.runs.run import Run

MAX_PREDICTED = 800  # evaluations, evenly spread over those of the search
MAX_STEPS = 60  # of the curve of the hypervolume
MAX_INTERACTING = 48  # groups of a matrix of interactions, those with the strongest
LEAST_SHOWN = 0.02  # of the largest correlation; below, what the errors have in common changes no loss that is read


@dataclass(frozen=True)
class Curve:
    """Hypervolume (average bits x decades of loss) of the first `evaluations` on the search split, after `seconds` of them."""

    evaluations: NDArray[np.int64]
    seconds: NDArray[np.float64]
    volumes: NDArray[np.float64]


def searched(run: Run) -> list[Evaluation]:
    """The first evaluation of each allocation on the search split, in the order measured; those that broke are left out."""
    first: dict[object, Evaluation] = {}
    for e in run.evaluations:
        if e.split == "search" and e.origin not in ("float", *LATER) and np.isfinite(e.loss):
            first.setdefault(e.allocation, e)
    return list(first.values())


def predicted_losses(run: Run) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(predicted, measured) loss `[n]` on the search split, predicted from the sensitivities and known interactions alone."""
    measured = searched(run)
    measured = [measured[i] for i in evenly(len(measured), MAX_PREDICTED)]
    if not measured:
        return np.empty(0), np.empty(0)
    table = run.sensitivity
    choices = np.array([run.space.choice(e.allocation) for e in measured])
    logs, _ = Surrogate(table.losses(), table.exact, table.effects).predict(choices)
    return np.exp(logs), np.array([e.loss for e in measured])


def hypervolume_curve(run: Run) -> Curve | None:
    """How the hypervolume grew; `None` where its reference, two uniform allocations, was not measured or costs are not sizes."""
    uniform, measured = run.unrefined.uniform, [e for e in searched(run) if e.feasible]
    if len(uniform) < 2 or not measured or list(run.objectives) != ["size_bytes"] or not np.isfinite(uniform[0][1].loss):
        return None
    bits, losses = (np.array(values) for values in zip(*((e.average_bits, e.loss) for e in measured), strict=True))
    ends = np.unique(np.linspace(1, len(measured), min(MAX_STEPS, len(measured))).round().astype(int))
    corner = uniform[-1][1].average_bits, uniform[0][1].loss
    volumes = np.array([hypervolume(bits[:n], losses[:n], *corner) for n in ends])
    return Curve(ends, np.cumsum([e.seconds for e in measured])[ends - 1], volumes)


def kendall(predicted: NDArray[np.float64], measured: NDArray[np.float64]) -> float:
    """Kendall's tau-b of both, 1 where their orders agree; NaN where it is not defined."""
    from scipy.stats import kendalltau

    return float(kendalltau(predicted, measured).statistic) if len(predicted) > 2 else float("nan")


def interactions(table: SensitivityTable, picked: Evaluation) -> pd.DataFrame | None:
    """The correlation of the groups' errors as far as it carries over to other data, groups by groups; the diagonal is NaN.

    It is 1 where the errors of two groups change the outputs alike, so that they add up, and -1 where they cancel (the inner
    products of their Gauss-Newton features). `None` where the metric has no features, and where no pair reaches `LEAST_SHOWN`.
    """
    if table.effects is None:
        return None
    names, choice = list(table.space.names), table.space.choice(picked.allocation)
    each = np.arange(len(names))
    features = table.effects[:, each, choice].astype(float)
    squared = 2 * table.losses()[each, choice]
    correlations = features.T @ features / np.sqrt(np.maximum(np.outer(squared, squared), 1e-300))
    np.fill_diagonal(correlations, np.nan)
    largest = np.nanmax(np.abs(correlations), initial=0.0)
    return pd.DataFrame(correlations, index=names, columns=names) if largest >= LEAST_SHOWN else None


def strongest(matrix: pd.DataFrame, n: int = MAX_INTERACTING) -> pd.DataFrame:
    """Of a matrix of interactions the part of the `n` groups with the largest ones, in their order."""
    strength = np.nan_to_num(np.abs(matrix.to_numpy()), nan=0.0).max(1)
    kept = np.sort(np.argsort(-strength, kind="stable")[:n])
    return matrix.iloc[kept, kept]
