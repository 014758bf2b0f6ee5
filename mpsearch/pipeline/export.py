"""Write a point of a run to files that a runtime opens: written aside, checked, and only then moved to their place."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mpsearch.allocation import Allocation, SearchSpace
from mpsearch.engine.engine import QuantEngine
from mpsearch.engine.weight_files import WeightFiles
from mpsearch.errors import InputError, run_option
from mpsearch.evaluation import Evaluation
from mpsearch.exporters.base import Exporter, ModelCall, Picked, publish
from mpsearch.graph.shared_copy import shared_copy
from mpsearch.graph.trace import first_samples
from mpsearch.layer import weight_rows, weights_sha256
from mpsearch.packed.model import Weights
from mpsearch.pipeline.check_export import TooLarge, check_loss, check_size, staging
from mpsearch.pipeline.pick import pick
from mpsearch.pipeline.prepare import IDENTITY, Plan, built_model, check_weights, planned_model
from mpsearch.pipeline.refine import kept_engine, refined_files
from mpsearch.pipeline.workspace import Source, Workspace, recorded_plan
from mpsearch.quantizers.round_to_nearest import RoundToNearest
from mpsearch.runs.evaluation_rows import SCORED
from mpsearch.runs.run import Run
from mpsearch.schemes.base import QuantizedTensor
from mpsearch.schemes.floating import Float
from mpsearch.training.finetune import restored

logger = logging.getLogger("mpsearch")

Check = Callable[[Exporter, Path, Evaluation], None]
WeightsOf = Callable[[Allocation], Weights]
SAMPLES = 2  # that a traced model is called on: of one, the batch size would be taken for a constant


@dataclass(frozen=True)
class BankedWeights:
    """The quantized weights of a finished run, where there are no data; `model` is float, folded and equalized."""

    model: nn.Module
    space: SearchSpace
    bank: WeightFiles
    bias_correction: bool

    def quantized(self, layer: str, scheme: str) -> QuantizedTensor:
        """From the files; in a float format, where they keep none, rounded. `InputError` where the bank has none intact."""
        target, weight = self.space.schemes[scheme], weight_rows(self.model.get_submodule(layer))
        if isinstance(target, Float) and not self.bank.keeps_floats:
            return RoundToNearest().quantize(weight.float().cpu(), target)
        banked = self.bank.read(layer, scheme, target, tuple(weight.shape))
        if banked is None:
            raise InputError(self._absent(f"the weight of '{layer}' in {scheme}"))
        target.check(banked.tensors, banked.shape)
        return banked

    def biases(self, layer: str, scheme: str) -> dict[str, Tensor]:
        """Corrected ones, from the bank; `InputError` where a layer with a bias has none there."""
        (modules,) = (la.modules for la in self.space.layers if la.name == layer)
        has_bias = any(getattr(self.model.get_submodule(name), "bias", None) is not None for name in modules)
        if not self.bias_correction or not has_bias:
            return {}
        banked = self.bank.read_biases(layer, scheme)
        if banked is None:
            raise InputError(self._absent(f"the corrected bias of '{layer}' in {scheme}"))
        return banked

    def _absent(self, what: str) -> str:
        return f"{self.bank.folder} has no intact entry for {what}, and the task's data are absent. Restore one of them."


def without_data(source: Source, run: Run, folder: Path) -> tuple[WeightsOf, Plan, Check]:
    """The weights in the run's folder; `InputError` where the model, or how it was equalized, is not what the run recorded."""
    plan = recorded_plan(run, folder, dict.fromkeys(run.space.schemes, RoundToNearest()))
    original = built_model(source.model, source.seed)
    check_weights(weights_sha256(original), plan)

    def check(exporter: Exporter, path: Path, evaluation: Evaluation) -> None:
        exporter.load(path, shared_copy(original))  # which checks the digests

    bank = WeightFiles(folder / "bank", {key: run.identity.get(key) for key in IDENTITY})
    model = planned_model(shared_copy(original), plan)

    def weights_of(allocation: Allocation) -> BankedWeights:
        is_refined = allocation in run.refined("search")
        files = refined_files(bank, run.identity["refiner"], allocation, folder) if is_refined else bank
        return BankedWeights(model, run.space, files, run.identity["bias_correction"])

    return weights_of, plan, check


