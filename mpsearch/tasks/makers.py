"""Tasks made from what people have: data loaders, data sets, tensors or arrays, with labels or without."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from mpsearch.batches import Batch, checked_batches
from mpsearch.divergence import Divergence, RelativeMSE, SigmoidKL, choose
from mpsearch.errors import InputError
from mpsearch.tasks.base import SPLITS, StoredTask, Task, batch_length, in_batches
from mpsearch.tree import arrays_to_tensors, tensors_in

Metric = Callable[[Tensor, Tensor], Any]
SHUFFLING = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def classification(
    *,
    calibration: Any,
    search: Any,
    confirm: Any,
    metric: Metric | None = None,
    quality_name: str | None = None,
    quality_kind: str | None = None,
    batch_size: int = 250,
    divergence: str | Divergence | None = None,
    per_token: bool = False,
) -> Task:
    """A task from labelled data.

    Parameters
    ----------
    calibration, search, confirm
        The data of each split; no sample may be in two of them. A pair ``(inputs, targets)`` of tensors or NumPy arrays with n
        samples first, a ``Dataset``, a ``DataLoader`` that does not shuffle, or any iterable of batches ``(inputs, targets)``;
        a batch may also be a mapping with ``"labels"``. Inputs may be nested: mappings are passed to the model as keyword
        arguments, tuples and lists as positional ones. The data are read once and kept in memory.
    metric
        ``metric(outputs, targets)`` returns one number per sample, ``[n]``, or one number for the whole split (F1, mAP), whose
        interval is then from a paired bootstrap; an object with ``update``, ``compute`` and ``reset``, as those of
        torchmetrics, counts as the latter. By default the accuracy.
    quality_name, quality_kind
        What the metric is called and how it is read (`mpsearch.quality.Quality`): "share" (0 to 1), "number" (higher is
        better) or "error" (lower is better). By default the metric's own name and, from its ``higher_is_better``, kind.
    batch_size
        Samples per batch of tensors, arrays and data sets.
    divergence
        The loss, by default the one that fits outputs and targets (`mpsearch.divergence.choose`).
    per_token
        Outputs are ``[n, tokens, columns]`` and are compared token by token; intervals take a sample as one unit. Without
        labels the number of tokens is the second size of the first input: give `decoder_input_ids` before `input_ids`.

    Raises
    ------
    InputError
        For data of another form, and for a data loader that shuffles.
    """
    return DataTask(
        dict(zip(SPLITS, (calibration, search, confirm), strict=True)),
        labelled=True,
        metric=metric,
        quality_name=quality_name,
        quality_kind=quality_kind,
        batch_size=batch_size,
        divergence=divergence,
        per_token=per_token,
    )


def fidelity_task(
    *,
    calibration: Any,
    search: Any,
    confirm: Any,
    metric: Metric | None = None,
    quality_name: str | None = None,
    quality_kind: str | None = None,
    batch_size: int = 250,
    divergence: str | Divergence = "softmax_kl",
    per_token: bool = False,
) -> Task:
    """A task from inputs without labels: the quality is the agreement with the float model.

    It is the share of samples whose predicted class is the float model's; with the divergence "sigmoid_kl" the share of outputs
    on the same side of one half, with "relative_mse" (embeddings, regression) the cosine similarity of the outputs.

    Parameters
    ----------
    calibration, search, confirm
        As in `classification`, but of inputs alone: each batch is what the model takes.
    metric
        ``metric(outputs, float_outputs)``, as in `classification`.
    quality_name, quality_kind, batch_size, per_token
        As in `classification`.
    divergence
        The loss: "softmax_kl", "sigmoid_kl" or "relative_mse".
    """
    return FidelityTask(
        dict(zip(SPLITS, (calibration, search, confirm), strict=True)),
        labelled=False,
        metric=metric,
        quality_name=quality_name,
        quality_kind=quality_kind,
        batch_size=batch_size,
        divergence=divergence,
        per_token=per_token,
    )


class DataTask(StoredTask):
    """Batches held in memory, measured by a metric; see `classification`."""

    def __init__(
        self,
        splits: Mapping[str, Any],
        *,
        labelled: bool,
        metric: Metric | None = None,
        quality_name: str | None = None,
        quality_kind: str | None = None,
        batch_size: int = 250,
        divergence: str | Divergence | None = None,
        per_token: bool = False,
    ) -> None:
        self._metric, self.divergence, self.per_token = metric, divergence, per_token
        self.quality_by_sample = metric is None and (per_token or self.against_float)
        pairs = {split: read_batches(data, split, batch_size, labelled) for split, data in splits.items()}
        super().__init__({split: [(x, self._rows(x, y)) for x, y in batches] for split, batches in pairs.items()})
        name, kind = self._default_quality()
        self.quality_name, self.quality_kind = quality_name or name, quality_kind or kind

    def forward(self, model: nn.Module, inputs: Any) -> Tensor:
        """The outputs `[n, columns]`; per token `[n * tokens, columns]`."""
        outputs = super().forward(partial(_call, model), inputs)  # type: ignore[arg-type]
        return outputs.flatten(0, -2) if self.per_token else outputs

    def quality(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The metric, or the accuracy that fits the divergence."""
        return super().quality(outputs, targets) if self._metric is None else apply_metric(self._metric, outputs, targets)

    def clusters(self, split: str) -> Tensor | None:
        """The sample of each token."""
        if not self.per_token:
            return None
        n_rows = [(batch_length(inputs), len(targets)) for inputs, targets in self.batches(split)]
        per_sample = torch.tensor([rows // n for n, rows in n_rows for _ in range(n)])
        return torch.arange(len(per_sample)).repeat_interleave(per_sample)

    def _default_quality(self) -> tuple[str, str]:
        """(name, kind)."""
        if self._metric is None:
            return Task.quality_name, Task.quality_kind
        name = getattr(self._metric, "__name__", type(self._metric).__name__).strip("<>").lower()
        return name, "error" if getattr(self._metric, "higher_is_better", True) is False else "number"

    def _rows(self, inputs: Any, targets: Tensor) -> Tensor:
        """The targets, one for each row of outputs."""
        return targets.flatten() if self.per_token else targets


class FidelityTask(DataTask):
    """The same without labels; see `fidelity_task`."""

    against_float = True

    def quality(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The agreement with the float model's outputs, which are `targets`."""
        if self._metric is not None or not self._is_regression:
            return super().quality(outputs, self._probabilities(targets) if self._metric is None else targets)
        return F.cosine_similarity(outputs, targets, dim=-1)

    def cross_entropy(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Against the float model's predictions; `InputError` where there are none, as in training."""
        if targets.shape != outputs.shape:
            raise InputError("A task without labels has no cross-entropy to train on. Train with loss=divergence.")
        return self._criterion(outputs, targets).task_loss(outputs, self._probabilities(targets))

    def _criterion(self, outputs: Tensor, targets: Tensor) -> Divergence:
        return choose(self.divergence, [outputs], [targets])[0]

    @property
    def _is_regression(self) -> bool:
        return getattr(self.divergence, "name", self.divergence) == RelativeMSE.name

    def _probabilities(self, outputs: Tensor) -> Tensor:
        """The float model's predictions as targets of the criterion."""
        criterion = self._criterion(outputs, outputs)
        if getattr(criterion, "probabilities", True):  # a regression has none
            return outputs
        return outputs.sigmoid() if isinstance(criterion, SigmoidKL) else outputs.softmax(-1)

    def _default_quality(self) -> tuple[str, str]:
        if self._metric is not None:
            return super()._default_quality()
        return ("cosine_similarity", "number") if self._is_regression else ("agreement", "share")

    def _rows(self, inputs: Any, targets: Tensor) -> Tensor:
        return targets.repeat_interleave(next(tensors_in(inputs)).shape[1]) if self.per_token else targets


def apply_metric(metric: Metric, outputs: Tensor, targets: Tensor) -> Tensor:
    """The metric's value: `[n]`, or one number (no dimension); raises `InputError` for anything else."""
    if all(hasattr(metric, name) for name in ("update", "compute", "reset")):
        counter: Any = metric
        counter.reset()
        counter.update(outputs, targets)
        value = counter.compute()
        counter.reset()
    else:
        value = metric(outputs, targets)
    if isinstance(value, Tensor | np.ndarray | np.generic | float | int) and (tensor := torch.as_tensor(value)).dim() < 2:
        return tensor.to(outputs.device, torch.float64)
    got = f"the shape {tuple(value.shape)}" if hasattr(value, "shape") else f"a {type(value).__name__}"
    raise InputError(f"The metric must return one number per sample, [n], or one number for all of them; got {got}.")


def read_batches(data: Any, split: str, batch_size: int, labelled: bool) -> list[Batch]:
    """The batches of a split, read once; `InputError` for a loader that shuffles and for data that are no batches."""
    if labelled and isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[1], Tensor | np.ndarray):
        inputs, targets = map(arrays_to_tensors, data)
        if batch_length(inputs) != len(targets):
            raise InputError(f"The {split} data have {batch_length(inputs):,} inputs and {len(targets):,} targets; give as many.")
        data = in_batches(batch_size, inputs, targets)
    elif not labelled and isinstance(data, Tensor | np.ndarray | Mapping):
        inputs = arrays_to_tensors(data)
        data = [x for x, _ in in_batches(batch_size, inputs, torch.zeros(batch_length(inputs)))]
    elif isinstance(data, Dataset):
        data = DataLoader(data, batch_size=batch_size)
    if isinstance(data, DataLoader) and isinstance(getattr(data.batch_sampler, "sampler", data.sampler), SHUFFLING):
        raise InputError(
            f"The {split} data come from a DataLoader that shuffles: the samples must come in the same order each time. Make it "
            "with shuffle=False."
        )
    if not isinstance(data, Iterable):
        arrays, kind = "a pair (inputs, targets)" if labelled else "a tensor of inputs", type(data).__name__
        raise InputError(f"The {split} data must be {arrays}, a Dataset, a DataLoader or an iterable of batches; got a {kind}.")
    return checked_batches([_labelled(batch) if labelled else _unlabelled(batch, split) for batch in data], split)


def _labelled(batch: Any) -> Any:
    """(inputs, targets) of a mapping with labels; anything else as it is."""
    if isinstance(batch, Mapping) and "labels" in batch:
        return {key: value for key, value in batch.items() if key != "labels"}, batch["labels"]
    return batch


def _unlabelled(batch: Any, split: str) -> Any:
    """(inputs, a target of 0 for each sample); a list of one tensor, as a `TensorDataset` gives, counts as that tensor."""
    inputs = arrays_to_tensors(batch[0] if isinstance(batch, tuple | list) and len(batch) == 1 else batch)
    if not any(tensor.dim() for tensor in tensors_in(inputs)):
        raise InputError(
            f"A batch of the {split} split must hold tensors or arrays with samples first; got a {type(batch).__name__}."
        )
    return inputs, torch.zeros(batch_length(inputs), dtype=torch.long)


def _call(model: nn.Module, inputs: Any) -> Any:
    """Mappings are keyword arguments, tuples and lists positional ones."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)
