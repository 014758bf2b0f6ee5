"""Gauss-Newton estimate of the loss with interactions between groups, from a few backward passes for all groups and schemes.

A layer's quantization changes its output by dy, and the logits by dz = J dy to first order. The KL divergence from the float
model's predictions p is then dz^T F dz / 2, F = diag(p) - p p^T (the Gauss-Newton form; Martens 2020, "New Insights and
Perspectives on the Natural Gradient Method", section 8), and F = B B^T with B = diag(sqrt p) - p sqrt(p)^T; other divergences
have other B (`Divergence.probe`). For random signs v the gradient g of the probe (B v)^T z at the layer's output has
E[(g . dy)^2] = dz^T F dz (Martens, Sutskever and Swersky 2012, "Estimating the Hessian by Back-propagating Curvature"), so that
with e = g . dy, a feature a row of logits and probe,

    L(x) = E (sum_g e_g(x_g))^2 / 2 = |sum_g e_g(x_g)|^2 / 2:

a group's own sensitivity is |e_g|^2 / 2, and the inner products are the interactions: which groups reinforce or cancel one
another (CLADO, Deng et al. 2023, https://arxiv.org/abs/2307.05657, measures these pair by pair). Diagonal Fisher information
(`fisher.py`) drops the products within a layer too. Runs on the search split, where proposals are measured; no label is used.

The inner products of two groups are means over few samples of values of either sign, and an allocation that exploits chance gains
on these samples alone. They are shrunk by how far they carry over from one half of the data to the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh
from torch import Tensor

from mpsearch.engine.engine import QuantEngine
from mpsearch.layer import LayerSpec
from mpsearch.metrics.base import Pair, SensitivityMetric, layers_by_group, quantize_groups
from mpsearch.metrics.fisher import changed, gradients_at, record_calls
from mpsearch.progress import phase

FEWEST_FEATURES, MOST_PROBES = 2000, 8
MOST_PAIRS = 4096  # whose inner products are kept, float64; beyond, the sensitivities alone are
MOST_DIMENSIONS = 128  # of the features; the rest of a group's sensitivity counts as its own
GRADIENT_BYTES = 2**28  # of gradients at once


class GaussNewton(SensitivityMetric):
    """Half the squared first-order change of the outputs, in the metric and unit of the divergence."""

    name = "gauss_newton"
    unit = "nats"

    def measure(self, engine: QuantEngine, pairs: Sequence[Pair]) -> Iterator[float]:
        """All pairs at once, then yielded one by one."""
        total = np.zeros(len(pairs))
        for features in self._features(engine, pairs):
            total += 0.5 * np.square(features).sum(0)
        yield from np.where(np.isfinite(total), total, np.inf).tolist()

    def measure_joint(self, engine: QuantEngine, pairs: Sequence[Pair]) -> tuple[NDArray[np.float64], NDArray[np.float32]] | None:
        """The values, and features in at most `MOST_DIMENSIONS`, as far as they carry over; `None` for too many pairs."""
        n = len(pairs)
        if n > MOST_PAIRS:
            return None
        halves = np.zeros((2, n, n))
        for features in self._features(engine, pairs):
            for half, rows in zip(halves, np.array_split(features, 2), strict=True):
                half += rows.T @ rows
        products, groups = halves.sum(0), np.array([group for group, _ in pairs])
        values = np.where(np.isfinite(products.diagonal()), 0.5 * products.diagonal(), np.inf)
        broken = np.isinf(values)
        products[broken], products[:, broken] = 0.0, 0.0
        carried = _carried_over(halves[:, ~broken][:, :, ~broken], groups[~broken])
        sizes, directions = eigh(products, subset_by_index=(max(0, n - MOST_DIMENSIONS), n - 1))
        return values, (np.sqrt(np.maximum(carried * sizes, 0.0)) * directions).T.astype(np.float32)

    def _features(self, engine: QuantEngine, pairs: Sequence[Pair]) -> Iterator[NDArray[np.float64]]:
        """`[rows of logits, n_pairs]` for each batch and probe; the sum of all squares is twice the loss."""
        columns: dict[str, dict[tuple[LayerSpec, str], list[int]]] = {}  # module -> (its layer, scheme) -> columns
        layers = layers_by_group(engine)
        for column, (group, scheme) in enumerate(pairs):
            for layer in layers[group]:
                for module in layer.readers:
                    columns.setdefault(module, {}).setdefault((layer, scheme), []).append(column)
        quantize_groups(engine, pairs)
        batches, n_rows = engine.batches("search"), len(engine.float_logits("search"))
        n_probes = min(MOST_PROBES, math.ceil(FEWEST_FEATURES / n_rows))
        generator = torch.Generator().manual_seed(0)
        with phase("joint effects", len(batches)) as advance:
            for inputs, _ in batches:
                logits, calls = record_calls(engine, list(columns), inputs)
                call_bytes = sum(call.output.numel() * call.output.element_size() for _, call in calls)
                at_once = max(1, GRADIENT_BYTES // max(call_bytes, 1))
                for start in range(0, n_probes, at_once):
                    probes = [engine.divergence.probe(logits, generator) for _ in range(start, min(start + at_once, n_probes))]
                    gradients = [gradients_at(calls, probe) for probe in probes]
                    features = np.zeros((len(probes), len(logits), len(pairs)))  # the change is computed once for all of them
                    for (module, call), *of_probes in zip(calls, *gradients, strict=True):
                        if of_probes[0] is None:  # the output reached no logit
                            continue
                        for (layer, scheme), indices in columns[module].items():
                            change = changed(engine, module, layer.name, scheme, call)
                            for feature, gradient in zip(features, of_probes, strict=True):
                                feature[:, indices] += _by_row(change * gradient, layer, len(logits))[:, None]
                    yield from features / math.sqrt(n_rows * n_probes)
                advance("")


def _carried_over(halves: NDArray[np.float64], groups: NDArray[np.str_]) -> float:
    """0 to 1: the share of the correlations between groups, on all the data, that holds on other data too.

    The agreement r of the halves is that of one half with other data; twice the data agree 2 r / (1 + r) (Spearman 1910, Brown
    1910).

    Parameters
    ----------
    halves
        `[2, n, n]`, the inner products on each half of the data.
    groups
        `[n]`, their groups.
    """
    sizes = np.sqrt(np.maximum(np.diagonal(halves, axis1=1, axis2=2), 1e-300))
    first, second = (halves / sizes[:, :, None] / sizes[:, None])[:, groups[:, None] != groups]
    common = float(first @ second / max(np.sqrt(first @ first) * np.sqrt(second @ second), 1e-300))
    return float(np.clip(2 * common / (1 + common), 0.0, 1.0)) if common > 0 else 0.0


def _by_row(product: Tensor, layer: LayerSpec, n_rows: int) -> NDArray[np.float64]:
    """`[n_rows]`: the sum of g * dy over the positions of each row of logits, a sample's or a token's.

    Where positions cannot be divided among the rows (the tokens of an expert), they count as independent: each is added to one
    row, with a random sign.
    """
    if layer.kind.startswith("conv"):
        product = product.movedim(1, -1)
    by_position = product.double().reshape(-1, product.shape[-1] if product.ndim else 1).sum(-1).cpu().numpy()
    if len(by_position) % n_rows == 0:
        return by_position.reshape(n_rows, -1).sum(1)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], len(by_position))
    return np.bincount(np.arange(len(by_position)) % n_rows, by_position * signs, n_rows).astype(np.float64)
