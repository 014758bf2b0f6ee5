"""What every command that runs a model begins with: build it, check it with its data, find its layers.

Everything that a user may have got wrong is checked before anything is measured."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpsearch.allocation import SearchSpace
from mpsearch.costs.activation_bytes import ActivationBytes
from mpsearch.costs.size import parse_bytes
from mpsearch.divergence import Divergence, SoftmaxKL
from mpsearch.engine.calibrate import calibrate
from mpsearch.engine.engine import QuantEngine, load_batches
from mpsearch.engine.weight_files import Bank
from mpsearch.errors import InputError, check_memory
from mpsearch.graph.activation_memory import measure_activations
from mpsearch.graph.channel_scaling import FILE, Equalization
from mpsearch.graph.fold import TOLERANCE, fold_batch_norms
from mpsearch.graph.projections import expose_projections
from mpsearch.graph.sharing import check_reached, share
from mpsearch.graph.trace import first_samples, trace_layers
from mpsearch.graph.unsearched import other_bits, unsearched
from mpsearch.layer import weights_sha256
from mpsearch.pipeline.validate import check_classes, check_model, check_output, check_qualities, check_repeatable
from mpsearch.quality import Quality
from mpsearch.quantizers.base import Quantizer
from mpsearch.runs.evaluation_rows import evaluation_columns
from mpsearch.runtimes.base import Runtime
from mpsearch.runtimes.native import Native
from mpsearch.schemes.rotated import Rotated
from mpsearch.tasks.base import SPLITS, Batch, Task
from mpsearch.tasks.overlap import overlap

Settings = Mapping[str, Any]
Build = Callable[..., Any]


IDENTITY = (  # keys of `Prepared.identity`, which the weight bank depends on
    *("space", "quality_name", "quality_kind", "divergence", "model_name", "task_name", "model_sha256", "data_sha256", "data"),
    *("overlap", "quantizers", "not_searched", "folded_batch_norms", "equalizer", "bias_correction"),
)


@dataclass(frozen=True)
class Prepared:
    """The float model ready to be quantized, and what it was before it was folded."""

    model: nn.Module
    task: Task
    divergence: Divergence
    space: SearchSpace
    quantizers: Mapping[str, Quantizer]
    model_sha256: str
    folds: tuple[tuple[str, str], ...]
    calibration: Sequence[Batch]
    equalization: Equalization | None
    not_searched: Mapping[str, Any]
    build_model: Callable[[], nn.Module]  # the float model once more, from the same random numbers

    def identity(self, settings: Settings) -> dict[str, Any]:
        """What a run folder is known by; a run is not resumed under another one."""
        identity = {
            "space": self.space.to_dict(),
            "quality_name": self.task.quality_name,
            "quality_kind": self.task.quality_kind,
            "divergence": {"name": self.divergence.name, "label": self.divergence.describe(), "unit": self.divergence.unit},
            "model_name": _short(settings["model"]),
            "task_name": type(self.task).__name__,
            "model_sha256": self.model_sha256,
            "data_sha256": self.task.fingerprint(),
            "data": {split: self.task.describe(split) for split in SPLITS},
            "overlap": self.overlap,
            "quantizers": {name: _fields(quantizer) for name, quantizer in self.quantizers.items()},
            "not_searched": self.not_searched,
            "folded_batch_norms": [list(pair) for pair in self.folds],
            "equalizer": self.equalization and {**settings["equalizer"], "sha256": self.equalization.sha256},
            "bias_correction": settings["bias_correction"],
        }
        assert identity.keys() == set(IDENTITY), "a new key belongs in IDENTITY"
        return identity

    @functools.cached_property
    def overlap(self) -> dict[str, Any] | None:
        """`overlap` of the task; kept, because it hashes every sample, and the run folder and the weight bank both ask."""
        return overlap(self.task)

    def record(self, folder: Path) -> None:
        """Write how the network was equalized, if it was, to the run's folder, where nothing says it yet."""
        if self.equalization is not None and not (folder / FILE).exists():
            self.equalization.save(folder / FILE)

    def engine(self, settings: Settings, folder: Path) -> QuantEngine:
        """Calibrate, and set up the engine; the run's `folder` keeps what is quantized."""
        rotated = any(isinstance(scheme, Rotated) for scheme in self.space.schemes.values())
        return QuantEngine(
            self.model,
            self.task,
            self.space,
            self.quantizers,
            calibrate(self.model, self.task, self.space.layers, self.calibration, rotated=rotated),
            bias_correction=settings["bias_correction"],
            bank_max_bytes=parse_bytes(settings["bank_max_bytes"]),
            prefix_max_bytes=parse_bytes(settings.get("prefix_max_bytes", "1GB")),
            device=settings["device"],
            bank=Bank(folder / "bank", self.identity(settings)),
        )


