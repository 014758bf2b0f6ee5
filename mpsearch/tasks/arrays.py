"""An `.npz` file with samples `x` and classes `y`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mpsearch.errors import InputError, did_you_mean
from mpsearch.tasks.base import SPLITS
from mpsearch.tasks.classification import Classification, scale_images
from mpsearch.tasks.sources import draw_by_source, named_files, read_once

LAYOUTS = ("channels_first", "channels_last")


class Arrays(Classification):
    """The three splits drawn disjointly, with `seed`, from one `.npz`, or each from the file that is named for it.

    `calibration_data`, `search_data` and `confirm_data` are files for these splits, `None`: `path`; a file may serve several.
    In a file: `x` float or uint8, [n, features], [n, channels, *space] or, with layout "channels_last",
    [n, *space, channels]; `y` integers [n]. uint8 is divided by 255, then (x - mean) / std is taken for each channel where
    these are given. A size of `None` is an equal share of the file. Raises `InputError` for files and sizes that are not so.
    """

    def __init__(
        self,
        path: str | Path,
        n_calibration: int | None = None,
        n_search: int | None = None,
        n_confirm: int | None = None,
        seed: int = 0,
        batch_size: int = 250,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        layout: str = "channels_first",
        n_classes: int | None = None,
        calibration_data: str | Path | None = None,
        search_data: str | Path | None = None,
        confirm_data: str | Path | None = None,
    ) -> None:
        if layout not in LAYOUTS:
            raise InputError(f"There is no layout '{layout}'." + did_you_mean(layout, LAYOUTS))
        sources = named_files((calibration_data, search_data, confirm_data), Path(path).expanduser())
        data = read_once(sources, lambda file: _read(file, layout))
        sizes = dict(zip(SPLITS, (n_calibration, n_search, n_confirm), strict=True))
        drawn = draw_by_source(sources, {file: len(y) for file, (_, y) in data.items()}, sizes, seed)
        pairs = {split: (data[sources[split]], index) for split, index in drawn.items()}
        calibration, search, confirm = (
            (scale_images(x[index], mean, std), torch.from_numpy(y[index].astype(np.int64)))
            for (x, y), index in (pairs[split] for split in SPLITS)
        )
        origins = {split: file.name for split, file in sources.items()}
        super().__init__(calibration, search, confirm, n_classes=n_classes, batch_size=batch_size, origins=origins)


def _read(path: Path, layout: str) -> tuple[np.ndarray, np.ndarray]:
    """x with channels first, and y."""
    x, y = read_npz(path)
    if not (x.dtype == np.uint8 or np.issubdtype(x.dtype, np.floating)) or x.ndim < 2:
        raise InputError(f"x in {path} is {x.dtype} {list(x.shape)}; it must be a float type or uint8, with samples first.")
    if len(x) != len(y):
        raise InputError(f"{path} has {len(x):,} samples in x and {len(y):,} labels in y. They must be as many.")
    return (np.moveaxis(x, -1, 1) if layout == "channels_last" else x), y


def read_npz(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """`x` (any numbers) and `y` (integers [n]) of an `.npz` file. Objects are never unpickled.

    Raises `InputError` where there is no such file, where it is damaged, or where x or y is missing or of another kind.
    """
    x, y = read_arrays(path, "x", "y")
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        raise InputError(f"y in {path} is {y.dtype} {list(y.shape)}; it must be integers [n], the class of each sample.")
    return x, y


def read_arrays(path: Path, *wanted: str) -> list[np.ndarray]:
    """The `wanted` arrays of an `.npz` file, whatever else is in it; `InputError` where it, or one of them, is not there."""
    arrays = npz_arrays(path, wanted)
    for name in wanted:
        if name not in arrays:
            arguments = ", ".join(f"{name}=…" for name in wanted)
            with np.load(path, allow_pickle=False) as file:
                names = list(file.files)
            raise InputError(f"{path} has no array '{name}', only {names}. Save it with numpy.savez(path, {arguments}).")
    return [arrays[name] for name in wanted]


def npz_arrays(path: Path, wanted: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` file by name, or those of them that are `wanted`; `InputError` where it is absent or damaged."""
    if not path.is_file():
        arrays = f"arrays {' and '.join(wanted)}" if wanted else "the model's inputs"
        raise InputError(f"There is no data file {path}. Give the path of an .npz file with {arrays}.")
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if wanted is None or name in wanted}
    except Exception as error:  # a damaged file can raise anything, from zlib.error to tokenize.TokenError
        raise InputError(f"{path} is not a whole .npz file of plain arrays ({error}). Save it again with numpy.savez.") from error
