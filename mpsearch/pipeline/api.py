"""The public functions that start a run: of a model in memory, or of a function that builds one; the command line calls them."""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpsearch.allocation import SearchSpace
from mpsearch.budget import check_limits
from mpsearch.costs.latency import Latency, read_latency
from mpsearch.errors import InputError, check_flag, check_integer
from mpsearch.evaluation import SensitivityTable
from mpsearch.graph.channel_scaling import recorded
from mpsearch.graph.unsearched import sentence
from mpsearch.metrics.base import SensitivityMetric
from mpsearch.pipeline.engine_options import EngineOptions
from mpsearch.pipeline.goal import goal_of, latency_table, objective_names, resolved_costs
from mpsearch.pipeline.pick import pick
from mpsearch.pipeline.prepare import Choice, Model, Prepared, prepare, resolved_schemes
from mpsearch.pipeline.result import Result, verified
from mpsearch.pipeline.search_run import SearchRun
from mpsearch.pipeline.sensitivity import measured_sensitivity
from mpsearch.progress import recorded as recorded_phases
from mpsearch.quality import Quality
from mpsearch.registry import resolve
from mpsearch.runs.deadline import Deadline
from mpsearch.runs.run import RunFolder
from mpsearch.runtimes.base import Runtime
from mpsearch.tasks.base import Task
from mpsearch.training.finetune import Training, check_trainable

logger = logging.getLogger("mpsearch")


