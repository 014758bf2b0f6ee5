"""The first step of every command that runs a model: check model, task and data, find the layers, restrict their schemes.

All mistakes of the user that can be known are found here, before anything is measured.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpsearch.allocation import SearchSpace
from mpsearch.batches import Batch
from mpsearch.divergence import Divergence, SoftmaxKL
from mpsearch.engine.calibrate import calibrate
from mpsearch.engine.engine import QuantEngine
from mpsearch.engine.scoring import load_batches
from mpsearch.engine.weight_files import WeightFiles
from mpsearch.equalizers.base import Equalizer
from mpsearch.errors import InputError, check_memory
from mpsearch.files.scratch import weights_in_files
from mpsearch.graph.activation_memory import measure_activations
from mpsearch.graph.channel_scaling import FILE, Equalization
from mpsearch.graph.fold import TOLERANCE, apply_folds, fold_batch_norms
from mpsearch.graph.projections import expose_projections
from mpsearch.graph.shared_copy import shared_copy
from mpsearch.graph.sharing import EXPERTS, check_reached, share
from mpsearch.graph.trace import first_samples, trace_layers
from mpsearch.graph.unsearched import other_bits, unsearched
from mpsearch.layer import weights_sha256
from mpsearch.memory import trim
from mpsearch.pipeline.engine_options import EngineOptions
from mpsearch.pipeline.validate import check_classes, check_model, check_output, check_qualities, check_repeatable
from mpsearch.quality import Quality
from mpsearch.quantizers.base import Quantizer
from mpsearch.registry import fields_of, resolve
from mpsearch.runs.evaluation_rows import evaluation_columns
from mpsearch.schemes.base import QuantScheme
from mpsearch.schemes.floating import Float
from mpsearch.schemes.rotated import Rotated
from mpsearch.tasks.base import SPLITS, Task
from mpsearch.tasks.overlap import overlap

logger = logging.getLogger("mpsearch")
Model = nn.Module | Callable[[], nn.Module]
Choice = Any  # a name of a registry, a node of it, or an object

# The keys of `Prepared.identity`, on which the files of the weight bank depend.
IDENTITY = (
    *("space", "quality_name", "quality_kind", "divergence", "model_name", "task_name", "model_sha256", "data_sha256", "data"),
    *("overlap", "quantizers", "not_searched", "folded_batch_norms", "equalizer", "bias_correction"),
)


@dataclass(frozen=True)
class Plan:
    """What was decided about a model before the search: picklable, so that a worker prepares the same model from it."""

    model_sha256: str
    folds: tuple[tuple[str, str], ...]
    equalization: Equalization | None
    equalizer: Mapping[str, Any] | None
    space: SearchSpace
    quantizers: Mapping[str, Quantizer]


@dataclass(frozen=True)
class Prepared:
    """A model that is ready to be quantized: `model` is a copy that shares weights with `original`, which stays as it is."""

    original: nn.Module
    model: nn.Module
    task: Task
    calibration: Sequence[Batch]
    plan: Plan
    options: EngineOptions
    not_searched: Mapping[str, Any]
    name: str

    @property
    def space(self) -> SearchSpace:
        """The search space."""
        return self.plan.space

    @property
    def divergence(self) -> Divergence:
        """The loss."""
        divergence = self.task.divergence
        assert isinstance(divergence, Divergence)  # chosen by `_connect`
        return divergence

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What identifies a run folder; a run is not resumed under another identity. JSON-able, with the keys `IDENTITY`."""
        plan, task, divergence = self.plan, self.task, self.divergence
        identity = {
            "space": plan.space.to_dict(),
            "quality_name": task.quality_name,
            "quality_kind": task.quality_kind,
            "divergence": {"name": divergence.name, "label": divergence.describe(), "unit": divergence.unit},
            "model_name": self.name,
            "task_name": type(task).__name__,
            "model_sha256": plan.model_sha256,
            "data_sha256": task.fingerprint(),
            "data": {split: task.describe(split) for split in SPLITS},
            "overlap": overlap(task),
            "quantizers": {name: fields_of(quantizer) for name, quantizer in plan.quantizers.items()},
            "not_searched": self.not_searched,
            "folded_batch_norms": [list(pair) for pair in plan.folds],
            "equalizer": plan.equalizer,
            "bias_correction": self.options.bias_correction,
        }
        assert identity.keys() == set(IDENTITY), "a new key belongs in IDENTITY"
        return identity

    def record(self, folder: Path) -> None:
        """Write how channels were equalized, if they were, to the run's folder, unless that is recorded already."""
        if self.plan.equalization is not None and not (folder / FILE).exists():
            self.plan.equalization.save(folder / FILE)

    def engine(self, folder: Path) -> QuantEngine:
        """Calibrate, and set up the engine; the run's `folder` keeps the quantized weights."""
        rotated = any(isinstance(scheme, Rotated) for scheme in self.space.schemes.values())
        return QuantEngine(
            self.model,
            self.task,
            self.space,
            self.plan.quantizers,
            calibrate(self.model, self.task, self.space.layers, self.calibration, rotated=rotated),
            bias_correction=self.options.bias_correction,
            **self.options.limits(self.space.numel, len(self.space.schemes)),
            device=self.options.device,
            files=WeightFiles(folder / "bank", self.identity),
        )


