"""Quantization-aware training of one allocation: its codes, scales and biases learn to give the float model's predictions.

Every step runs the network on the weights as they would be stored (`student.py`), its inputs quantized as the schemes say, and
lowers the divergence from the float model on the task's training data (knowledge distillation, Hinton et al. 2015,
https://arxiv.org/abs/1503.02531). Training starts at the weights that the search stored, so that epoch 0 is the searched
allocation itself; the epoch with the lowest loss on the search split is kept. Batch norms were folded before the search: their
shifts learn as biases, their factors as scales, and no batch statistics are used.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mpsearch.allocation import Allocation
from mpsearch.engine.engine import QuantEngine
from mpsearch.errors import InputError, check_integer, check_memory
from mpsearch.files import file_errors, write_atomically
from mpsearch.files.strict_json import JsonObject, damaged
from mpsearch.files.tensor_file import read_tensors, tensor_file
from mpsearch.progress import phase
from mpsearch.schemes.base import QuantScheme
from mpsearch.tasks.base import Batch, Task
from mpsearch.training.student import Student, learns
from mpsearch.tree import map_tensors

FORMAT = "mpsearch-finetuning"
STEPS_PER_EPOCH = 50  # of a training that is given in steps


@dataclass(frozen=True)
class Training:
    """The settings of a training by Adam, whose learning rate decays as half a cosine.

    Parameters
    ----------
    epochs, batch_size
        Integers of at least 1.
    learning_rate
        Above 0; in units of each tensor: of a weight matrix's root mean square, of each scale.
    batches
        Batches of an epoch; `None` takes all that the task has.
    loss
        "kl", the task's divergence from the float model's outputs, or "cross_entropy", the task's own loss of its targets.
    seed
        Of the task's training data and of the mixtures of inputs.
    """

    epochs: int = 20
    learning_rate: float = 1e-3
    batch_size: int = 64
    batches: int | None = None
    loss: Literal["kl", "cross_entropy"] = "kl"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss not in ("kl", "cross_entropy"):
            raise InputError(f"loss must be 'kl' or 'cross_entropy'; got '{self.loss}'.")
        for name in ("epochs", "batch_size", "batches"):
            if name != "batches" or self.batches is not None:
                check_integer(name, getattr(self, name))
        if type(self.learning_rate) not in (int, float) or not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate must be a number above 0; got '{self.learning_rate}'.")

    @classmethod
    def from_steps(cls, steps: int, seed: int) -> Training:
        """A short training, scored every `STEPS_PER_EPOCH` steps or sooner; `steps` are rounded up to whole epochs."""
        epochs = math.ceil(steps / STEPS_PER_EPOCH)
        return cls(epochs=epochs, batches=math.ceil(steps / epochs), seed=seed)

    def rate(self, epoch: int, step: int = 0) -> float:
        """The learning rate of epoch 1, 2, … at its step 0, 1, …; constant within an epoch of unknown `batches`."""
        done = (epoch - 1 + step / (self.batches or math.inf)) / self.epochs
        return self.learning_rate * (1 + math.cos(math.pi * done)) / 2

    def batches_of(self, task: Task, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch; if the task has fewer, further passes over its data follow, which no other epoch takes."""
        if self.batches is None:
            return _nonempty(task.training(epoch, self.batch_size, self.seed))
        passes = (task.training(number, self.batch_size, self.seed) for number in itertools.count(epoch, self.epochs))
        return itertools.islice(itertools.chain.from_iterable(map(_nonempty, passes)), self.batches)


@dataclass(frozen=True)
class Finetuned:
    """An engine whose bank holds the best epoch, the search loss after each epoch, and the seconds of training.

    `losses[0]` is the loss before training.
    """

    engine: QuantEngine
    losses: tuple[float, ...]
    seconds: float

    @property
    def epoch(self) -> int:
        """The epoch that was kept."""
        return self.losses.index(min(self.losses))


def checkpoint_name(allocation: Allocation, training: Training) -> str:
    """The file name of a training's checkpoint, which depends on the allocation and all settings."""
    text = allocation.to_json() + json.dumps(asdict(training))
    return hashlib.sha256(text.encode()).hexdigest()[:12] + ".safetensors"


def finetune(engine: QuantEngine, allocation: Allocation, training: Training, folder: Path) -> Finetuned:
    """Train the allocation, or resume from its checkpoint in `folder`, where one is written after each epoch.

    A resumed training ends at the same bits. The engine's model is left as it was. Raises `InputError` for a damaged checkpoint,
    and if the task has no training data.
    """
    student = Student(engine, allocation)
    optimizer = torch.optim.Adam(student.latents.values(), betas=(0.9, 0.999))
    path = folder / checkpoint_name(allocation, training)
    best = {name: latent.detach().clone() for name, latent in student.latents.items()}
    losses: list[float] = []
    seconds = 0.0
    if path.exists():
        losses, seconds, best = _restore(path, student, optimizer)
    else:
        losses = [student.engine().score(allocation).loss]
    with phase("finetune", training.epochs, done=len(losses) - 1) as advance:
        for epoch in range(len(losses), training.epochs + 1):
            start = time.perf_counter()
            train_epoch(student, optimizer, training, epoch)
            loss = student.engine().score(allocation).loss
            if loss < min(losses):
                best = {name: latent.detach().clone() for name, latent in student.latents.items()}
            losses.append(loss)
            seconds += time.perf_counter() - start
            about = {"allocation": allocation.to_json(), **asdict(training), "seconds": seconds}
            _save(path, student, optimizer, best, losses, about)
            advance(f"loss on the search split {loss:.3g}, before {losses[0]:.3g}")
    student.set(best)
    return Finetuned(student.engine(), tuple(losses), seconds)