def search(
    model: Model,
    task: Task,
    *,
    schemes: Mapping[str, Choice] | Sequence[str],
    budget: Mapping[str, Any] | None = None,
    runtime: Choice = "mpsearch",
    quantizer: Choice = "kronecker_descent",
    quantizer_of: Mapping[str, Choice] | None = None,
    equalizer: Choice | None = None,
    metric: Choice = "gauss_newton",
    sampler: Choice = "front",
    executor: Choice = "in_process",
    costs: Mapping[str, Choice] | Sequence[Choice] = ("bytes", "bits", "fraction"),
    objective: str | Sequence[str] = "bytes",
    pin: Sequence[str] = (),
    share: Sequence[str] = (),
    max_drop: float | None = None,
    n_trials: int = 100,
    n_seeds: int = 20,
    max_seconds: float | None = None,
    in_flight: int = 4,
    confirm_points: int | None = 12,
    verify: bool = False,
    finetune_steps: int | None = None,
    refiner: Choice | None = "error_propagation",
    fold_batch_norms: bool = True,
    bias_correction: bool = True,
    memory_max_bytes: str | float | None = None,
    prefix_max_bytes: str | float | None = None,
    mirror: str | None = None,
    seed: int = 0,
    device: str = "cpu",
    folder: Path | str | RunFolder | None = None,
    name: str = "",
) -> Result:
    """Find how many bits each layer of a model should get.

    The sensitivity of each layer is measured, and allocations are proposed within the budget and evaluated on the search split.
    The Pareto front consists of the uniform allocations, the solutions of the additive problem, and the proposals that fresh
    samples show to be better than those (`mpsearch.pipeline.accept`). Points of it and the uniform allocations are scored once
    more on the confirm split, packed. An interrupted run is resumed by the same call with the same `folder`.

    Parameters
    ----------
    model : nn.Module, or a function that returns one
        A trained float32 model. It is left unchanged, and its weights are not copied as a whole.
    task : Task
        Data in three splits and what is measured of the outputs: `mpsearch.classification`, `mpsearch.fidelity_task`, or an
        instance of a subclass of `mpsearch.Task`.
    schemes : sequence of names, or mapping of names to schemes
        The number formats to choose from: "w4", "w4g64", "w4a8", …
    budget : mapping, optional
        Cost -> limit: {"bytes": "120kB"}, {"bits": 3} (average bits of searched weights), {"fraction": 0.12} (of float32), …
        Without a budget the whole front is searched.
    runtime : str or Runtime
        Where the model will run: restricts schemes, and ties layers that the runtime fuses.
    quantizer : str or Quantizer
        Finds codes and scales; `quantizer_of` names another one for single schemes.
    equalizer : str or Equalizer, optional
        Scales channels first, without changing the float model's outputs: "cross_layer", "awq", "smooth_quant".
    metric : str or SensitivityMetric
        Estimates sensitivities: "gauss_newton" (a few backward passes), "kl" (an evaluation for each layer and scheme), …
    sampler : str or a sampler
        Proposes allocations: "front", "ilp", or one of Optuna's ("tpe", "nsga2", …).
    executor : str or Executor
        Where evaluations run: "in_process", "local", "dask", "ray".
    costs : sequence of names or costs, or mapping
        What an allocation costs; costs that `budget` or `objective` name are added.
    objective : str or two
        The cost, or two, that the front trades against the loss.
    pin, share : sequence of str
        "pattern:schemes" restricts layers, as in "conv1:w8" or "layer3.*:>=4"; "*.q|*.k|*.v" makes layers share a scheme.
    max_drop : float, optional
        The largest drop in quality that counts as none; by default the task's, else that of its kind of quality.
    n_trials, n_seeds : int
        Allocations to evaluate; how many of them are exact solutions of the additive problem along the front.
    max_seconds : float, optional
        The run ends after about this many seconds: trials, confirmed points and refinement are left out for which there is no
        time. Sensitivities, the uniform allocations and the expected pick are measured however long they take.
    in_flight : int
        Trials that are proposed before the first of them is told; at least two for each worker.
    confirm_points : int, optional
        Points of the front to confirm, evenly spread, in addition to the expected pick with its neighbours and the uniform
        allocations. `None`: the whole front.
    verify : bool
        Export the picked point at the end, open it in the runtime, and measure it there: see `mpsearch.verify`.
    finetune_steps : int, optional
        Train each of these points for so many steps, and confirm the trained ones too.
    refiner : str or Refiner, optional
        Quantizes the layers of the points to confirm once more, jointly: each towards the float model's outputs, in the presence
        of the errors of those before it. The refined weights are kept where the loss on the search split becomes lower.
    fold_batch_norms, bias_correction : bool
        Fold batch norms into the layers before them; correct biases for the mean error of the outputs.
    memory_max_bytes, prefix_max_bytes : str or float, optional
        Memory for what is kept in addition to the model: quantized weights, and layer outputs from which evaluations start; by
        default 800 MB, or the size of the weights in float32 and 256 MB. While layers are quantized, Hessians are in files of at
        most four times that. The part for layer outputs; by default what dense weights leave.
    mirror : str, optional
        URL of an Optuna storage to which finished trials are written, for optuna-dashboard.
    seed : int
        The same seed on the same machine gives the same trials.
    device : str
        "cpu" or "cuda".
    folder : path, optional
        Where the run is kept; a temporary folder by default, which is deleted with the result.
    name : str
        What the report calls the model; its class by default.

    Returns
    -------
    Result

    Raises
    ------
    InputError
        A model, task, option or folder that cannot be searched; the message says what to change.

    Notes
    -----
    Set `OPENBLAS_NUM_THREADS=1` in the environment before NumPy is imported, as the command does: the matrices of the surrogate
    are small, and on a busy machine OpenBLAS's threads wait for one another many times as long as they compute.
    """
    deadline = Deadline(max_seconds)
    options = EngineOptions(bias_correction, memory_max_bytes, prefix_max_bytes, device)
    check_integer("in_flight", in_flight)
    if confirm_points is not None:
        check_integer("confirm_points", confirm_points, hint=" For the whole front, give None (confirm.n_points=null).")
    objectives = objective_names(objective)
    check_flag("verify", verify)
    target: Runtime = resolve("runtime", runtime)
    if verify:
        resolve("exporter", target.exporter).check_installed()
    cost_objects = resolved_costs(costs, budget, objectives)
    check_limits(budget or {}, cost_objects, resolved_schemes(schemes))
    kept, run = _opened(folder)
    with run.locked(), recorded_phases(run.path):
        prepared = prepare(
            model,
            task,
            schemes=schemes,
            quantizer=quantizer,
            quantizer_of=quantizer_of,
            runtime=target,
            equalizer=equalizer,
            equalization=recorded(run.path),
            pin=pin,
            share_patterns=share,
            fold=fold_batch_norms,
            activations="activation_bytes" in cost_objects,
            options=options,
            seed=seed,
            name=name,
        )
        logger.info(sentence(prepared.not_searched))
        goal = goal_of(prepared, cost_objects, budget, objectives, run.path)
        search_run = SearchRun(
            model=model,
            prepared=prepared,
            goal=goal,
            metric=resolve("metric", metric),
            sampler=resolve("sampler", sampler),
            executor=resolve("executor", executor),
            run=run,
            seed=seed,
            in_flight=in_flight,
            max_drop=_max_drop(max_drop, task),
            training=_training(finetune_steps, prepared, seed),
            mirror=mirror,
            confirm_points=confirm_points,
            refiner=None if refiner is None else resolve("refiner", refiner),
            exporter=target.exporter,
        )
        result = replace(search_run.search(n_trials, n_seeds, deadline), keep=kept)
        if verify:
            verified(result, pick(result.run), is_held=True)
        return result


