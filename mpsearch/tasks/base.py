"""The contract of tasks: data in three splits, how a model is run on them, and what is measured of its outputs.

A task knows nothing of quantization or devices. The engine moves batches to where the model is and asks `forward`, `quality`
and `cross_entropy`; a new task is a subclass with `batches`, and a YAML in `conf/task/`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mpsearch.batches import Batch, checked_batches
from mpsearch.divergence import Divergence, RelativeMSE, choose
from mpsearch.errors import InputError, did_you_mean
from mpsearch.tree import map_tensors, tensors_in

# Calibration data set scales, search data score proposals, confirmation data are never seen by the search.
SPLITS = ("calibration", "search", "confirm")


class Task:
    """Data and measurement; see the methods for what a subclass may change."""

    quality_name: str = "accuracy"
    """What is measured, as a reader would say it."""

    quality_kind: str = "share"
    """How it is read, "share", "number", "error" or "perplexity": see `mpsearch.quality.Quality`."""

    divergence: str | Divergence | None = None
    """The loss: "softmax_kl", "sigmoid_kl", "relative_mse", or an object; `None`: see `mpsearch.divergence.choose`."""

    max_drop: float | None = None
    """The largest drop of the quality that counts as none, where `max_drop` does not say; `None`: `Quality.max_drop`."""

    against_float: bool = False
    """Whether the float model's outputs take the place of targets in `quality` and `cross_entropy`: a task without labels."""

    quality_by_sample: bool = False
    """Whether `quality` and `cross_entropy` of a batch are those of its samples among all of a split, one or more for each: they
    are then asked batch by batch, and the outputs of a whole split are never in memory."""

    def batches(self, split: str) -> Sequence[Batch]:
        """The batches of one of `SPLITS`: the same ones in the same order every time, no sample in two splits.

        Pairs (inputs, targets) of tensors or NumPy arrays with n samples first; inputs may be nested (`mpsearch.tree`).
        """
        raise InputError(
            f"The task {type(self).__name__} has no method batches(split). Define it to return the batches of 'calibration', "
            "'search' or 'confirm': a sequence of pairs (inputs, targets) of tensors or NumPy arrays."
        )

    def loaded(self, split: str) -> list[Batch]:
        """`batches(split)`, checked, with tensors in the place of arrays; `InputError` for what is no pair."""
        return checked_batches(self.batches(split), split)

    def training(self, epoch: int, batch_size: int, seed: int) -> Iterator[Batch]:
        """Batches to train on, of at most `batch_size` samples and in another order each epoch; never of search or confirm.

        Here the calibration split: its batches shuffled, the samples in each too. The same arguments give the same batches.
        """
        random = np.random.default_rng([seed, epoch])
        batches = self.loaded("calibration")
        for i in random.permutation(len(batches)):
            inputs, targets = batches[i]
            n = next((len(tensor) for tensor in tensors_in(inputs) if tensor.dim()), len(targets))
            rows = targets.unflatten(0, (n, -1))  # a sample may have several
            for index in torch.from_numpy(random.permutation(n)).split(batch_size):
                yield map_tensors(partial(_taken, index), inputs), rows[index].flatten(0, 1)

    def forward(self, model: nn.Module, inputs: Any) -> Tensor:
        """The outputs that are compared and measured, [n, columns] (logits, as a rule), for the inputs of one batch.

        Here what `model(inputs)` returns: a tensor (one of n numbers is taken for one column), or the tensor `logits` of a
        mapping or an object that has one. Raises `InputError` for anything else.
        """
        output = model(inputs)
        if not isinstance(output, Tensor):
            output = _logits_of(output)
        return output[:, None] if output.dim() == 1 else output

    def chosen_divergence(self, model: nn.Module, batches: Sequence[Batch]) -> tuple[Divergence, str]:
        """(what the loss is, why), from the float model's outputs on some batches and their targets."""
        with torch.no_grad():
            outputs = (self.forward(model, inputs) for inputs, _ in batches)
            return choose(self.divergence, outputs, [targets for _, targets in batches])

    def quality(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Quality of each sample, float32 [samples]; here the accuracy that fits the divergence: 1 where the largest logit is the
        target's, else 0; of binary outputs the share that are on the target's side.

        `quality_kind` says how to read it. Where the n rows of logits are not independent (the tokens of a text), give either one
        number for each text, or one for each token and the texts by `clusters`. It is given all of a split at once (but see
        `quality_by_sample`), and may also return a single number for all of it (F1, mAP): its interval is then from a paired
        bootstrap.
        """
        return self._criterion(logits, targets).accuracy(logits, targets)

    def clusters(self, split: str) -> Tensor | None:
        """Which independent unit (a text, a patient) each number of `quality` belongs to, int64 [samples]; `None`: each its own.

        Intervals take a unit as one sample; the quality itself stays the mean over all numbers.
        """
        return None

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The task's own loss of each row, float32 [n]; here cross-entropy in nats, or the squared error of a regression."""
        return self._criterion(logits, targets).task_loss(logits, targets)

    def _criterion(self, outputs: Tensor, targets: Tensor) -> Divergence:
        """The divergence that fits the targets too; relative MSE compares outputs of any kind, and says nothing of targets."""
        compared = self.divergence if isinstance(self.divergence, str | None) else self.divergence.name
        return choose(None if compared == RelativeMSE.name else self.divergence, [outputs], [targets])[0]

    def describe(self, split: str) -> str:
        """One short phrase for the report, as in "400 samples"."""
        return f"{sum(len(targets) for _, targets in self.loaded(split)):,} samples"

    def fingerprint(self) -> str:
        """SHA-256 (64 hex digits) over the data of all splits: tells two data sets apart when a run is resumed.

        The same samples in other batches have the same fingerprint. Computed once and kept.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return hashlib.sha256("".join(map(self.digest, SPLITS)).encode()).hexdigest()

    def digest(self, split: str) -> str:
        """The same of one split, computed at every call."""
        # One hash for each tensor of a batch, fed batch after batch, so that the batch size does not matter.
        streams: dict[int, Any] = {}
        for batch in self.loaded(split):
            for i, tensor in enumerate(tensors_in(batch)):
                start = hashlib.sha256(f"{split} {i} {tensor.dtype} {list(tensor.shape[1:])}".encode())
                streams.setdefault(i, start).update(_bytes(tensor))
        return "".join(stream.hexdigest() for stream in streams.values())


class StoredTask(Task):
    """A task whose batches are held in memory, by split; `origins` say of each split where its samples come from."""

    def __init__(self, batches: Mapping[str, Sequence[Batch]], origins: Mapping[str, str] | None = None) -> None:
        self._batches, self._origins = dict(batches), dict(origins or {})

    def batches(self, split: str) -> Sequence[Batch]:
        """The batches of one of `SPLITS`; `InputError` for another name."""
        if split not in SPLITS:
            raise InputError(f"There is no split '{split}'." + did_you_mean(split, SPLITS))
        return self._batches[split]

    def describe(self, split: str) -> str:
        """As in "400 samples, digits"."""
        n = sum(batch_length(inputs) for inputs, _ in self.batches(split))
        return ", ".join([f"{n:,} samples", *([self._origins[split]] if split in self._origins else [])])


def in_batches(batch_size: int, inputs: Any, targets: Tensor) -> list[Batch]:
    """Consecutive samples, the last batch smaller where they do not divide; `InputError` for a batch size below 1."""
    check_batch_size(batch_size)
    slices = [slice(start, start + batch_size) for start in range(0, batch_length(inputs), batch_size)]
    return [(map_tensors(itemgetter(part), inputs), targets[part]) for part in slices]


def check_batch_size(batch_size: int) -> None:
    """Raise `InputError` for a batch size below 1."""
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be at least 1.")


def batch_length(inputs: Any) -> int:
    """The number of samples of a batch: the length of its first tensor."""
    return len(next(tensors_in(inputs)))


def _logits_of(output: Any) -> Tensor:
    """The tensor `logits` of a model's output that is no tensor itself."""
    keys = list(output) if isinstance(output, Mapping) else list(vars(output)) if hasattr(output, "__dict__") else []
    keys = keys or list(getattr(output, "_fields", ()))
    logits = output["logits"] if isinstance(output, Mapping) and "logits" in keys else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    parts = f"with {', '.join(map(str, keys))}" if keys else f"of {len(output)} parts" if isinstance(output, list | tuple) else ""
    raise InputError(
        f"The model's output must be a tensor [n, columns] or have a tensor 'logits'; got a {type(output).__name__} {parts}. "
        "Override the task's forward to return the tensor that is to be compared, as in: return model(inputs)"
        f"{f'[{keys[0]!r}]' if isinstance(output, Mapping) and keys else f'.{keys[0]}' if keys else '[0]'}."
    )


def _taken(index: Tensor, x: Tensor) -> Tensor:
    return x[index] if x.dim() else x


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