def prepare(settings: Settings, build: Build, equalization: Equalization | None = None) -> Prepared:
    """Build task, model, schemes and quantizers; find the layers. Raises `InputError` for what cannot be searched.

    `equalization` is the run's own, where it has been chosen already.
    """
    device = _device(settings["device"])
    torch.manual_seed(settings["seed"])
    # TF32 keeps 10 bits of a product: that is more error than an 8-bit weight makes.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    schemes = build_schemes(settings, build)
    quantizer = build("quantizer")
    quantizers = {name: build(f"quantizer_of.{name}") if name in settings["quantizer_of"] else quantizer for name in schemes}
    task = build("task")
    if not isinstance(task, Task):
        raise InputError(f"The task is a {type(task).__name__}; it must be a subclass of mpsearch.Task.")
    evaluation_columns(task.quality_name)  # a name that is taken is refused before anything is measured
    random_state = torch.get_rng_state()
    model = check_model(build("model")).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    sha256 = weights_sha256(model)
    model.to(device)
    calibration = load_batches(task, "calibration", device)
    inputs, targets = calibration[0]
    try:
        check_repeatable(task, model, inputs)
        with torch.no_grad():
            logits = task.forward(model, inputs)
            check_output(logits)
            task.divergence, why = task.chosen_divergence(model, calibration)
            print(f"loss: {task.divergence.describe()} ({why})")
            targets = logits if task.against_float else targets
            qualities = torch.as_tensor(task.quality(logits, targets))
            task.cross_entropy(logits, targets)
    except InputError:
        raise
    except Exception as error:
        check_memory(error)
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise InputError(f"The model, its input and its targets do not fit together ({what}). Check shapes and types.") from error
    check_qualities(qualities, len(logits), Quality(task.quality_name, task.quality_kind))
    if isinstance(task.divergence, SoftmaxKL):
        for split in SPLITS:
            check_classes(task.loaded(split), split, logits.shape[1])
    _expose_projections(model, task, inputs, logits)
    folds = fold_batch_norms(model, task.forward, *(x for x, _ in calibration)) if settings["fold_batch_norms"] else ()
    if settings.get("equalizer") and equalization is None:
        equalization = build("equalizer").equalize(model, task, calibration, schemes)
    elif equalization is not None:
        equalization.apply(model)
    runtime: Runtime = build("runtime") if settings.get("runtime") else Native()
    layers = share(trace_layers(model, task.forward, inputs), runtime.shared, required=False)
    check_reached(model, layers, runtime.shared, runtime.name)
    layers = share(layers, settings.get("share") or ())
    if ActivationBytes.name in settings.get("cost", {}):
        layers = measure_activations(model, task.forward, first_samples(inputs, 1), layers)
    space = SearchSpace.build(layers, schemes, settings.get("pin") or (), other_bits(model, layers), runtime)
    if dropped := [name for name in schemes if name not in space.schemes]:
        print(f"not searched, as no layer may take it: {', '.join(dropped)}")
    quantizers = {name: quantizers[name] for name in space.schemes}
    again = functools.partial(_built_again, build, random_state)
    rest = sha256, tuple(folds), calibration, equalization, unsearched(model, layers), again
    return Prepared(model, task, task.divergence, space, quantizers, *rest)


def engine_elsewhere(
    settings: Settings, build: Build, model_sha256: str, folder: Path, equalization: Equalization | None
) -> QuantEngine:
    """In a worker: an engine like the search's own; `InputError` where it would be of another model."""
    prepared = prepare(settings, build, equalization)
    if prepared.model_sha256 != model_sha256:
        raise InputError("A worker builds another model than the search does: its weights differ. Give all hosts the same files.")
    return prepared.engine(settings, folder)


def build_schemes(settings: Settings, build: Build) -> dict[str, Any]:
    """The run's schemes by name."""
    return {name: build(f"scheme.{name}") for name in settings["scheme"] or {}}


def _built_again(build: Build, random_state: torch.Tensor) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(random_state)
        model: nn.Module = build("model")
    return model.eval()


def _device(name: str) -> str:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"There is no device '{name}' here ({reason}). Use device=cpu, or device=cuda where a GPU answers."
        ) from None
    return name


@torch.no_grad()
def _expose_projections(model: nn.Module, task: Task, inputs: Any, logits: torch.Tensor) -> None:
    """Rewrite the model, and warn where its outputs change by more than rounding."""
    change = (task.forward(expose_projections(model), inputs) - logits).abs().max().item()
    largest = logits.abs().max().item()
    if change > TOLERANCE * largest:
        warnings.warn(
            f"With attention projections as layers of their own the model's outputs change by {change:.3g} (the largest is "
            f"{largest:.3g}): it depends on what torch's fused paths leave at masked positions. The search runs without them.",
            stacklevel=2,
        )


def _short(node: Mapping[str, Any]) -> str:
    """A model in the words of its config: the last part of its target, and its whole numbers: "resnet depth=20"."""
    words = [f"{key}={value}" for key, value in node.items() if isinstance(value, int) and not isinstance(value, bool)]
    return " ".join([str(node.get("_target_", "?")).rpartition(".")[2], *words])


def _fields(quantizer: Quantizer) -> dict[str, Any]:
    return {"class": type(quantizer).__name__, **(asdict(quantizer) if is_dataclass(quantizer) else {})}
