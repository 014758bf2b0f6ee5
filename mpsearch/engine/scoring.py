"""From a model's outputs to its score: the loss against the float model, and the task's own measures with their interval."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpsearch.divergence import CHUNK, Divergence
from mpsearch.errors import InputError
from mpsearch.evaluation import Score
from mpsearch.intervals import cluster_values, paired_interval
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
    baseline = _qualities(task, reference, targets, split)
    qualities = baseline if itself else _qualities(task, outputs, targets, split)
    low, high = (0.0, 0.0) if itself else paired_interval(qualities, baseline)
    return Score(
        loss=divergence.mean(outputs, reference),
        cross_entropy=task.cross_entropy(outputs, targets).double().mean().item(),
        quality=quality.score(qualities.mean()),
        quality_low=quality.score(baseline.mean() + low),
        quality_high=quality.score(baseline.mean() + high),
        noise=_noise(outputs, reference),
        n_samples=len(qualities),
        qualities=qualities.astype(np.float32),
    )


def _qualities(task: Task, outputs: Tensor, targets: Tensor, split: str) -> NDArray[np.float64]:
    """The quality of each independent sample, `[n_samples]`."""
    values = task.quality(outputs, targets).double().cpu().numpy()
    clusters = task.clusters(split)
    if clusters is None:
        return values
    if clusters.shape != values.shape:
        raise InputError(
            f"The task's clusters of the {split} split must be one integer for each of its {len(values):,} quality values; "
            f"got shape {tuple(clusters.shape)}."
        )
    return cluster_values(values, clusters.numpy())


def _noise(outputs: Tensor, reference: Tensor) -> float:
    """The power of the change over the power of the reference, infinite where it is not a number; float64, in chunks."""
    step = max(1, CHUNK // reference.shape[1])
    noise = signal = 0.0
    for y, y0 in zip(outputs.split(step), reference.split(step), strict=True):
        noise += (y - y0).double().square().sum().item()
        signal += y0.double().square().sum().item()
    return noise / signal if noise < float("inf") and signal else float("inf")