def export_point(
    run: Run,
    picked: Evaluation,
    exporter: Exporter,
    source: Source | Callable[[], Workspace],
    run_folder: Path,
    folder: Path,
    *,
    finetuned: bool,
    limits: Mapping[str, Any],
) -> tuple[Path, Evaluation]:
    """Write the point to `folder`; the path of its main file, and the point that was written.

    `source` opens the run's workspace; where the data are absent it is the `Source` without a task.

    The files are loaded and scored again before an earlier export in `folder` is replaced. Headers included (JSON descriptions
    aside) they fit `limits["max_bytes"]`, or else the run's budget of bytes; where headers make the files larger than
    `max_bytes`, the next smaller point is taken.
    """
    trained = {split: e for split in SCORED if (e := run.finetuned(split).get(picked.allocation)) is not None}
    if finetuned and "search" not in trained:
        raise InputError(f"This point was not trained. Run: mpsearch finetune {run_option(run_folder)} with the same pick.")
    weights_of, plan, check, call = _opened(source, run, run_folder, trained["search"] if finetuned else None)
    folder = folder / exporter.own_folder
    with staging(folder) as inside:
        while True:
            scores = trained if finetuned else {s: e for s in SCORED if (e := run.on(s).get(picked.allocation)) is not None}
            weights = weights_of(picked.allocation)
            point = Picked(
                scores["search"],
                scores,
                run.baselines,
                run.quality_name,
                plan.model_sha256,
                plan.folds,
                plan.equalization,
                call() if exporter.needs_call else None,
            )
            path = exporter.export(point, weights, inside)
            try:
                check_size(path, picked, limits, run)
                break
            except TooLarge as error:
                picked = _smaller(picked, run, limits, error, finetuned)
        if exporter.holds_weights:
            check(exporter, path, scores["search"])
        return publish(path, folder, owned=bool(exporter.own_folder)), scores["search"]


def _opened(
    source: Source | Callable[[], Workspace], run: Run, folder: Path, trained: Evaluation | None
) -> tuple[WeightsOf, Plan, Check, Callable[[], ModelCall | None]]:
    if isinstance(source, Source):
        if trained is not None:
            raise InputError("A trained point is exported with the task's data only. Restore them.")
        return *without_data(source, run, folder), lambda: None
    workspace = source()

    def weights_of(allocation: Allocation) -> QuantEngine:
        return exported_weights(workspace, run, folder, allocation, trained)

    def check(exporter: Exporter, path: Path, evaluation: Evaluation) -> None:
        check_loss(workspace.prepared, workspace.engine, exporter, path, evaluation)

    def call() -> ModelCall:
        inputs = first_samples(workspace.prepared.calibration[0][0], SAMPLES)
        return ModelCall.record(workspace.engine.model, workspace.prepared.task.forward, inputs)

    return weights_of, workspace.prepared.plan, check, call


def exported_weights(
    workspace: Workspace, run: Run, folder: Path, allocation: Allocation, trained: Evaluation | None = None
) -> QuantEngine:
    """An engine with the weights that an export of the allocation has; `trained` is its evaluation after training."""
    kept = workspace.engine
    if workspace.refiner is not None and allocation in run.refined("search"):
        kept = kept_engine(kept, workspace.refiner, allocation, folder)
    return kept if trained is None else restored(kept, allocation, trained.loss, folder / "finetuned")


def _smaller(picked: Evaluation, run: Run, limits: Mapping[str, Any], error: TooLarge, finetuned: bool) -> Evaluation:
    """The next smaller point, where a size was asked for; `error`, with what to do, where none was or there is none."""
    if finetuned or limits.get("max_bytes") is None:
        raise InputError(
            f"{error} Give that limit as pick.max_bytes: the largest point whose files fit is exported then; or a larger one."
        ) from error
    if picked.size_bytes <= min(e.size_bytes for e in run.front):
        raise InputError(f"{error} It is the smallest of the front. Raise the limit, or search with smaller schemes.") from error
    smaller = pick(run, **{**limits, "max_bytes": picked.size_bytes - 1})
    logger.info("%s The next smaller point, of %s bytes, is taken.", error, f"{smaller.size_bytes:,}")
    return smaller
