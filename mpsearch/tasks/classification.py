"""Classification of arrays held in memory: the base of the digits, CIFAR-10 and `.npz` tasks, and checks of their data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.tasks.base import SPLITS, StoredTask, in_batches

Pair = tuple[Tensor | np.ndarray, Tensor | np.ndarray]


class Classification(StoredTask):
    """Three pairs (x, y) of tensors or arrays, one for each split, already preprocessed.

    x float32 [n, features] or [n, channels, *space], y int64 [n] in 0..n_classes - 1. `n_classes` defaults to the largest
    label + 1; `origins` says of each split where it comes from ("digits"). Raises `InputError` for data that are not so.
    """

    def __init__(
        self,
        calibration: Pair,
        search: Pair,
        confirm: Pair,
        n_classes: int | None = None,
        batch_size: int = 250,
        origins: Mapping[str, str] | None = None,
    ) -> None:
        given = zip(SPLITS, (calibration, search, confirm), strict=True)
        pairs = {split: (torch.as_tensor(x), torch.as_tensor(y)) for split, (x, y) in given}
        for split, (x, y) in pairs.items():
            _check_arrays(split, x, y)
        if len({tuple(x.shape[1:]) for x, _ in pairs.values()}) > 1:
            shapes = ", ".join(f"{split} {list(x.shape[1:])}" for split, (x, _) in pairs.items())
            raise InputError(f"The samples of the splits differ in shape: {shapes}. Give all of them the same.")
        largest = max(int(y.max()) for _, y in pairs.values())
        self.n_classes = largest + 1 if n_classes is None else n_classes
        for split, (_, y) in pairs.items():
            low, high = int(y.min()), int(y.max())
            if low < 0 or high >= self.n_classes:
                raise InputError(
                    f"Labels of the {split} split run from {low} to {high}; with {self.n_classes} classes they must lie in "
                    f"0..{self.n_classes - 1}. Number the classes from 0, or raise n_classes."
                )
        super().__init__({split: in_batches(batch_size, x, y) for split, (x, y) in pairs.items()}, origins)


def draw_splits(n: int, sizes: Mapping[str, int | None], seed: int, source: str) -> dict[str, np.ndarray]:
    """Disjoint indices int64 into `n` samples, `sizes` of them for each split, from one seeded shuffle.

    A size of `None` is an equal share, `n // len(sizes)`. Raises `InputError` where a size is below 1 or the data too few.
    """
    share = n // len(sizes)
    counts = {split: share if size is None else size for split, size in sizes.items()}
    asked = ", ".join(f"n_{split}={count}" for split, count in counts.items())
    if not all(isinstance(count, int) and count >= 1 for count in counts.values()):
        raise InputError(f"The number of samples of a split must be an integer, at least 1; got {asked}, of {n:,} in {source}.")
    total = sum(counts.values())
    if total > n:
        raise InputError(f"{source} holds {n:,} samples, {total:,} were asked for ({asked}). Ask for {total - n:,} fewer.")
    order = np.random.default_rng(seed).permutation(n)
    starts = np.cumsum([0, *counts.values()])
    return {split: order[start : start + count] for (split, count), start in zip(counts.items(), starts[:-1], strict=True)}


def scale_images(pixels: np.ndarray, mean: Sequence[float] | None, std: Sequence[float] | None) -> Tensor:
    """`(x - mean) / std` for each channel of [n, channels, *space], float32; uint8 pixels are first divided by 255.

    One entry serves all channels. Raises `InputError` where the lengths do not fit or a std is not above 0.
    """
    x = torch.from_numpy(np.ascontiguousarray(pixels)).to(torch.float32, copy=True)
    if pixels.dtype == np.uint8:
        x.div_(255)
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) not in (1, x.shape[1]):
            raise InputError(f"{name} has {len(values)} entries, the data have {x.shape[1]} channels. Give one for each, or one.")
    shape = (1, -1, *[1] * (x.ndim - 2))
    if mean is not None:
        x.sub_(torch.tensor(list(mean), dtype=torch.float32).view(shape))
    if std is not None:
        if min(std) <= 0:
            raise InputError(f"std is {list(std)}; every entry must be above 0.")
        x.div_(torch.tensor(list(std), dtype=torch.float32).view(shape))
    return x


def _check_arrays(split: str, x: Tensor, y: Tensor) -> None:
    if x.dtype != torch.float32 or not 2 <= x.ndim <= 5:
        raise InputError(
            f"x of the {split} split is {x.dtype} {list(x.shape)}; it must be float32 [n, features] or [n, channels, *space]."
        )
    if y.dtype != torch.int64 or y.ndim != 1:
        raise InputError(f"y of the {split} split is {y.dtype} {list(y.shape)}; it must be int64 [n], the class of each sample.")
    if len(x) != len(y):
        raise InputError(f"The {split} split has {len(x):,} samples in x and {len(y):,} labels in y. They must be as many.")
    if x.numel() == 0:
        raise InputError(f"The {split} split is empty: x has shape {list(x.shape)}. Give it at least 1 sample.")
    if not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x)).flatten(1).any(1).sum())
        raise InputError(f"{bad:,} of {len(x):,} samples of the {split} split hold NaN or infinite values. Correct them.")