def prepare(
    model: Model,
    task: Task,
    *,
    schemes: Mapping[str, Choice] | Sequence[str],
    quantizer: Choice = "kronecker_descent",
    quantizer_of: Mapping[str, Choice] | None = None,
    runtime: Choice = "mpsearch",
    equalizer: Choice | None = None,
    equalization: Equalization | None = None,
    pin: Sequence[str] = (),
    share_patterns: Sequence[str] = (),
    fold: bool = True,
    activations: bool = False,
    options: EngineOptions | None = None,
    seed: int = 0,
    name: str = "",
) -> Prepared:
    """Prepare a float model for a search; see `mpsearch.search` for the arguments.

    `equalization` is that of the run, where it was chosen before; with `activations` the memory of activations is measured.

    Raises
    ------
    InputError
        Model, task, data or options that cannot be searched.
    """
    options = options or EngineOptions()
    named = resolved_schemes(schemes)
    by_scheme = {**dict.fromkeys(named, quantizer), **(quantizer_of or {})}
    if unknown := [scheme for scheme in by_scheme if scheme not in named]:
        raise InputError(f"quantizer_of.{unknown[0]}: this run has no scheme '{unknown[0]}', only {', '.join(named)}.")
    quantizers = {scheme: resolve("quantizer", choice) for scheme, choice in by_scheme.items()}
    target = resolve("runtime", runtime if runtime is not None else "mpsearch")
    original, copy, sha256 = _float_model(model, task, options.device, seed)
    resolve("exporter", target.exporter).check(copy)
    calibration, logits = _connect(copy, task, options.device)
    inputs = calibration[0][0]
    _expose_projections(copy, task, inputs, logits)
    folds = fold_batch_norms(copy, task.forward, *(x for x, _ in calibration)) if fold else ()
    made: Equalizer | None = None if equalizer is None else resolve("equalizer", equalizer)
    if made is not None and equalization is None:
        equalization = made.equalize(copy, task, calibration, named)
    elif equalization is not None:
        equalization.apply(copy)
    layers = share(trace_layers(copy, task.forward, inputs), (*target.shared, EXPERTS), required=False)
    check_reached(copy, layers, target.shared, target.name)
    layers = share(layers, share_patterns)
    if activations:
        layers = measure_activations(copy, task.forward, first_samples(inputs, 1), layers)
    space = SearchSpace.build(layers, named, pin, other_bits(copy, layers), target)
    if dropped := [scheme for scheme in named if scheme not in space.schemes]:
        logger.info("not searched, because no layer may use it: %s", ", ".join(dropped))
        if all(isinstance(scheme, Float) for scheme in space.schemes.values()):
            raise InputError(
                f"{target.name} runs no layer of this model in {', '.join(dropped)}, so that all would stay float; it runs "
                f"{target.what}. Add such a scheme, or give the inputs static scales: scheme.{dropped[0]}.input.scale=static."
            )
    trim()  # what loading the model left
    about = None if made is None or equalization is None else {**fields_of(made), "sha256": equalization.sha256}
    plan = Plan(sha256, tuple(folds), equalization, about, space, {scheme: quantizers[scheme] for scheme in space.schemes})
    return Prepared(original, copy, task, calibration, plan, options, unsearched(copy, layers), name or type(original).__name__)


def prepare_planned(
    model: Model,
    task: Task,
    plan: Plan,
    options: EngineOptions,
    not_searched: Mapping[str, Any],
    *,
    seed: int = 0,
    name: str = "",
) -> Prepared:
    """Prepare the same model once more, in a worker or for a finished run; `InputError` where its weights are others."""
    original, copy, sha256 = _float_model(model, task, options.device, seed)
    check_weights(sha256, plan)
    calibration, _ = _connect(copy, task, options.device)
    planned_model(copy, plan)
    return Prepared(original, copy, task, calibration, plan, options, not_searched, name or type(original).__name__)


