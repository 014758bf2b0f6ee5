"""What makes one set of measured allocations better than another: the non-dominated ones, and their hypervolume.

Everything is minimized. Losses that span decades (KL divergences) are compared in log10: in linear KL even random search scores
95 % of the hypervolume, so linear axes say nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mpsearch.divergence import LOSS_FLOOR
from mpsearch.errors import InputError


def non_dominated(points: ArrayLike) -> NDArray[np.bool_]:
    """Mask [n] of the `points` [n, k], all axes minimized, that no other point equals or beats on every axis.

    Of identical points the first is kept.

    Raises:
        InputError: a coordinate is NaN.
    """
    points = np.asarray(points, dtype=np.float64)
    if points.ndim != 2:
        raise ValueError(f"points must be [n, k], not {points.shape}.")
    _no_nan("points", points)
    order = np.lexsort(points.T[::-1])  # stable, so that a point can be dominated by earlier ones only
    ranked = points[order]
    mask = np.zeros(len(points), dtype=bool)
    if points.shape[1] == 2:
        best_before = np.concatenate(([np.inf], np.minimum.accumulate(ranked[:, 1])[:-1]))[: len(points)]
        better = ranked[:, 1] < best_before
        better[:1] = True  # also where it is infinite
        mask[order[better]] = True
        return mask
    kept = np.empty_like(ranked)
    n_kept = 0
    for index, point in zip(order, ranked, strict=True):
        if not (kept[:n_kept] <= point).all(1).any():
            kept[n_kept] = point
            n_kept += 1
            mask[index] = True
    return mask


def nearest_front(costs: ArrayLike, losses: ArrayLike, n: int) -> NDArray[np.intp]:
    """Indices, ascending, of the at most `n` points (costs [m], losses [m]) that lie least above the front of all of them."""
    costs, losses = np.asarray(costs, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if len(costs) <= n:
        return np.arange(len(costs))
    order = np.argsort(costs, kind="stable")
    above = np.empty(len(costs))
    above[order] = losses[order] - np.minimum.accumulate(losses[order])
    return np.sort(np.argsort(above, kind="stable")[:n])


def hypervolume(average_bits: ArrayLike, kl: ArrayLike, reference_bits: float, reference_kl: float) -> float:
    """Area (bits x decades) that the points dominate below the reference: average bits and log10 max(KL, `LOSS_FLOOR`).

    `average_bits` [n] and `kl` [n], nats. The reference is the worst corner: (bits of uniform 8-bit, KL of uniform 2-bit). Points
    beyond it contribute nothing. More is better.

    Example: the one point (4 bits, KL 0.01) below the reference (8 bits, KL 1) has 4 bits x 2 decades = 8.

    Raises:
        InputError: something is NaN.
    """
    bits, kl = np.asarray(average_bits, dtype=np.float64), np.asarray(kl, dtype=np.float64)
    if bits.ndim != 1 or bits.shape != kl.shape:
        raise ValueError(f"average_bits and kl must be [n] alike, not {bits.shape} and {kl.shape}.")
    for name, values in (("average_bits", bits), ("kl", kl), ("the reference", np.array([reference_bits, reference_kl]))):
        _no_nan(name, values)
    log_kl, log_reference = np.log10(np.maximum(kl, LOSS_FLOOR)), np.log10(max(reference_kl, LOSS_FLOOR))
    inside = (bits < reference_bits) & (log_kl < log_reference)
    points = np.stack([bits, log_kl], axis=1)[inside]
    points = points[non_dominated(points)]
    points = points[np.argsort(points[:, 0])]  # bits rise, KL falls
    widths = np.diff(points[:, 0], append=reference_bits)
    return float((widths * (log_reference - points[:, 1])).sum())


def _no_nan(name: str, values: NDArray[np.float64]) -> None:
    if np.isnan(values).any():
        raise InputError(
            f"{name} holds NaN ({int(np.isnan(values).sum())} of {values.size} numbers): leave failed evaluations out."
        )
