"""Scores of outputs on the splits of a task: the loss against the float model, and the task's own quality with an interval."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mpsearch.divergence import CHUNK, Divergence
from mpsearch.errors import InputError
from mpsearch.evaluation import Score
from mpsearch.intervals import bootstrap_values, cluster_values, paired_interval, random_half
from mpsearch.quality import Quality
from mpsearch.tasks.base import Task
from mpsearch.tree import map_tensors


class Scorer:
    """Compares outputs with those of the float `model`, on `device`; batches and float outputs are kept for each split."""

    def __init__(self, model: nn.Module, task: Task, device: str = "cpu") -> None:
        self.model, self.task, self.device = model, task, device
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

    @torch.no_grad()
    def outputs(self, model: nn.Module, split: str) -> Tensor:
        """The outputs of any model on a split, float32 `[n, columns]`."""
        return torch.cat([self.task.forward(model, inputs) for inputs, _ in self.batches(split)])

    def has_float_outputs(self, split: str) -> bool:
        """Whether `float_outputs` are known without running the model."""
        return split in self._float_outputs

    def float_outputs(self, split: str, compute: Callable[[], Tensor] | None = None) -> Tensor:
        """The float model's outputs on a split, by `compute()` or `outputs`; an `InputError` if they are not finite.

        Computed once; at the first call the model must hold its float weights.
        """
        if split not in self._float_outputs:
            outputs = self.outputs(self.model, split) if compute is None else compute()
            if not torch.isfinite(outputs).all():
                raise InputError(
                    f"The float model gives NaN or infinite outputs on the {split} split. Check the model and its input."
                )
            self._float_outputs[split] = outputs
        return self._float_outputs[split]

    @torch.no_grad()
    def score(self, outputs: Tensor | None, split: str) -> Score:
        """The score of outputs `[n, columns]` on a split; `None` scores the float model itself."""
        task, quality, reference = self.task, self.quality, self.float_outputs(split)
        targets = reference if task.against_float else torch.cat([target for _, target in self.batches(split)])
        if split not in self._baselines:
            self._baselines[split] = self._qualities(reference, targets, split)
        baseline, n_samples = self._baselines[split]
        if outputs is None:
            outputs, qualities, low, high = reference, baseline, 0.0, 0.0
        else:
            qualities = self._qualities(outputs, targets, split)[0]
            low, high = paired_interval(qualities, baseline)
        losses = self._losses(outputs, reference, split, n_samples)
        return Score(
            loss=_mean(losses),
            cross_entropy=task.cross_entropy(outputs, targets).double().mean().item(),
            quality=quality.score(qualities.mean()),
            quality_low=quality.score(baseline.mean() + low),
            quality_high=quality.score(baseline.mean() + high),
            noise=_noise(outputs, reference),
            n_samples=n_samples,
            qualities=qualities.astype(np.float32),
            proposal_loss=_mean(losses[random_half(len(losses))]) if split == "search" else None,
            losses=losses.astype(np.float32),
        )

    def _losses(self, outputs: Tensor, reference: Tensor, split: str, n_samples: int) -> NDArray[np.float64]:
        """The loss of each independent sample `[n]`: the mean of its rows of outputs, or each row by itself."""
        losses: NDArray[np.float64] = self.divergence.rows(outputs, reference).cpu().numpy()
        clusters = self.task.clusters(split)
        n = n_samples if clusters is None else len(clusters)
        if len(losses) % n == 0:
            losses = losses.reshape(n, -1).mean(1)
            if clusters is not None:
                losses = cluster_values(losses, clusters.numpy())
        return losses

    def _qualities(self, outputs: Tensor, targets: Tensor, split: str) -> tuple[NDArray[np.float64], int]:
        """(values whose mean is the quality, one for each independent sample or bootstrap resample; number of samples)."""
        task = self.task
        quality, clusters = torch.as_tensor(task.quality(outputs, targets)), task.clusters(split)
        if not quality.dim():
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


def _noise(outputs: Tensor, reference: Tensor) -> float:
    """The power of the change over the power of the reference, infinite if it is not a number; float64, in chunks."""
    step = max(1, CHUNK // reference.shape[1])
    noise = signal = 0.0
    for y, y0 in zip(outputs.split(step), reference.split(step), strict=True):
        noise += (y - y0).double().square().sum().item()
        signal += y0.double().square().sum().item()
    return noise / signal if noise < float("inf") and signal else float("inf")
