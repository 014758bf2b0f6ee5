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

Where a sample has one row of few logits, dz itself is found, a backward pass for each column, and a group's own sensitivity is
the divergence of z + dz: confident predictions leave the range of the quadratic form long before the network is no longer linear.

Which positions belong to which sample is measured (`samples.py`); a batch whose samples reach one another's logits is one sample.

The inner products of two groups are means over few samples of values of either sign, and an allocation that exploits chance gains
on these samples alone. They are shrunk by how far they carry over from one half of the samples to the other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh
from torch import Tensor, nn

from mpsearch.batches import CHUNK
from mpsearch.divergence import Divergence
from mpsearch.engine.engine import QuantEngine
from mpsearch.files.scratch import joined
from mpsearch.layer import LayerSpec, runs_as_usual
from mpsearch.metrics.base import Pair, SensitivityMetric, layers_by_group, quantize_groups
from mpsearch.metrics.fisher import Call, Recording, changed, float_output, record_calls
from mpsearch.metrics.samples import Layout, find_layouts, probe_signs
from mpsearch.progress import phase
from mpsearch.runs.deadline import Deadline
from mpsearch.tree import tensors_in

FEWEST_FEATURES = 500  # that count, of all batches; a value's standard error is then 6 %
MOST_PROBES, MOST_FOR_A_SAMPLE = 64, 16  # of a batch; more for a sample say less than more samples would
MOST_COLUMNS = 16  # of logits whose first-order changes are found column by column, for the exact divergence
MOST_PAIRS = 4096  # whose inner products are kept; beyond, the sensitivities alone are
MOST_DIMENSIONS = 128  # of the features; the rest of a group's sensitivity counts as its own
ROUNDING = 1e-6  # of inner products in float32, relative
N_SPLITS = 4  # of the samples into two halves
GRADIENT_BYTES = 2**28  # of gradients at once
TIME_SHARE = 0.25  # of the time that a run with a deadline has left after quantizing
PASSES_OF_RECORDING = 0.25  # backward passes in the time of a forward pass, with what is done with their gradients
WEIGHT_BYTES = 2**25  # of gradients of a weight in memory; larger ones are in a file
FEWEST_POSITIONS = 64  # of a sample, for which the gradients of a weight are no more work than the changes of outputs

Columns = dict[str, dict[tuple[LayerSpec, str], list[int]]]  # module -> (its layer, scheme) -> indices of pairs


class GaussNewton(SensitivityMetric):
    """The divergence of the outputs' first-order change, or its quadratic form, in the unit of the divergence."""

    name = "gauss_newton"
    unit = "nats"

    def measure(self, engine: QuantEngine, pairs: Sequence[Pair]) -> Iterator[float]:
        """All pairs at once, then yielded one by one."""
        total = np.zeros(len(pairs))
        for _, losses, _ in self._features(engine, pairs):
            total += losses
        yield from np.where(np.isfinite(total), total, np.inf).tolist()

    def measure_joint(
        self, engine: QuantEngine, pairs: Sequence[Pair], deadline: Deadline | None = None
    ) -> tuple[NDArray[np.float64], NDArray[np.float32]] | None:
        """The values, and features in at most `MOST_DIMENSIONS`, as far as they carry over; `None` for too many pairs."""
        n = len(pairs)
        if n > MOST_PAIRS:
            return None
        values, products, halves = np.zeros(n), np.zeros((n, n)), np.zeros((N_SPLITS, n, n), dtype=np.float32)
        for batch, losses, features in self._features(engine, pairs, deadline):
            values += losses
            products += _products(features)
            in_half = np.random.default_rng(batch).random((N_SPLITS, features.shape[1])) < 0.5
            for half, chosen in zip(halves, in_half, strict=True):
                half += _products(features[:, chosen])
        finite, groups = np.isfinite(values) & np.isfinite(products.diagonal()), np.array([group for group, _ in pairs])
        values = np.where(finite, values, np.inf)
        products[~finite], products[:, ~finite] = 0.0, 0.0
        kept = np.ix_(finite, finite)
        carried = _carried_over([(half[kept], products[kept] - half[kept]) for half in halves], groups[finite])
        scales = np.sqrt(2 * np.where(finite, values, 0.0) / np.maximum(products.diagonal(), 1e-300))
        sizes, directions = eigh(products * np.outer(scales, scales), subset_by_index=(max(0, n - MOST_DIMENSIONS), n - 1))
        return values, (np.sqrt(np.maximum(carried * sizes, 0.0)) * directions).T.astype(np.float32)

    def _features(
        self, engine: QuantEngine, pairs: Sequence[Pair], deadline: Deadline | None = None
    ) -> Iterator[tuple[int, NDArray[np.float64], NDArray[np.float64]]]:
        """(batch, its part of the losses `[n_pairs]`, features `[probes, samples, n_pairs]`), some probes of a batch at once."""
        columns: Columns = {}
        layers = layers_by_group(engine)
        for column, (group, scheme) in enumerate(pairs):
            for layer in layers[group]:
                for module in layer.readers:
                    columns.setdefault(module, {}).setdefault((layer, scheme), []).append(column)
        quantize_groups(engine, pairs, deadline)
        batches, n_rows = engine.batches("search"), len(engine.float_logits("search"))
        as_one: set[tuple[int, ...]] = set()
        passes = _Passes(len(batches), deadline)
        with phase("backward passes", len(batches)) as advance:
            for i, (inputs, _) in enumerate(batches):
                with record_calls(engine, list(columns), inputs) as recording:
                    along = _Along(engine, columns, recording, len(pairs))
                    counts = (next(len(tensor) for tensor in tensors_in(inputs) if tensor.dim()), len(recording.logits))
                    for losses, features in _of_batch(i, along, counts, as_one, passes, len(batches)):
                        yield i, losses / n_rows, features / math.sqrt(n_rows)
                del recording, along
                advance("")
        passes.say_left_out()
        engine.release()


