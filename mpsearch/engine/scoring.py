"""From a model's outputs to its score: the loss against the float model, and the task's own measures with their interval."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpsearch.divergence import CHUNK, Divergence
from mpsearch.errors import InputError
from mpsearch.evaluation import Score
from mpsearch.intervals import bootstrap_values, cluster_values, paired_interval
from mpsearch.quality import Quality
from mpsearch.tasks.base import Task


@torch.no_grad()
def score_outputs(
    task: Task, divergence: Divergence, outputs: Tensor | None, reference: Tensor, targets: Tensor, split: str
) -> Score:
    """The score of `outputs` `[n, columns]` against the float model's, `reference`; `None`: of the float model itself."""
    itself = outputs is None
    outputs = reference if outputs is None else outputs
    quality = Quality(task.quality_name, task.quality_kind)
    targets = reference if task.against_float else targets
    baseline, n_samples = _qualities(task, reference, targets, split)
    qualities = baseline if itself else _qualities(task, outputs, targets, split)[0]
    low, high = (0.0, 0.0) if itself else paired_interval(qualities, baseline)
    return Score(
        loss=divergence.mean(outputs, reference),
        cross_entropy=task.cross_entropy(outputs, targets).double().mean().item(),
        quality=quality.score(qualities.mean()),
        quality_low=quality.score(baseline.mean() + low),
        quality_high=quality.score(baseline.mean() + high),
        noise=_noise(outputs, reference),
        n_samples=n_samples,
        qualities=qualities.astype(np.float32),
    )


def _qualities(task: Task, outputs: Tensor, targets: Tensor, split: str) -> tuple[NDArray[np.float64], int]:
    """(values whose mean is the quality, one for each independent sample or bootstrap resample; number of samples)."""
    quality, clusters = torch.as_tensor(task.quality(outputs, targets)), task.clusters(split)
    if not quality.dim():
        units = np.arange(len(targets)) if clusters is None else clusters.numpy()
        values = bootstrap_values(lambda index: float(task.quality(outputs[index], targets[index])), units)
        return values, len(np.unique(units))
    values = quality.double().cpu().numpy()
    if clusters is None:
        return values, len(values)
    if clusters.shape != values.shape:
        raise InputError(
            f"The task's clusters of the {split} split must be one integer for each of its {len(values):,} quality values; "
            f"got shape {tuple(clusters.shape)}."
        )
    values = cluster_values(values, clusters.numpy())
    return values, len(values)


def _noise(outputs: Tensor, reference: Tensor) -> float:
    """The power of the change over the power of the reference, infinite where it is not a number; float64, in chunks."""
    step = max(1, CHUNK // reference.shape[1])
    noise = signal = 0.0
    for y, y0 in zip(outputs.split(step), reference.split(step), strict=True):
        noise += (y - y0).double().square().sum().item()
        signal += y0.double().square().sum().item()
    return noise / signal if noise < float("inf") and signal else float("inf")