def planned_model(model: nn.Module, plan: Plan) -> nn.Module:
    """Fold and equalize the float `model` in place as the plan says; returns it."""
    apply_folds(expose_projections(model), plan.folds)
    return model if plan.equalization is None else plan.equalization.apply(model)


def planned_engine(
    model: Model,
    task: Task,
    plan: Plan,
    options: EngineOptions,
    not_searched: Mapping[str, Any],
    folder: Path,
    *,
    seed: int = 0,
    name: str = "",
) -> QuantEngine:
    """In a worker: an engine like the search's own."""
    return prepare_planned(model, task, plan, options, not_searched, seed=seed, name=name).engine(folder)


def resolved_schemes(schemes: Mapping[str, Choice] | Sequence[str]) -> dict[str, QuantScheme]:
    """Scheme objects by name, of names or of a mapping of names to objects; `InputError` where there is none."""
    if isinstance(schemes, str):
        schemes = [schemes]
    if not schemes:
        raise InputError("schemes must name at least one scheme, as in schemes=['w4', 'w8'] (scheme=[w4,w8]); got none.")
    if not isinstance(schemes, Mapping):
        if unnamed := [scheme for scheme in schemes if not isinstance(scheme, str)]:
            raise InputError(f"schemes must be names, or a mapping of names to schemes; got a {type(unnamed[0]).__name__}.")
        schemes = {scheme: scheme for scheme in schemes}
    return {name: resolve("scheme", scheme, f"scheme.{name}") for name, scheme in schemes.items()}


def built_model(model: Model, seed: int) -> Any:
    """The model itself, or what the function returns, from the seed's random numbers; its large weights are in files then."""
    if isinstance(model, nn.Module) or not callable(model):
        return model
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
        torch.manual_seed(seed)
        built = model()
    if isinstance(built, nn.Module):
        weights_in_files(built)
    return built


def check_weights(sha256: str, plan: Plan) -> None:
    """Raise `InputError` where weights of this SHA-256 are not those of the plan."""
    if sha256 != plan.model_sha256:
        raise InputError(
            f"The model has checksum {sha256[:12]}…; the model of the run had {plan.model_sha256[:12]}…. Give the same weights."
        )


def _float_model(model: Model, task: Task, device: str, seed: int) -> tuple[nn.Module, nn.Module, str]:
    """The model, a copy of it on the device that shares its weights, and their SHA-256."""
    if not isinstance(task, Task):
        raise InputError(f"The task is a {type(task).__name__}; it must be an instance of a subclass of mpsearch.Task.")
    evaluation_columns(task.quality_name)  # a name that is taken is refused before anything is measured
    _check_device(device)
    # TF32 keeps 10 bits of a product: that is more error than an 8-bit weight makes.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    original = check_model(built_model(model, seed))
    return original, shared_copy(original).to(device), weights_sha256(original)


def _connect(model: nn.Module, task: Task, device: str) -> tuple[list[Batch], torch.Tensor]:
    """The calibration batches and the outputs of the first; model, data and targets are checked, and the loss is chosen."""
    calibration = load_batches(task, "calibration", device)
    inputs, targets = calibration[0]
    try:
        check_repeatable(task, model, inputs)
        with torch.no_grad():
            logits = task.forward(model, inputs)
            check_output(logits)
            task.divergence, why = task.chosen_divergence(model, calibration)
            logger.info("loss: %s (%s)", task.divergence.describe(), why)
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
    return calibration, logits


def _check_device(name: str) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"There is no device '{name}' here ({reason}). Use device=cpu, or device=cuda where a GPU answers."
        ) from None


@torch.no_grad()
def _expose_projections(model: nn.Module, task: Task, inputs: Any, logits: torch.Tensor) -> None:
    """Rewrite the model, and warn where its outputs change by more than rounding."""
    change = (task.forward(expose_projections(model), inputs) - logits).abs().max().item()
    largest = logits.abs().max().item()
    if change > TOLERANCE * largest:
        warnings.warn(
            f"With attention projections as layers of their own the model's outputs change by {change:.3g} (the largest is "
            f"{largest:.3g}): they depend on what torch's fused paths leave at masked positions. The search runs without them.",
            stacklevel=2,
        )
