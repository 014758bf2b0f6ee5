"""Codes, scales and biases of all layers learn together for a few steps, after they were refined one after another.

Layer by layer each comes near to the float model's output, whatever that is worth to the layers behind it. Here Adam lowers the
divergence of the network's outputs from the float model's on the calibration data, without labels, as a training does
(`mpsearch.training`): what block-wise reconstruction does for a block (BRECQ: Li et al. 2021, https://arxiv.org/abs/2102.05426;
AutoRound: Cheng et al. 2023, https://arxiv.org/abs/2309.05516), for the network as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpsearch.allocation import Allocation
from mpsearch.engine.engine import QuantEngine
from mpsearch.engine.weight_files import WeightFiles
from mpsearch.errors import InputError, check_integer
from mpsearch.progress import phase
from mpsearch.refiners.base import Refined, Refinement, read_refined, write_refined
from mpsearch.refiners.error_propagation import ErrorPropagation, Propagation
from mpsearch.tasks.base import batch_length
from mpsearch.training.student import Student
from mpsearch.tree import map_tensors

RATIO = 5.0  # of the learning rates of two trainings


@dataclass(frozen=True)
class Distillation(ErrorPropagation):
    """Error propagation, then trainings from there; of all, the one with the lowest loss on the search split is taken.

    Parameters
    ----------
    damping, step, residuals, n_positions
        Of the error propagation.
    n_steps, batch_size
        Steps of Adam, and samples of each.
    learning_rate
        At the first step, in units of each tensor: of a weight matrix's root mean square, of each scale. It decays as half a
        cosine.
    n_trainings
        Each has a fifth of the learning rate of the one before: the best rate differs tenfold among networks.
    seed
        Of the order of the samples.
    """

    n_steps: int = 20
    batch_size: int = 32
    learning_rate: float = 1e-2
    n_trainings: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n_steps", "batch_size", "n_trainings"):
            check_integer(name, getattr(self, name))
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate must be a number above 0; got {self.learning_rate}.")

    def start(self, engine: QuantEngine) -> Refinement:
        """Finds the order of the layers."""
        return Distilled(self, engine)


class Distilled:
    """Refines allocations of one engine; see `refiners.base.Refinement`."""

    def __init__(self, settings: Distillation, engine: QuantEngine) -> None:
        self.settings, self.engine, self.layers = settings, engine, Propagation(settings, engine)

    def __call__(self, allocation: Allocation, files: WeightFiles | None = None) -> QuantEngine:
        """See `refiners.base.Refinement`; the training is not resumed in its middle."""
        schemes = dict(self.engine.space.layer_schemes(allocation))
        read = {la: read_refined(self.engine, la, scheme, files) for la, scheme in schemes.items()}
        if None in read.values():
            first = None if files is None else files.derived(files.folder / "layers", {"part": "layers"})
            start = self.layers(allocation, first)
            rates = [self.settings.learning_rate / RATIO**i for i in range(self.settings.n_trainings)]
            candidates = [start, *(self._trained(start, allocation, rate) for rate in rates)]
            best = min(candidates, key=lambda engine: engine.score(allocation).loss)
            read = {la: (best.quantized(la.name, s), best.biases(la.name, s)) for la, s in schemes.items()}
            for layer, refined in read.items():
                write_refined(layer, schemes[layer], refined, files)  # type: ignore[arg-type]
        known: dict[Any, Refined] = {(la.name, schemes[la]): refined for la, refined in read.items()}  # type: ignore[misc]
        return self.engine.with_weights({k: weight for k, (weight, _) in known.items()}, {k: b for k, (_, b) in known.items()})

    def _trained(self, engine: QuantEngine, allocation: Allocation, learning_rate: float) -> QuantEngine:
        """An engine with what has been learned."""
        settings, task = self.settings, engine.task
        student = Student(engine, allocation)
        latents = list(student.latents.values())
        optimizer = torch.optim.Adam(latents)
        with phase("refine jointly", settings.n_steps) as advance:
            for step, inputs in enumerate(self._batches()):
                share = (1 + math.cos(math.pi * step / settings.n_steps)) / 2
                optimizer.param_groups[0]["lr"] = learning_rate * share
                with torch.no_grad():
                    wanted = task.forward(engine.model, inputs)
                with engine.own_inputs(), student.installed():
                    loss = engine.divergence.distillation(task.forward(engine.model, inputs), wanted)
                    gradients = torch.autograd.grad(loss, latents, allow_unused=True)
                for latent, gradient in zip(latents, gradients, strict=True):
                    latent.grad = gradient
                optimizer.step()
                advance(f"loss {loss.item():.3g}")
        return student.engine()

    def _batches(self) -> Iterator[Any]:
        """`n_steps` batches of calibration samples, in passes over all of them in another order each."""
        parts = []
        for inputs, _ in self.engine.batches("calibration"):
            n = batch_length(inputs)
            parts += [(inputs, n, begin) for begin in range(0, n, self.settings.batch_size)]
        random = np.random.default_rng(self.settings.seed)
        order = np.concatenate([random.permutation(len(parts)) for _ in range(-(-self.settings.n_steps // len(parts)))])
        for inputs, n, begin in (parts[i] for i in order[: self.settings.n_steps]):
            yield map_tensors(partial(_part, n=n, part=slice(begin, begin + self.settings.batch_size)), inputs)


def _part(x: Tensor, n: int, part: slice) -> Tensor:
    """Part of a tensor that has the batch's `n` samples; any other one stays whole."""
    return x[part] if x.dim() and len(x) == n else x
