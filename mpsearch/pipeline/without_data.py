"""An export where the task's data are absent: the weights as the run's bank has them, verified by their digests alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from mpsearch.allocation import SearchSpace
from mpsearch.engine.weight_files import Bank
from mpsearch.errors import InputError
from mpsearch.evaluation import Evaluation
from mpsearch.exporters.base import Exporter
from mpsearch.graph.channel_scaling import FILE, recorded
from mpsearch.graph.fold import apply_folds
from mpsearch.graph.projections import expose_projections
from mpsearch.layer import weight_rows, weights_sha256
from mpsearch.pipeline.prepare import IDENTITY, Build, Settings
from mpsearch.pipeline.verify import Source
from mpsearch.quantizers.round_to_nearest import RoundToNearest
from mpsearch.runs.run import Run
from mpsearch.schemes.base import QuantizedTensor
from mpsearch.schemes.floating import Float

PATHS = ("data_dir", "path")  # arguments of the tasks


def absent_data(settings: Settings) -> str | None:
    """The task's data that are not there, as "task.data_dir=data/cifar10"; `None` where nothing is known to be absent."""
    given = {key: settings["task"].get(key) for key in PATHS}
    gone = (f"task.{key}={value}" for key, value in given.items() if isinstance(value, str) and not _exists(value))
    return next(gone, None)


def _exists(path: str) -> bool:
    return Path(path).expanduser().exists()


@dataclass(frozen=True)
class BankedWeights:
    """The quantized weights of a finished run; `model` is float, folded and equalized."""

    model: nn.Module
    space: SearchSpace
    bank: Bank
    bias_correction: bool

    def quantized(self, layer: str, scheme: str) -> QuantizedTensor:
        """From the bank; in a float format, which it does not keep, rounded. `InputError` where the bank has none intact."""
        of, weight = self.space.schemes[scheme], weight_rows(self.model.get_submodule(layer))
        if isinstance(of, Float):
            return RoundToNearest().quantize(weight.float().cpu(), of)
        found = self.bank.read(layer, scheme, of, tuple(weight.shape))
        if found is None:
            raise InputError(self._absent(f"the weight of '{layer}' in {scheme}"))
        of.check(found.tensors, found.shape)
        return found

    def biases(self, layer: str, scheme: str) -> dict[str, Tensor]:
        """Corrected ones, from the bank; `InputError` where a layer with a bias has none there."""
        (modules,) = (la.modules for la in self.space.layers if la.name == layer)
        has_bias = any(getattr(self.model.get_submodule(name), "bias", None) is not None for name in modules)
        if not self.bias_correction or not has_bias:
            return {}
        found = self.bank.read_biases(layer, scheme)
        if found is None:
            raise InputError(self._absent(f"the corrected bias of '{layer}' in {scheme}"))
        return found

    def _absent(self, what: str) -> str:
        return f"{self.bank.folder} has no intact entry for {what}, and the task's data are absent. Restore one of them."


def without_data(settings: Settings, build: Build, folder: Path, result: Run, absent: str) -> Source:
    """From the bank of a run; `InputError` where the model or how it was equalized is not what the run recorded."""
    record, equalization = result.identity, recorded(folder)
    sha256, recorded_equalizer = record["model_sha256"], record.get("equalizer") or {}
    folds = tuple((layer, norm) for layer, norm in record["folded_batch_norms"])

    def float_model() -> nn.Module:
        torch.manual_seed(settings["seed"])
        model: nn.Module = build("model").eval()
        if (found := weights_sha256(model)) != sha256:
            raise InputError(f"The model has checksum {found[:12]}…; the run's had {sha256[:12]}…. Give the weights of the run.")
        return model

    def check(exporter: Exporter, path: Path, recorded: Evaluation) -> None:
        exporter.load(path, float_model())
        print(f"{absent} does not exist: the digests of what was written were checked, its loss was not measured again")

    if recorded_equalizer.get("sha256") != (equalization and equalization.sha256):
        raise InputError(f"{folder / FILE} is not that of this run. Restore it.")
    model = expose_projections(float_model())
    apply_folds(model, folds)
    if equalization is not None:
        equalization.apply(model)
    bank = Bank(folder / "bank", {key: record.get(key) for key in IDENTITY})
    return Source(BankedWeights(model, result.space, bank, record["bias_correction"]), sha256, folds, equalization, check)