def restored(engine: QuantEngine, allocation: Allocation, loss: float, folder: Path) -> QuantEngine:
    """The engine of the training in `folder` with this best loss on the search split; `InputError` if there is none."""
    for path in sorted(folder.glob("*.safetensors")):
        about, losses, tensors = _read(path)
        if about.text("allocation") == allocation.to_json() and min(losses) == loss:
            student = Student(engine, allocation)
            student.set({name: tensors[f"best/{name}"] for name in student.latents})
            return student.engine()
    raise InputError(f"No checkpoint in {folder} belongs to that training. Restore it, or run mpsearch finetune again.")


def train_epoch(student: Student, optimizer: torch.optim.Optimizer, training: Training, epoch: int) -> float:
    """Train for one epoch; returns the mean loss over its batches."""
    engine, latents = student.base, list(student.latents.values())
    task, losses = engine.task, []
    for step, (batch, targets) in enumerate(training.batches_of(task, epoch)):
        optimizer.param_groups[0]["lr"] = training.rate(epoch, step)
        inputs = map_tensors(lambda x: x.to(engine.device), batch)
        if training.loss == "kl":
            inputs = _mixed(inputs, np.random.default_rng([training.seed, epoch, step]))
            with torch.no_grad():
                reference = task.forward(engine.model, inputs)
        with engine.own_inputs(), student.installed():
            logits = task.forward(engine.model, inputs)
            if training.loss == "kl":
                loss = engine.divergence.distillation(logits, reference)
            else:
                loss = task.cross_entropy(logits, targets.to(engine.device)).mean()
            gradients = torch.autograd.grad(loss, latents, allow_unused=True)  # not backward: the model's own get none
        for latent, gradient in zip(latents, gradients, strict=True):
            latent.grad = gradient
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


def _mixed(inputs: Any, random: np.random.Generator) -> Any:
    """Half of a batch of images or features, mixed with others of it by random shares; tokens and nested inputs stay.

    A float model has mostly memorized its training data, and its outputs on them say hardly more than the labels; on mixtures
    they say more (Beyer et al. 2022, section 3, https://arxiv.org/abs/2106.05237).
    """
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        return inputs
    share = torch.from_numpy(random.random(len(inputs), dtype=np.float32))
    share[::2] = 1.0
    share = share.to(inputs.device).view(-1, *[1] * (inputs.dim() - 1))
    return share * inputs + (1 - share) * inputs[torch.from_numpy(random.permutation(len(inputs)))]


def check_trainable(task: Task, schemes: Iterable[QuantScheme]) -> None:
    """Raise `InputError` if the task has no training data, or no scheme's weights can learn."""
    _nonempty(task.training(1, 1, 0))
    if not any(learns(scheme) for scheme in schemes):
        raise InputError("None of this run's schemes has codes that can be trained. Give it integers or codebooks.")


def _nonempty(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches; an `InputError` if there is none."""
    first = next(batches, None)
    if first is None:
        raise InputError("The task gives no batch to train on. Let its training() yield some.")
    return itertools.chain([first], batches)


def _save(
    path: Path,
    student: Student,
    optimizer: torch.optim.Optimizer,
    best: dict[str, Tensor],
    losses: list[float],
    about: dict[str, Any],
) -> None:
    tensors = {f"latent/{name}": latent.detach() for name, latent in student.latents.items()}
    tensors |= {f"best/{name}": latent for name, latent in best.items()}
    for name, latent in student.latents.items():
        tensors |= {f"{key}/{name}": value for key, value in optimizer.state[latent].items()}
    tensors["losses"] = torch.tensor(losses, dtype=torch.float64)  # a tensor: JSON has no infinite loss
    with file_errors(path.parent):
        path.parent.mkdir(exist_ok=True)
    write_atomically(path, tensor_file(tensors, FORMAT, about))


def _restore(path: Path, student: Student, optimizer: torch.optim.Optimizer) -> tuple[list[float], float, dict[str, Tensor]]:
    """Losses, seconds and the best latents so far; the student and the optimizer take the state of the checkpoint."""
    about, losses, tensors = _read(path)
    try:
        student.set({name: tensors[f"latent/{name}"] for name in student.latents})
        best = {name: tensors[f"best/{name}"] for name in student.latents}
        for name, latent in student.latents.items():
            state = {key: tensors[f"{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in tensors}
            if state:
                optimizer.state[latent] = {k: v if k == "step" else v.to(latent.device) for k, v in state.items()}
        return losses, about.number("seconds"), best
    except (KeyError, RuntimeError) as error:
        check_memory(error)
        what = f"{type(error).__name__}: {error}"
        raise InputError(f"{path} belongs to another model ({what}). Delete it, and train again.") from None


def _read(path: Path) -> tuple[JsonObject, list[float], dict[str, Tensor]]:
    """A checkpoint's description, the losses so far, and its tensors."""
    remedy = "Delete it, and train again."
    about, tensors = read_tensors(path, FORMAT, remedy)
    losses = tensors["losses"].tolist() if "losses" in tensors else []
    if not losses:
        raise damaged(path, "it has no losses", remedy)
    return about, losses, tensors
