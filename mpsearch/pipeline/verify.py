"""Open what was exported in its runtime, and measure it on the confirm split: loss, quality, bytes, milliseconds, tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.evaluation import Evaluation
from mpsearch.exporters.base import Exporter
from mpsearch.graph.shared_copy import shared_copy
from mpsearch.graph.trace import first_samples
from mpsearch.packed.hardware import model_latency
from mpsearch.packed.model import Weights, packed
from mpsearch.pipeline.check_export import tensor_bytes
from mpsearch.pipeline.workspace import Workspace
from mpsearch.runs.verified import Verified
from mpsearch.tasks.base import Task
from mpsearch.tasks.language import Language

LATENCY_SECONDS = 2.0
N_TOKENS = 32  # generated greedily


def verify_file(
    path: Path,
    exporter: Exporter,
    point: Evaluation,
    workspace: Workspace,
    weights: Weights,
    *,
    trained: bool = False,
    batch_size: int = 1,
    seconds: float = LATENCY_SECONDS,
) -> Verified:
    """Measure the file at `path`, to which `exporter` wrote the point.

    Parameters
    ----------
    weights
        What was written, to run it packed.
    trained
        Whether these were trained.
    batch_size
        Samples of a timed forward pass.
    seconds
        About how long to time.
    """
    engine, prepared = workspace.engine, workspace.prepared
    task, original = engine.task, prepared.original
    engine.float_logits("confirm")
    opened = exporter.open(path, shared_copy(original).to(engine.device))
    with torch.no_grad(), packed(weights, point.allocation) as own:
        score, packed_score = engine.score_of(opened, "confirm"), engine.score_of(own, "confirm")
        inputs = first_samples(engine.batches("confirm")[0][0], batch_size)
        models = {"runtime": opened, "float": shared_copy(original).to(engine.device), "packed": own}
        timings = model_latency(models, task.forward, inputs, seconds)
        tokens = [greedy_tokens(model, task, inputs) for model in (opened, own)] if isinstance(task, Language) else [[], []]
    timing = timings["runtime"]
    return Verified(
        exporter=type(exporter).__module__.rpartition(".")[2],
        runtime=exporter.runtime or "mpsearch",
        point=point.allocation.id,
        trained=trained,
        file_bytes=tensor_bytes(exporter.files(path)),
        loss=score.loss,
        packed_loss=packed_score.loss,
        quality=score.quality,
        quality_low=score.quality_low,
        quality_high=score.quality_high,
        n_samples=score.n_samples,
        ms=timing.median,
        ms_low=timing.low,
        ms_high=timing.high,
        float_ms=timings["float"].median,
        packed_ms=timings["packed"].median,
        measured_on=timing.where,
        n_tokens=len(tokens[0]),
        same_tokens=next((i for i, (a, b) in enumerate(zip(*tokens, strict=True)) if a != b), len(tokens[0])),
    )


def greedy_tokens(model: nn.Module, task: Task, inputs: Any, n: int = N_TOKENS) -> list[int]:
    """The `n` most likely tokens after the beginning of the first window, of inputs int64 `[windows, window]`.

    A window that is not filled yet ends in zeros, which a causal model does not see; so every runtime gets the shape that it was
    exported with. A window of at most `n` tokens gives half as many.
    """
    window: Tensor = inputs[:1].clone()
    length = window.shape[1]
    n = min(n, length // 2)
    window[:, length - n :] = 0
    for i in range(length - n, length):
        window[0, i] = task.forward(model, window)[i - 1].argmax()
    return window[0, length - n :].tolist()
