"""Scores of outputs on the splits of a task: the loss against the float model, and the task's own quality with an interval."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mpsearch.batches import chunk_rows
from mpsearch.divergence import Divergence
from mpsearch.errors import InputError
from mpsearch.evaluation import Score
from mpsearch.files.scratch import joined
from mpsearch.intervals import bootstrap_values, cluster_values, paired_interval, random_half
from mpsearch.quality import Quality
from mpsearch.tasks.base import Task
from mpsearch.tree import map_tensors

MEMORY_BYTES = 2**26  # of the float model's outputs on a split; more are in a file


@dataclass
class _Measured:
    """What is kept of outputs: of each row the loss and cross-entropy, the quality, and the power of change and reference.

    `last` are the outputs and targets of the last part, which is all of the split where the quality needs all of it.
    """

    losses: list[Tensor] = field(default_factory=list)
    nats: list[Tensor] = field(default_factory=list)
    qualities: list[Tensor] = field(default_factory=list)
    last: tuple[Tensor, Tensor] | None = None
    noise: float = 0.0
    signal: float = 0.0


class Scorer:
    """Compares outputs with those of the float `model`, on `device`; batches and float outputs are kept for each split.

    Float outputs of more than `MEMORY_BYTES` are kept in a file in the folder `scratch` (`mpsearch.files.scratch`).
    """

    def __init__(self, model: nn.Module, task: Task, device: str = "cpu", scratch: Path | None = None) -> None:
        self.model, self.task, self.device, self.scratch = model, task, device, scratch
        self.quality = Quality(task.quality_name, task.quality_kind)
        self._batches: dict[str, list[tuple[Any, Tensor]]] = {}
        self._float_outputs: dict[str, Tensor] = {}
        self._baselines: dict[str, tuple[NDArray[np.float64], int]] = {}  # of the float model; a bootstrap takes time

    @functools.cached_property
    def divergence(self) -> Divergence:
        """The task's loss, chosen by the calibration split."""
        return self.task.chosen_divergence(self.model, self.batches("calibration"))[0]

    def batches(self, split: str) -> list[tuple[Any, Tensor]]:
        """The split's (inputs, targets) on the device; an `InputError` if it is empty."""
        if split not in self._batches:
            self._batches[split] = load_batches(self.task, split, self.device)
        return self._batches[split]

    def outputs(self, model: nn.Module, split: str) -> Iterator[Tensor]:
        """The outputs of any model on each batch of a split, float32 `[n, columns]`."""
        for inputs, _ in self.batches(split):
            with torch.no_grad():
                outputs = self.task.forward(model, inputs)
            yield outputs
            del outputs  # before the next

    def has_float_outputs(self, split: str) -> bool:
        """Whether `float_outputs` are known without running the model."""
        return split in self._float_outputs

    def float_outputs(self, split: str, compute: Callable[[], Iterable[Tensor]] | None = None) -> Tensor:
        """The float model's outputs on a split, `[n, columns]`; an `InputError` if they are not finite.

        Those of each batch are what `compute()` gives, or else `outputs`. Computed once; at the first call the model must hold
        its float weights.
        """
        if split not in self._float_outputs:
            outputs = self.outputs(self.model, split) if compute is None else compute()
            self._float_outputs[split] = joined(_finite(outputs, split), MEMORY_BYTES, self.scratch)
        return self._float_outputs[split]

    @torch.no_grad()
    def score(self, outputs: Iterable[Tensor] | None, split: str) -> Score:
        """The score of the outputs `[n, columns]` on each batch of a split; `None` scores the float model itself."""
        quality = self.quality
        if split not in self._baselines:
            self._baselines[split] = self._qualities(self._measured(None, split), split)
        baseline, n_samples = self._baselines[split]
        measured = self._measured(outputs, split)
        qualities, low, high = baseline, 0.0, 0.0
        if outputs is not None:
            qualities = self._qualities(measured, split)[0]
            low, high = paired_interval(qualities, baseline)
        losses = self._losses(torch.cat(measured.losses), split, n_samples)
        finite = measured.noise < float("inf") and measured.signal
        return Score(
            loss=_mean(losses),
            cross_entropy=torch.cat(measured.nats).double().mean().item(),
            quality=quality.score(qualities.mean()),
            quality_low=quality.score(baseline.mean() + low),
            quality_high=quality.score(baseline.mean() + high),
            noise=measured.noise / measured.signal if finite else float("inf"),
            n_samples=n_samples,
            qualities=qualities.astype(np.float32),
            proposal_loss=_mean(losses[random_half(len(losses))]) if split == "search" else None,
            losses=losses.astype(np.float32),
        )

    def _measured(self, outputs: Iterable[Tensor] | None, split: str) -> _Measured:
        """Of the outputs on each batch, one batch after another where the task's quality allows it; `None`: the float ones."""
        task, reference = self.task, self.float_outputs(split)
        targets = [target for _, target in self.batches(split)]
        rows = list(map(len, targets))
        if not task.quality_by_sample or sum(rows) != len(reference):
            outputs, targets = [reference if outputs is None else torch.cat(list(outputs))], [torch.cat(targets)]
        elif outputs is None:
            outputs = reference.split(rows)
        measured, start = _Measured(), 0
        for part, own in zip(outputs, targets, strict=True):
            of_float = reference[start : start + len(part)]
            target = of_float if task.against_float else own
            measured.losses.append(self.divergence.rows(part, of_float).cpu())
            measured.nats.append(task.cross_entropy(part, target))
            measured.qualities.append(torch.as_tensor(task.quality(part, target)))
            noise, signal = _powers(part, of_float)
            measured.noise, measured.signal = measured.noise + noise, measured.signal + signal
            if not measured.qualities[-1].dim():
                measured.last = part, target
            start += len(part)
            del part, of_float, target  # before the next, which may be large
        return measured

    def _losses(self, rows: Tensor, split: str, n_samples: int) -> NDArray[np.float64]:
        """The loss of each independent sample `[n]`: the mean of its `rows` of outputs, or each row by itself."""
        losses: NDArray[np.float64] = rows.numpy()
        clusters = self.task.clusters(split)
        n = n_samples if clusters is None else len(clusters)
        if len(losses) % n == 0:
            losses = losses.reshape(n, -1).mean(1)
            if clusters is not None:
                losses = cluster_values(losses, clusters.numpy())
        return losses

    def _qualities(self, measured: _Measured, split: str) -> tuple[NDArray[np.float64], int]:
        """(values whose mean is the quality, one for each independent sample or bootstrap resample; number of samples)."""
        task, parts = self.task, measured.qualities
        quality, clusters = parts[0] if len(parts) == 1 else torch.cat(parts), task.clusters(split)
        if not quality.dim():
            assert measured.last is not None
            outputs, targets = measured.last
            units = np.arange(len(targets)) if clusters is None else clusters.numpy()
            values = bootstrap_values(lambda index: float(task.quality(outputs[index], targets[index])), units)
            return values, len(np.unique(units))
        values = quality.double().cpu().numpy()
        if clusters is not None:
            if clusters.shape != values.shape:
                raise InputError(
                    f"The task's clusters of the {split} split must be one integer for each of its {len(values):,} quality "
                    f"values; got shape {tuple(clusters.shape)}."
                )
            values = cluster_values(values, clusters.numpy())
        return values, len(values)


