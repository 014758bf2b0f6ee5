"""The batches of a task, checked: pairs (inputs, targets) of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.tree import arrays_to_tensors

# Inputs (a tensor, or nested tensors) and targets, both with n samples first, on the CPU.
Batch = tuple[Any, Tensor]

CHUNK = 2**17  # elements that are compared at once; a few float64 temporaries of 1 MB stay in the cache: a third of the time


def chunk_rows(outputs: Tensor) -> int:
    """How many rows of outputs `[n, columns]` are compared at once."""
    return max(1, CHUNK // max(1, outputs[:1].numel()))


def checked_batches(batches: Iterable[Any], split: str) -> list[Batch]:
    """All batches of a split, NumPy arrays as tensors (float64 as float32).

    Raises `InputError` for a batch that is no pair (inputs, targets), and for targets that are no tensor or array.
    """
    try:
        return [_checked(batch, split) for batch in batches]
    except TypeError as error:
        if isinstance(batches, Iterable):
            raise
        raise InputError(
            f"The task's batches('{split}') must be a sequence of pairs (inputs, targets); got {_shown(batches)}."
        ) from error


def _checked(batch: Any, split: str) -> Batch:
    if isinstance(batch, Mapping) or not isinstance(batch, list | tuple) or len(batch) != 2:
        raise InputError(
            f"A batch of the {split} split must be a pair (inputs, targets); got {_shown(batch)}. Nest what the model takes, as "
            "in ((ids, mask), targets), and unpack it in the task's forward."
        )
    inputs, targets = arrays_to_tensors(batch[0]), arrays_to_tensors(batch[1])
    if not isinstance(targets, Tensor) or not targets.dim():
        got = "one number" if isinstance(targets, Tensor) else f"a {type(targets).__name__}"
        raise InputError(f"The targets of a batch of the {split} split must be a tensor or array with samples first; got {got}.")
    return inputs, targets


def _shown(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a {type(batch).__name__} with {', '.join(map(str, batch))}"
    if isinstance(batch, list | tuple):
        return f"{len(batch)} parts"
    return "None" if batch is None else f"a {type(batch).__name__}"
