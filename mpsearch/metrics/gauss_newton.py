"""Gauss-Newton estimate of the loss with interactions between groups, from a few backward passes for all groups and schemes.

A layer's quantization changes its output by dy, and the logits by dz = J dy to first order. The KL divergence from the float
model's predictions p is then dz^T F dz / 2, F = diag(p) - p p^T (the Gauss-Newton form; Martens 2020, "New Insights and
Perspectives on the Natural Gradient Method", section 8), and F = B B^T with B = diag(sqrt p) - p sqrt(p)^T; other divergences
have other B (`Divergence.probe`). For random signs v the gradient g of the probe (B v)^T z at the layer's output has
E[(g . dy)^2] = dz^T F dz (Martens, Sutskever and Swersky 2012, "Estimating the Hessian by Back-propagating Curvature"), where
g . dy sums over all positions that reach these logits: a token changes the logits of later ones. The signs of different rows of
logits are independent, so that one sum may hold many rows. With a feature e = g . dy for each sample of the data and probe,

    L(x) = E (sum_g e_g(x_g))^2 / 2 = |sum_g e_g(x_g)|^2 / 2:

a group's own sensitivity is |e_g|^2 / 2, and the inner products are the interactions: which groups reinforce or cancel one
another (CLADO, Deng et al. 2023, https://arxiv.org/abs/2307.05657, measures these pair by pair). Diagonal Fisher information
(`fisher.py`) drops the products within a layer too. Runs on the search split, where proposals are measured; no label is used.

Which positions belong to which sample is measured (`samples.py`); a batch whose samples reach one another's logits is one sample.

The inner products of two groups are means over few samples of values of either sign, and an allocation that exploits chance gains
on these samples alone. They are shrunk by how far they carry over from one half of the samples to the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh

from mpsearch.engine.engine import QuantEngine
from mpsearch.layer import LayerSpec
from mpsearch.metrics.base import Pair, SensitivityMetric, layers_by_group, quantize_groups
from mpsearch.metrics.fisher import changed, gradients_at, record_calls
from mpsearch.metrics.samples import Gradients, Layout, probe_gradients, probe_signs
from mpsearch.progress import phase
from mpsearch.tree import tensors_in

FEWEST_FEATURES = 500  # that count, of all batches; a value's standard error is then 6 %
MOST_PROBES, MOST_FOR_A_SAMPLE = 64, 16  # of a batch; more for a sample say less than more samples would
MOST_PAIRS = 4096  # whose inner products are kept; beyond, the sensitivities alone are
MOST_DIMENSIONS = 128  # of the features; the rest of a group's sensitivity counts as its own
N_SPLITS = 4  # of the samples into two halves
GRADIENT_BYTES = 2**30  # of gradients at once


class GaussNewton(SensitivityMetric):
    """Half the squared first-order change of the outputs, in the metric and unit of the divergence."""

    name = "gauss_newton"
    unit = "nats"

    def measure(self, engine: QuantEngine, pairs: Sequence[Pair]) -> Iterator[float]:
        """All pairs at once, then yielded one by one."""
        total = np.zeros(len(pairs))
        for _, features in self._features(engine, pairs):
            total += 0.5 * np.square(features).sum((0, 1))
        yield from np.where(np.isfinite(total), total, np.inf).tolist()

    def measure_joint(self, engine: QuantEngine, pairs: Sequence[Pair]) -> tuple[NDArray[np.float64], NDArray[np.float32]] | None:
        """The values, and features in at most `MOST_DIMENSIONS`, as far as they carry over; `None` for too many pairs."""
        n = len(pairs)
        if n > MOST_PAIRS:
            return None
        products, halves = np.zeros((n, n)), np.zeros((N_SPLITS, n, n), dtype=np.float32)
        for batch, features in self._features(engine, pairs):
            products += _products(features)
            in_half = np.random.default_rng(batch).random((N_SPLITS, features.shape[1])) < 0.5
            for half, chosen in zip(halves, in_half, strict=True):
                half += _products(features[:, chosen])
        values = np.where(np.isfinite(products.diagonal()), 0.5 * products.diagonal(), np.inf)
        finite, groups = np.isfinite(values), np.array([group for group, _ in pairs])
        products[~finite], products[:, ~finite] = 0.0, 0.0
        kept = np.ix_(finite, finite)
        carried = _carried_over([(half[kept], products[kept] - half[kept]) for half in halves], groups[finite])
        sizes, directions = eigh(products, subset_by_index=(max(0, n - MOST_DIMENSIONS), n - 1))
        return values, (np.sqrt(np.maximum(carried * sizes, 0.0)) * directions).T.astype(np.float32)

    def _features(self, engine: QuantEngine, pairs: Sequence[Pair]) -> Iterator[tuple[int, NDArray[np.float64]]]:
        """(batch, `[probes, samples, n_pairs]`), some probes at once; the sum of all squares is twice the loss."""
        columns: dict[str, dict[tuple[LayerSpec, str], list[int]]] = {}  # module -> (its layer, scheme) -> columns
        layers = layers_by_group(engine)
        for column, (group, scheme) in enumerate(pairs):
            for layer in layers[group]:
                for module in layer.readers:
                    columns.setdefault(module, {}).setdefault((layer, scheme), []).append(column)
        quantize_groups(engine, pairs)
        batches, n_rows = engine.batches("search"), len(engine.float_logits("search"))
        with phase("joint effects", len(batches)) as advance:
            for i, (inputs, _) in enumerate(batches):
                logits, calls = record_calls(engine, list(columns), inputs)
                counts = (next(len(tensor) for tensor in tensors_in(inputs) if tensor.dim()), len(logits))
                first, layouts = probe_gradients(calls, logits, engine.divergence, probe_signs(logits, i, 0), counts)
                most = min(MOST_PROBES, MOST_FOR_A_SAMPLE * max(1, counts[0] // layouts[0].n))
                n_probes = min(most, _n_probes(first, layouts, logits.numel() // layouts[0].n, len(batches)))
                call_bytes = sum(call.output.numel() * call.output.element_size() for _, call in calls)
                at_once = max(1, GRADIENT_BYTES // max(call_bytes, 1))
                for start in range(0, n_probes, at_once):
                    gradients = [
                        gradients_at(calls, engine.divergence.probe(logits, probe_signs(logits, i, probe))) if probe else first
                        for probe in range(start, min(start + at_once, n_probes))
                    ]
                    features = np.zeros((len(gradients), layouts[0].n, len(pairs)))
                    for (module, call), layout, *of_probes in zip(calls, layouts, *gradients, strict=True):
                        if of_probes[0] is None:  # the output reached no logit
                            continue
                        along = torch.stack([layout.by_sample(g) for g in of_probes], 1)  # [samples, probes, positions]
                        for (layer, scheme), indices in columns[module].items():  # a change is computed once for all these probes
                            change = layout.by_sample(changed(engine, module, layer.name, scheme, call))
                            product = torch.bmm(along, change[:, :, None])[..., 0].T
                            features[..., indices] += product.double().cpu().numpy()[..., None]
                    yield i, features / math.sqrt(n_rows * n_probes)
                advance("")


def _n_probes(gradients: Gradients, layouts: Sequence[Layout], n_logits: int, n_batches: int) -> int:
    """For a batch, so that all batches together have `FEWEST_FEATURES` that count.

    A mean of squares of expected sizes w varies like that of (sum w)^2 / sum w^2 squares of one size. Here w are the samples'
    squared gradients: the loss of samples that are predicted with confidence hardly changes. Probes of a sample's `n_logits` vary
    like independent ones times the share of the directions that they leave out.
    """
    sizes = [layout.by_sample(g).double().square().sum(1) for g, layout in zip(gradients, layouts, strict=True) if g is not None]
    counting = [float(size.sum().square() / size.square().sum()) for size in sizes if size.any()]
    independent = FEWEST_FEATURES / n_batches / float(np.median(counting or [1.0]))
    directions = 2 ** (n_logits - 1).bit_length()  # of which as many probes leave out none (`probe_signs`)
    return math.ceil(independent * directions / (independent + directions - 1))


def _products(features: NDArray[np.float64]) -> NDArray[np.float64]:
    """Inner products `[n_pairs, n_pairs]` of features `[probes, samples, n_pairs]`."""
    rows = features.reshape(-1, features.shape[-1])
    return rows.T @ rows


def _carried_over(splits: Sequence[tuple[NDArray[Any], NDArray[Any]]], groups: NDArray[np.str_]) -> float:
    """0 to 1: the share of the correlations between groups, on all the data, that holds on other data too.

    The agreement r of the halves is that of one half with other data; twice the data agree 2 r / (1 + r) (Spearman 1910, Brown
    1910).

    Parameters
    ----------
    splits
        Of each split of the data into halves, the inner products `[n, n]` on one and on the other; their agreements are averaged.
    groups
        `[n]`, their groups.
    """
    between = groups[:, None] != groups
    agreements = []
    for halves in splits:
        sizes = [np.sqrt(np.maximum(half.diagonal(), 1e-300)) for half in halves]
        first, second = ((half / np.outer(size, size))[between] for half, size in zip(halves, sizes, strict=True))
        agreements.append(float(first @ second / max(np.sqrt(first @ first) * np.sqrt(second @ second), 1e-300)))
    common = float(np.mean(agreements))
    return float(np.clip(2 * common / (1 + common), 0.0, 1.0)) if common > 0 else 0.0