def _mean(losses: NDArray[np.float64]) -> float:
    """Infinite where it is not a number."""
    loss = float(losses.mean())
    return loss if loss == loss else float("inf")


def load_batches(task: Task, split: str, device: str) -> list[tuple[Any, Tensor]]:
    """A split's batches on `device`; an `InputError` if there is none."""
    batches = [(map_tensors(lambda x: x.to(device), inputs), targets.to(device)) for inputs, targets in task.loaded(split)]
    if not batches:
        raise InputError(f"The task gives no batch for its {split} split. Give it data, or a size above 0.")
    return batches


def _finite(outputs: Iterable[Tensor], split: str) -> Iterator[Tensor]:
    """The float model's outputs; an `InputError` at those that are not finite."""
    for part in outputs:
        if not torch.isfinite(part).all():
            raise InputError(
                f"The float model gives NaN or infinite outputs on the {split} split. Check the model and its input."
            )
        yield part


def _powers(outputs: Tensor, reference: Tensor) -> tuple[float, float]:
    """The power of the change and that of the reference; float64, in chunks."""
    step = chunk_rows(reference)
    noise = signal = 0.0
    for y, y0 in zip(outputs.split(step), reference.split(step), strict=True):
        noise += (y - y0).double().square().sum().item()
        signal += y0.double().square().sum().item()
    return noise, signal
