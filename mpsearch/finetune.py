"""Quantization-aware training of one allocation: its codes, scales and biases learn to give the float model's predictions.

Every step runs the network on the weights as they would be stored (`fake_quantize.py`), its inputs quantized as the schemes say,
and lowers the KL divergence from the float model on the task's training data (knowledge distillation, Hinton et al. 2015,
https://arxiv.org/abs/1503.02531). Training starts at what the search stored, so that epoch 0 is that point itself; the epoch with
the lowest loss on the search split is kept.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mpsearch.allocation import Allocation
from mpsearch.engine import QuantEngine, quantize_input, to_device
from mpsearch.errors import InputError
from mpsearch.fake_quantize import codes_of, fake_quantize, groups_of
from mpsearch.layer import LayerSpec, from_rows, weight_rows
from mpsearch.progress import phase
from mpsearch.schemes.base import QuantizedTensor
from mpsearch.schemes.integer import SCALE_DTYPES, Integer

FORMAT = "mpsearch-finetuning"
INSIDE = 0.25  # of a step: no latent weight starts farther from its code, or the first steps would undo the quantizer's choice


@dataclass(frozen=True)
class Training:
    """How to train: `batches` of `batch_size` samples an epoch (`None`: all there are), by Adam, the rate falling as a cosine.

    `learning_rate` is in units of what is trained: of each weight matrix's root mean square, of each scale.
    """

    epochs: int = 20
    learning_rate: float = 1e-3
    batch_size: int = 64
    batches: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "batches"):
            value = getattr(self, name)
            if (type(value) is not int or value < 1) and not (name == "batches" and value is None):
                raise InputError(f"{name} is a whole number, at least 1; '{value}' came.")
        if type(self.learning_rate) not in (int, float) or not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate is a number above 0; '{self.learning_rate}' came.")

    def rate(self, epoch: int) -> float:
        """The learning rate of epoch 1, 2, …: half a cosine."""
        return self.learning_rate * (1 + math.cos(math.pi * (epoch - 1) / self.epochs)) / 2


@dataclass(frozen=True)
class Finetuned:
    """What came of it: an engine whose bank holds the best epoch, the search loss (nats) after each epoch, and seconds trained.

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
    """The file of a training, told apart from those of other allocations and settings."""
    text = allocation.to_json() + json.dumps(asdict(training))
    return hashlib.sha256(text.encode()).hexdigest()[:12] + ".safetensors"


def finetune(engine: QuantEngine, allocation: Allocation, training: Training, folder: Path) -> Finetuned:
    """Train the allocation, or go on from its checkpoint in `folder`, where one is written after each epoch.

    Resumed after a kill it ends at the same bits. The engine's model is left as it was. Raises `InputError` for a checkpoint
    that is damaged, and where the task has nothing to train on.
    """
    student = _Student(engine, allocation)
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
            optimizer.param_groups[0]["lr"] = training.rate(epoch)
            train_epoch(student, optimizer, training, epoch)
            loss = student.engine().score(allocation).loss
            if loss < min(losses):
                best = {name: latent.detach().clone() for name, latent in student.latents.items()}
            losses.append(loss)
            seconds += time.perf_counter() - start
            about = {"allocation": allocation.to_json(), **asdict(training), "losses": losses, "seconds": seconds}
            _save(path, student, optimizer, best, about)
            advance(f"KL on the search split {loss:.3g}, before {losses[0]:.3g}")
    student.set(best)
    return Finetuned(student.engine(), tuple(losses), seconds)


def restored(engine: QuantEngine, allocation: Allocation, loss: float, folder: Path) -> QuantEngine:
    """The engine of a training in `folder` whose best loss on the search split was this; `InputError` where there is none."""
    for path in sorted(folder.glob("*.safetensors")):
        about, tensors = _read(path)
        if about["allocation"] == allocation.to_json() and min(about["losses"]) == loss:
            student = _Student(engine, allocation)
            student.set({name: tensors[f"best/{name}"] for name in student.latents})
            return student.engine()
    raise InputError(f"No checkpoint in {folder} is of that training. Restore it, or run mpsearch finetune again.")