def _of_batch(
    i: int, along: _Along, counts: Sequence[int], as_one: set[tuple[int, ...]], passes: _Passes, n_batches: int
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """(losses `[n_pairs]`, features `[probes, samples, n_pairs]`), summed over the rows of the batch, some probes at once."""
    logits, divergence = along.recording.logits, along.engine.divergence
    layouts, counting = find_layouts(along.recording, divergence, probe_signs(logits, i, 0), counts, as_one)
    along.layouts = layouts
    if layouts[0].n == len(logits) and logits.shape[1] <= MOST_COLUMNS:
        changes = np.concatenate(list(along.each([column.sum for column in logits.unbind(1)])))
        yield _losses(divergence, logits, changes), _weighted(divergence, logits, changes)
        return
    most = min(MOST_PROBES, MOST_FOR_A_SAMPLE * max(1, counts[0] // layouts[0].n))
    n_probes = passes.affordable(min(most, _n_probes(counting, logits.numel() // layouts[0].n, n_batches)))
    for features in along.each([partial(_probe, divergence, logits, i, k) for k in range(n_probes)]):
        features /= math.sqrt(n_probes)
        yield 0.5 * np.square(features).sum((0, 1)), features


class _Passes:
    """How many backward passes of each batch end before a share of the time that is left when this is made."""

    def __init__(self, n_batches: int, deadline: Deadline | None) -> None:
        self.deadline = (deadline or Deadline()).part(TIME_SHARE)
        self.n_batches, self.n_wanted, self.n_run = n_batches, 0, 0
        self._start = time.perf_counter()

    def affordable(self, n_wanted: int) -> int:
        """Of the passes wanted for the next batch, one at least: as many as each batch that is left can have."""
        seconds = (time.perf_counter() - self._start) / max(self.n_run, PASSES_OF_RECORDING)
        n = max(1, min(n_wanted, self.deadline.affordable(n_wanted * self.n_batches, seconds) // self.n_batches))
        self.n_batches -= 1
        self.n_wanted += n_wanted
        self.n_run += n
        return n

    def say_left_out(self) -> None:
        """Record how many were."""
        if self.n_run < self.n_wanted:
            self.deadline.leave_out(f"{self.n_wanted - self.n_run} of {self.n_wanted} backward passes for the sensitivities")


class _Along:
    """g . dy of each sample and pair, from the gradients g of one recorded batch."""

    def __init__(self, engine: QuantEngine, columns: Columns, recording: Recording, n_pairs: int) -> None:
        self.engine, self.columns, self.recording, self.n_pairs = engine, columns, recording, n_pairs
        self.layouts: Sequence[Layout] = ()
        self.modules: dict[str, Any] = dict(engine.model.named_modules())
        output_bytes = 4 * sum(call.shape.numel() for _, call in recording.calls)
        self.at_once = max(1, GRADIENT_BYTES // max(output_bytes, 1))

    def each(self, losses: Sequence[Callable[[], Tensor]]) -> Iterator[NDArray[np.float64]]:
        """Of some losses at once, `[losses, samples, n_pairs]`; a change is computed once for all of them."""
        for start in range(0, len(losses), self.at_once):
            some = losses[start : start + self.at_once]
            products = np.zeros((len(some), self.layouts[0].n, self.n_pairs))
            kept: dict[int, list[Tensor]] = {}

            def take(i: int, gradient: Tensor, n: int = len(some), kept: Any = kept, products: Any = products) -> None:
                kept.setdefault(i, []).append(self.layouts[i].by_sample(gradient))
                if len(kept[i]) == n:  # of a large network one gradient, which is let go of
                    gradients = kept.pop(i)
                    self._add(i, torch.stack(gradients, 1) if n > 1 else gradients[0][:, None], products)

            for loss in some:
                self.recording.backward(loss(), take)
            yield products

    def _add(self, i: int, along: Tensor, products: NDArray[np.float64]) -> None:
        """Add what the gradients `[samples, losses, positions]` at a call's output say of the pairs."""
        (module, call), layout = self.recording.calls[i], self.layouts[i]
        weight_gradients = self._weight_gradients(module, call, layout, along)
        before: Tensor | None = None
        for (layer, scheme), indices in self.columns[module].items():
            if weight_gradients is not None and self.engine.space.schemes[scheme].input_format is None:
                values = self._along_weights(module, layer.name, scheme, along, weight_gradients)
                products[..., indices] += values.T.double().cpu().numpy()[..., None]
                continue
            if before is None:
                before = float_output(self.engine, module, call)
            change = layout.by_sample(changed(self.engine, module, layer.name, scheme, call, before))
            product = torch.bmm(along, change[:, :, None])[..., 0].T
            products[..., indices] += product.double().cpu().numpy()[..., None]

    @torch.no_grad()
    def _weight_gradients(self, name: str, call: Call, layout: Layout, along: Tensor) -> Tensor | None:
        """`[rows, samples, losses, columns]` of a linear layer, if they take less time than the changes of its output.

        g . dy, summed over a sample's positions, is the inner product of the sample's gradient at the weight and the weight's
        change: one product of the size of the layer's own for each sample and loss, and not one for each scheme.
        """
        module = self.modules.get(name)
        if type(module) is not nn.Linear or not runs_as_usual(module) or layout.axis == len(call.shape) - 1:
            return None
        samples, losses, positions = along.shape
        is_long = positions // module.out_features >= FEWEST_POSITIONS and losses < len(self.columns[name])
        if not is_long or 4 * samples * losses * module.weight.numel() > GRADIENT_BYTES:
            return None
        x: Tensor = call.args[0] if call.args else call.kwargs["input"]
        if x.shape[:-1] != call.shape[:-1]:
            return None
        inputs = layout.by_sample(x).unflatten(1, (1, -1, module.in_features))
        parts = along.unflatten(2, (-1, module.out_features)).split(max(1, CHUNK // module.in_features), 3)
        gradients = ((part.transpose(2, 3) @ inputs).permute(2, 0, 1, 3) for part in parts)
        return joined(gradients, WEIGHT_BYTES, self.engine.scorer.scratch)

    @torch.no_grad()
    def _along_weights(self, name: str, layer: str, scheme: str, along: Tensor, gradients: Tensor) -> Tensor:
        """`[samples, losses]`, of gradients `[rows, samples, losses, columns]` of the weight."""
        module = self.modules[name]
        values = dict(self.engine.swaps(layer, scheme, keep=self.engine.bank.holds_all))
        total = gradients.new_zeros(gradients.shape[1:3])
        n_rows = max(1, CHUNK // module.in_features)
        parts = (tensor.split(n_rows) for tensor in (gradients, values[module.weight], module.weight))
        for part, after, before in zip(*parts, strict=True):
            rows = torch.bmm(part.flatten(1, 2), (after - before)[:, :, None])  # einsum copies its operand
            total += rows.sum(0).view_as(total)
        if module.bias is not None and module.bias in values:
            total += along.unflatten(2, (-1, module.out_features)).sum(2) @ (values[module.bias] - module.bias)
        return total


def _probe(divergence: Divergence, logits: Tensor, seed: int, index: int) -> Tensor:
    return divergence.probe(logits, probe_signs(logits, seed, index))


def _losses(divergence: Divergence, logits: Tensor, changes: NDArray[np.float64]) -> NDArray[np.float64]:
    """The divergence of `logits` `[n, columns]` changed by `[columns, n, n_pairs]`, summed over the rows, `[n_pairs]`."""
    reference = logits.detach()
    moved = (reference + torch.from_numpy(change).to(reference).T for change in changes.transpose(2, 0, 1))
    return np.array([divergence.rows(outputs, reference).sum().item() for outputs in moved])


def _weighted(divergence: Divergence, logits: Tensor, changes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Features `[directions, n, n_pairs]` of changes of logits: all orthogonal probes of each row, so that nothing is random."""
    n_probes = 2 ** (logits.shape[1] - 1).bit_length()
    signs = (probe_signs(logits, 0, k) for k in range(n_probes))
    rows = torch.stack([torch.autograd.grad(divergence.probe(logits, v), logits, retain_graph=True)[0] for v in signs])
    return np.einsum("knc,cnp->knp", rows.double().cpu().numpy() / math.sqrt(n_probes), changes, optimize=True)


def _n_probes(counting: float, n_logits: int, n_batches: int) -> int:
    """For a batch of which so many samples count, so that all batches together have `FEWEST_FEATURES`.

    Probes of a sample's `n_logits` vary like independent ones times the share of the directions that they leave out.
    """
    independent = FEWEST_FEATURES / n_batches / counting
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
        squares = [half.diagonal().astype(np.float64) for half in halves]
        least = ROUNDING * sum(squares)  # what a half has less of is the rounding of the other one, or of a pair without a change
        sizes = [np.sqrt(np.where(square > least, square, np.inf)) for square in squares]
        first, second = ((half / np.outer(size, size))[between] for half, size in zip(halves, sizes, strict=True))
        agreements.append(float(first @ second / max(np.sqrt(first @ first) * np.sqrt(second @ second), 1e-300)))
    common = float(np.mean(agreements))
    return float(np.clip(2 * common / (1 + common), 0.0, 1.0)) if common > 0 else 0.0
