"""Nested tensors, as in batches, and in the arguments and outputs of modules.

Nested are lists, tuples (named ones too), mappings and dataclasses; anything else is a leaf.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpsearch.errors import InputError


def map_leaves(change: Callable[[Any], Any], value: Any) -> Any:
    """`value` with `change(leaf)` in the place of each leaf. Mappings become plain dicts."""
    if isinstance(value, Mapping):
        return {key: map_leaves(change, item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_leaves(change, item) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(map_leaves(change, item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        return dataclasses.replace(value, **map_leaves(change, parts))
    return change(value)


def map_tensors(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with `change(tensor)` in the place of each tensor; other leaves stay."""
    return map_leaves(lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, value)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))


def arrays_to_tensors(value: Any) -> Any:
    """`value` with a tensor in the place of each NumPy array. float64, NumPy's default, becomes float32, PyTorch's.

    Raises `InputError` for arrays that are no numbers.
    """
    return map_leaves(lambda leaf: _tensor(leaf) if isinstance(leaf, np.ndarray | np.generic) else leaf, value)


def _tensor(array: np.ndarray | np.generic) -> Tensor:
    array = np.asarray(array)
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    try:
        # A copy where PyTorch cannot share the memory: of a read-only array, or one that is read backwards.
        return torch.from_numpy(np.require(array, requirements=["C", "W"]))
    except TypeError:
        raise InputError(f"An array of a batch is {array.dtype} {list(array.shape)}. Give numbers, or tensors.") from None