def train_epoch(student: _Student, optimizer: torch.optim.Optimizer, training: Training, epoch: int) -> float:
    """One epoch of steps; the mean KL divergence (nats) over its batches."""
    engine, latents = student.base, list(student.latents.values())
    task, total, n = engine.task, 0.0, 0
    found = task.training(epoch, training.batch_size, training.seed)
    for batch, _ in itertools.islice(found, training.batches):
        inputs = to_device(batch, engine.device)
        with torch.no_grad():
            target = task.forward(engine.model, inputs).log_softmax(-1)
        with student.installed():
            loss = nn.functional.kl_div(
                task.forward(engine.model, inputs).log_softmax(-1), target, reduction="batchmean", log_target=True
            )
            gradients = torch.autograd.grad(loss, latents, allow_unused=True)  # not backward: the model's own get none
        for latent, gradient in zip(latents, gradients, strict=True):
            latent.grad = gradient
        optimizer.step()
        total, n = total + loss.item(), n + 1
    if n == 0:
        raise InputError("The task gives no batch to train on. Let its training() yield some.")
    return total / n


class _Student:
    """The allocation's layers as they learn: each tensor is `start + unit * latent`, the latent 0 at first.

    Layers in other schemes than integers keep their stored weights; their biases learn too.
    """

    def __init__(self, engine: QuantEngine, allocation: Allocation) -> None:
        self.base = engine
        members = {group.name: group.layers for group in engine.space.groups}
        self.layers = [(layer, scheme) for group, scheme in allocation.items() for layer in members[group]]
        self.latents: dict[str, Tensor] = {}
        self._start: dict[str, Tensor] = {}
        self._unit: dict[str, Tensor] = {}
        self._stored = {(layer.name, scheme): engine.quantized(layer.name, scheme) for layer, scheme in self.layers}
        self._grids: dict[str, tuple[Tensor, Tensor]] = {}
        self._biases: dict[int, str] = {}  # a bias may be shared: parameter -> the name under which it learns
        for layer, scheme in self.layers:
            stored = self._stored[layer.name, scheme]
            if isinstance(stored.scheme, Integer):
                self._add_weight(layer, stored, stored.scheme)
            corrected = engine.biases(layer.name, scheme)
            for name, bias in self._module_biases(layer):
                self._biases[id(bias)] = f"{name}.bias"
                start = corrected.get(name, bias.detach().float()).to(engine.device)
                self._add(f"{name}.bias", start, start.square().mean().sqrt())

    def _add(self, name: str, start: Tensor, unit: Tensor) -> None:
        self._start[name], self._unit[name] = start, torch.where(unit == 0, 1.0, unit)
        self.latents[name] = torch.zeros_like(start, requires_grad=True)

    def _add_weight(self, layer: LayerSpec, stored: QuantizedTensor, scheme: Integer) -> None:
        """Latent weights are the float ones, moved no further than their stored code needs."""
        device = self.base.device
        rows, columns, size = scheme.grid(stored.shape)
        codes, _, _, _ = scheme.unpacked(stored.tensors, stored.shape)
        codes = codes.reshape(rows, columns).float().to(device)
        scales = stored.tensors["scales"].float().reshape(rows, -1).to(device)
        found = stored.tensors.get("zero_points")
        middle = 2 ** (scheme.bits - 1) if scheme.bits > 1 else 0.5
        zeros = torch.full_like(scales, middle) if found is None else found.float().reshape(scales.shape).to(device)
        groups = groups_of(columns, size).to(device)
        module: Any = self.base.model.get_submodule(layer.name)
        matrix = weight_rows(module).float().reshape(rows, columns)
        scale, zero = scales[:, groups], zeros[:, groups]
        steps = (matrix / torch.where(scale == 0, 1.0, scale) + zero).clamp(codes - INSIDE, codes + INSIDE)
        self._grids[layer.name] = zeros, groups
        self._add(f"{layer.name}.weight", torch.where(scale == 0, matrix, (steps - zero) * scale), matrix.square().mean().sqrt())
        self._add(f"{layer.name}.scales", scales, scales.abs())

    def _module_biases(self, layer: LayerSpec) -> list[tuple[str, Tensor]]:
        modules: list[tuple[str, Any]] = [(name, self.base.model.get_submodule(name)) for name in layer.modules]
        return [(name, module.bias) for name, module in modules if getattr(module, "bias", None) is not None]

    def value(self, name: str) -> Tensor:
        """What is trained under this name, with its gradient."""
        return self._start[name] + self._unit[name] * self.latents[name]

    def _parts(self, layer: str, scheme: Integer) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        """What `fake_quantize` takes; the scales as they are stored, the gradient straight through that rounding."""
        exact = self.value(f"{layer}.scales")
        rounded = exact.detach().to(SCALE_DTYPES[scheme.scale_dtype]).float() + (exact - exact.detach())
        return self.value(f"{layer}.weight"), rounded, *self._grids[layer], scheme.bits

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The model runs on these weights and biases, and its inputs are quantized, while the block runs."""
        undo, handles = [], []
        try:
            for layer, name in self.layers:
                stored = self._stored[layer.name, name]
                modules: list[Any] = [self.base.model.get_submodule(module) for module in layer.modules]
                if isinstance(stored.scheme, Integer):
                    rows = fake_quantize(*self._parts(layer.name, stored.scheme)).reshape(stored.shape)
                else:
                    rows = stored.dequantize().to(self.base.device)
                weight = from_rows(modules[0], rows)
                for module in modules:
                    undo.append((module, dict(module._parameters)))
                    handles.append(quantize_input(module, stored, straight_through=True))
                    bias = module._parameters.pop("bias", None)
                    del module._parameters["weight"]
                    module.weight = weight
                    module.bias = None if bias is None else self.value(self._biases[id(bias)])
            yield
        finally:
            for module, parameters in reversed(undo):
                for name in ("weight", "bias"):
                    module.__dict__.pop(name, None)
                module._parameters.clear()
                module._parameters.update(parameters)
            for handle in handles:
                if handle is not None:
                    handle.remove()

    @torch.no_grad()
    def engine(self) -> QuantEngine:
        """An engine whose bank holds what has been learned, as the schemes store it."""
        weights, biases = {}, {}
        for layer, name in self.layers:
            stored = self._stored[layer.name, name]
            if isinstance(stored.scheme, Integer):
                parts = self._parts(layer.name, stored.scheme)
                codes, scales = codes_of(*parts).to(torch.uint8).cpu(), parts[1].to(SCALE_DTYPES[stored.scheme.scale_dtype]).cpu()
                zero_points, static = stored.tensors.get("zero_points"), stored.of_input
                if zero_points is not None:
                    zero_points = zero_points.reshape(scales.shape)
                stored = stored.scheme.stored(codes, scales, zero_points, static, stored.shape)
            weights[layer.name, name] = stored
            biases[layer.name, name] = {
                module: self.value(self._biases[id(bias)]).cpu() for module, bias in self._module_biases(layer)
            }
        return self.base.holding(weights, biases)

    @torch.no_grad()
    def set(self, latents: dict[str, Tensor]) -> None:
        """Back to these latents."""
        for name, latent in self.latents.items():
            latent.copy_(latents[name])


def _save(
    path: Path, student: _Student, optimizer: torch.optim.Optimizer, best: dict[str, Tensor], about: dict[str, Any]
) -> None:
    """One file, the old one or the new, never half."""
    tensors = {f"latent/{name}": latent.detach() for name, latent in student.latents.items()}
    tensors |= {f"best/{name}": latent for name, latent in best.items()}
    for name, latent in student.latents.items():
        tensors |= {f"{key}/{name}": value for key, value in optimizer.state[latent].items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary, {FORMAT: json.dumps(about)})
    with open(temporary, "rb") as stream:
        os.fsync(stream.fileno())
    temporary.replace(path)


def _restore(path: Path, student: _Student, optimizer: torch.optim.Optimizer) -> tuple[list[float], float, dict[str, Tensor]]:
    """Losses, seconds and the best latents so far; the student and the optimizer go on from where they were."""
    about, tensors = _read(path)
    try:
        student.set({name: tensors[f"latent/{name}"] for name in student.latents})
        best = {name: tensors[f"best/{name}"] for name in student.latents}
        for name, latent in student.latents.items():
            found = {key: tensors[f"{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in tensors}
            if found:
                optimizer.state[latent] = {k: v if k == "step" else v.to(latent.device) for k, v in found.items()}
        return list(about["losses"]), float(about["seconds"]), best
    except (KeyError, RuntimeError) as error:
        raise InputError(f"{path} is of another model ({type(error).__name__}: {error}). Delete it, and train again.") from None


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a checkpoint says of itself, and its tensors."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[FORMAT])
            return about, {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} is damaged ({type(error).__name__}: {error}). Delete it, and train again.") from None