def sensitivity(
    model: Model,
    task: Task,
    *,
    schemes: Mapping[str, Choice] | Sequence[str],
    metric: Choice = "gauss_newton",
    quantizer: Choice = "kronecker_descent",
    quantizer_of: Mapping[str, Choice] | None = None,
    equalizer: Choice | None = None,
    fold_batch_norms: bool = True,
    bias_correction: bool = True,
    memory_max_bytes: str | float | None = None,
    prefix_max_bytes: str | float | None = None,
    seed: int = 0,
    device: str = "cpu",
    folder: Path | str | RunFolder | None = None,
    name: str = "",
) -> SensitivityTable:
    """Measure the sensitivity of each layer to each scheme, and nothing else; see `search` for the arguments."""
    _kept, run = _opened(folder)
    options = EngineOptions(bias_correction, memory_max_bytes, prefix_max_bytes, device)
    estimator: SensitivityMetric = resolve("metric", metric)
    with run.locked():
        prepared = prepare(
            model,
            task,
            schemes=schemes,
            quantizer=quantizer,
            quantizer_of=quantizer_of,
            equalizer=equalizer,
            equalization=recorded(run.path),
            fold=fold_batch_norms,
            options=options,
            seed=seed,
            name=name,
        )
        logger.info(sentence(prepared.not_searched))
        prepared.record(run.path)
        about = {"name": estimator.name, "unit": estimator.unit_for(prepared.divergence), "exact": estimator.exact}
        run.identify({**prepared.identity, "metric": about})
        return measured_sensitivity(prepared.engine(run.path), estimator, run, {})


def hardware(
    model: Model,
    task: Task,
    *,
    schemes: Mapping[str, Choice] | Sequence[str],
    batch_size: int = 1,
    seconds: float = 10.0,
    quantizer: Choice = "round_to_nearest",
    quantizer_of: Mapping[str, Choice] | None = None,
    pin: Sequence[str] = (),
    fold_batch_norms: bool = True,
    seed: int = 0,
    device: str = "cpu",
    folder: Path | str | RunFolder | None = None,
    name: str = "",
) -> tuple[SearchSpace, list[Latency]]:
    """Measure how long this machine takes for each layer in each scheme; see `search` for the other arguments.

    Parameters
    ----------
    batch_size : int
        Samples of a forward pass.
    seconds : float
        Time to spend on measuring.

    Returns
    -------
    The searched layers, and the rows of `latency.csv`, which `costs=["latency_ms"]` reads.
    """
    _kept, run = _opened(folder)
    with run.locked():
        prepared = prepare(
            model,
            task,
            schemes=schemes,
            quantizer=quantizer,
            quantizer_of=quantizer_of,
            pin=pin,
            fold=fold_batch_norms,
            options=EngineOptions(device=device),
            seed=seed,
            name=name,
        )
        return prepared.space, read_latency(latency_table(prepared, batch_size, run.path, seconds))


class _TemporaryFolder:
    """A new folder, deleted with this object."""

    def __init__(self) -> None:
        self.path = tempfile.mkdtemp(prefix="mpsearch-")
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def _opened(folder: Path | str | RunFolder | None) -> tuple[_TemporaryFolder | None, RunFolder]:
    """The run's folder, and the temporary folder that takes its place where none is given."""
    if isinstance(folder, RunFolder):
        return None, folder
    if folder is not None:
        return None, RunFolder(folder)
    temporary = _TemporaryFolder()
    return temporary, RunFolder(temporary.path)


def _max_drop(asked: float | None, task: Task) -> float:
    """The drop that counts as none: as it was asked for, else the task's own, else that of the kind of quality."""
    if asked is None:
        return Quality(task.quality_name, task.quality_kind).max_drop if task.max_drop is None else task.max_drop
    if isinstance(asked, bool) or not isinstance(asked, int | float) or not 0 <= asked < math.inf:
        raise InputError(f"max_drop must be a number of 0 or more, 0.01 for a point of accuracy; got '{asked}'.")
    return float(asked)


def _training(steps: int | None, prepared: Prepared, seed: int) -> Training | None:
    """How the confirmed points are trained; `None`: not at all."""
    if steps is None:
        return None
    check_integer("finetune_steps", steps)
    check_trainable(prepared.task, prepared.space.schemes.values())
    return Training.from_steps(steps, seed)
