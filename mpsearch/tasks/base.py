"""What a task is: the data in three splits, how a model is run on them, and what is measured of its logits.

A task knows nothing of quantization or devices. The engine moves batches to where the model is and asks `forward`, `quality`
and `cross_entropy`; a new task is a subclass with `batches`, and a YAML in `conf/task/`.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpsearch.trace import tensors_in

# Calibration data set scales, search data score proposals, confirmation data are never seen by the search.
SPLITS = ("calibration", "search", "confirm")

# Inputs (a tensor, or a tuple or mapping that holds tensors) and targets, both with n samples first, on the CPU.
Batch = tuple[Any, Tensor]


class Task(ABC):
    """Data and measurement; see the methods for what a subclass may change."""

    quality_name: str = "accuracy"
    """What is measured, as a reader would say it."""

    quality_kind: str = "share"
    """How it is read, "share", "number" or "perplexity": see `mpsearch.quality.Quality`."""

    @abstractmethod
    def batches(self, split: str) -> Sequence[Batch]:
        """The batches of one of `SPLITS`: the same ones in the same order every time, no sample in two splits."""

    def training(self, epoch: int, batch_size: int, seed: int) -> Iterator[Batch]:
        """Batches to train on, of at most `batch_size` samples and in another order each epoch; never of search or confirm.

        Here the calibration split: its batches shuffled, the samples in each too. The same arguments give the same batches.
        """
        random = np.random.default_rng([seed, epoch])
        batches = self.batches("calibration")
        for i in random.permutation(len(batches)):
            inputs, targets = batches[i]
            for index in torch.from_numpy(random.permutation(len(targets))).split(batch_size):
                yield _taken(inputs, index), targets[index]

    def forward(self, model: nn.Module, inputs: Any) -> Tensor:
        """The model's logits [n, classes] for the inputs of one batch."""
        return model(inputs)

    def quality(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Quality of each sample, float32 [samples]; here 1 where the largest logit is the target's, else 0.

        `quality_kind` says how to read it. Where the n rows of logits are not independent (the tokens of a text), give either one
        number for each text, or one for each token and the texts by `clusters`. It is given all of a split at once.
        """
        return (logits.argmax(-1) == targets).float()

    def clusters(self, split: str) -> Tensor | None:
        """Which independent unit (a text, a patient) each number of `quality` belongs to, int64 [samples]; `None`: each its own.

        Intervals take a unit as one sample; the quality itself stays the mean over all numbers.
        """
        return None

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of each sample in nats, float32 [n]."""
        return F.cross_entropy(logits.float(), targets, reduction="none")

    def describe(self, split: str) -> str:
        """One short phrase for the report, as in "400 samples"."""
        return f"{sum(len(targets) for _, targets in self.batches(split)):,} samples"

    def fingerprint(self) -> str:
        """SHA-256 (64 hex digits) over the data of all splits: tells two data sets apart when a run is resumed.

        The same samples in other batches have the same fingerprint. Computed once and kept.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        total = hashlib.sha256()
        for split in SPLITS:
            # One hash for each tensor of a batch, fed batch after batch, so that the batch size does not matter.
            streams: dict[int, Any] = {}
            for batch in self.batches(split):
                for i, tensor in enumerate(tensors_in(batch)):
                    start = hashlib.sha256(f"{split} {i} {tensor.dtype} {list(tensor.shape[1:])}".encode())
                    streams.setdefault(i, start).update(_bytes(tensor))
            for stream in streams.values():
                total.update(stream.digest())
        return total.hexdigest()


def _taken(inputs: Any, index: Tensor) -> Any:
    """The samples `index` of what may be a tensor, or a tuple or mapping that holds tensors."""
    if isinstance(inputs, Tensor):
        return inputs[index] if inputs.dim() else inputs
    if isinstance(inputs, Mapping):
        return {key: _taken(value, index) for key, value in inputs.items()}
    if isinstance(inputs, list | tuple):
        return type(inputs)(_taken(value, index) for value in inputs)
    return inputs


def _bytes(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
