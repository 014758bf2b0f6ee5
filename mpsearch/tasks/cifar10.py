"""CIFAR-10 from a folder: as `.npz` files, or as the Python batches that its makers distribute.

Those batches are pickles, which can run any code when they are opened; here they are read by an unpickler that can build
numpy arrays and nothing else.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.tasks.arrays import read_npz
from mpsearch.tasks.base import SPLITS, Batch
from mpsearch.tasks.classification import Classification, scale_images
from mpsearch.tasks.sources import draw_by_source, named_file, read_once

# Of ImageNet, not of CIFAR-10: the published ResNet checkpoints (models/resnet.py) were trained with these.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

IMAGE_SHAPE = (32, 32, 3)


class Cifar10(Classification):
    """Images float32 [n, 3, 32, 32], normalized, ten classes.

    `data_dir` holds `train_*.npz` and `test_*.npz` (x uint8 [n, 32, 32, 3], y uint8 [n]) or `data_batch_1` … `data_batch_5` and
    `test_batch`, also in a folder `cifar-10-batches-py` in it. Calibration and search images are drawn with `seed` from the
    training images; the confirm split is the first `n_confirm` test images, all of them where that is `None`. A network has
    usually been trained on the former, so that its accuracy on the search split flatters it, and its losses there are too small.

    `calibration_data`, `search_data` and `confirm_data` name files for these splits, `.npz` or Python batches, by their paths or
    by their names in the folder: `search_data=test_0000_4999.npz` searches on images that the network was not trained on. The
    others then take other files; where there is none left, they share it, without an image in two splits.
    """

    def __init__(
        self,
        data_dir: str | Path,
        n_calibration: int = 1000,
        n_search: int = 2000,
        n_confirm: int | None = None,
        seed: int = 0,
        batch_size: int = 100,
        calibration_data: str | Path | None = None,
        search_data: str | Path | None = None,
        confirm_data: str | Path | None = None,
    ) -> None:
        data_dir = Path(data_dir).expanduser()
        train_paths, test_paths = find_files(data_dir)
        given = dict(zip(SPLITS, (calibration_data, search_data, confirm_data), strict=True))
        named = {split: named_file(split, path, train_paths[0].parent) for split, path in given.items()}
        parts = {"calibration": train_paths, "search": train_paths, "confirm": test_paths}
        sources = {
            split: _left_of(parts[split], [file for file in named.values() if file is not None]) if file is None else (file,)
            for split, file in named.items()
        }
        origins = {split: f"CIFAR-10 {'test' if split == 'confirm' else 'train'}" for split in SPLITS}
        origins |= {split: file.name for split, file in named.items() if file is not None}
        data = read_once(sources, _read_all)
        sizes = {"calibration": n_calibration, "search": n_search, "confirm": n_confirm}
        drawn = draw_by_source(sources, {paths: len(y) for paths, (_, y) in data.items()}, sizes, seed, first="confirm")
        calibration, search, confirm = (
            _prepare(x[drawn[split]], y[drawn[split]]) for split, (x, y) in ((split, data[sources[split]]) for split in SPLITS)
        )
        self._train_paths = sources["calibration"]
        tested = [drawn[split] for split in ("search", "confirm") if sources[split] == self._train_paths]
        self._trained_on = np.setdiff1d(np.arange(len(data[self._train_paths][1])), np.concatenate([*tested, []]))
        super().__init__(calibration, search, confirm, n_classes=10, batch_size=batch_size, origins=origins)

    def training(self, epoch: int, batch_size: int, seed: int) -> Iterator[Batch]:
        """The images of the calibration split's files that are in no other split: padded, cropped at random, or mirrored too.

        Read anew for each epoch: a search does not need them, and they take a quarter of a gigabyte.
        """
        random = np.random.default_rng([seed, epoch])
        x, y = _read_all(self._train_paths)
        order = random.permutation(self._trained_on)
        for start in range(0, len(order), batch_size):
            index = order[start : start + batch_size]
            yield _prepare(_augmented(x[index], random), y[index])


def _left_of(paths: Sequence[Path], named: Sequence[Path]) -> tuple[Path, ...]:
    """The files that are named for no split, or the last, which then is shared."""
    every = tuple(path.resolve() for path in paths)
    return tuple(path for path in every if path not in named) or every[-1:]


def find_files(data_dir: Path) -> tuple[list[Path], list[Path]]:
    """The files of training and of test images, `.npz` before Python batches, or `InputError` saying what was looked for."""
    if not data_dir.is_dir():
        raise InputError(f"There is no folder {data_dir} to read CIFAR-10 from. Set task.data_dir to where it is.")
    for folder, train, test in (
        (data_dir, "train_*.npz", "test_*.npz"),
        (data_dir, "data_batch_[1-5]", "test_batch"),
        (data_dir / "cifar-10-batches-py", "data_batch_[1-5]", "test_batch"),
    ):
        paths = sorted(folder.glob(train)), sorted(folder.glob(test))
        if all(paths):
            return paths
    raise InputError(
        f"No CIFAR-10 in {data_dir}: looked for train_*.npz and test_*.npz, for data_batch_1 to 5 and test_batch, there and in "
        "cifar-10-batches-py. Unpack the Python version of CIFAR-10 there, or set task.data_dir to where it is."
    )


def read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """A Python batch: x uint8 [n, 32, 32, 3], y int64 [n]. Raises `InputError` for whatever is no such batch."""
    try:
        with path.open("rb") as file:
            # In the distributed files, which Python 2 wrote, the keys are bytes.
            batch = {_text(key): value for key, value in _ArrayUnpickler(file, encoding="bytes").load().items()}
        x = np.asarray(batch["data"], np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        y = np.asarray(batch["labels"], np.int64)
    except InputError as error:
        raise InputError(f"{path} is not a CIFAR-10 batch: {error}") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise InputError(
            f"{path} is not a whole CIFAR-10 batch ({type(error).__name__}: {error}). Unpack the archive again."
        ) from error
    return x, y


# Both names under which numpy arrays have been pickled (numpy 1 and 2), and nothing that does more than make arrays.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Builds numbers, text, lists, dicts and numpy arrays; refuses every other class and function."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise InputError(f"it asks for '{module}.{name}', which a batch of images has no use for; it was not run.")
        return _ALLOWED[module, name]


def _text(key: bytes | str) -> str:
    return key.decode() if isinstance(key, bytes) else key


def _read_all(paths: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
    """x uint8 [n, 32, 32, 3] and y of all files, end to end."""
    pairs = [read_npz(path) if path.suffix == ".npz" else read_batch(path) for path in paths]
    for path, (x, y) in zip(paths, pairs, strict=True):
        if x.dtype != np.uint8 or x.shape[1:] != IMAGE_SHAPE or len(x) != len(y):
            raise InputError(
                f"{path} holds x {x.dtype} {list(x.shape)} and {len(y):,} labels; CIFAR-10 is uint8 [n, 32, 32, 3] and n labels."
            )
    return np.concatenate([x for x, _ in pairs]), np.concatenate([y for _, y in pairs])


def _augmented(pixels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Each image moved by up to 4 pixels over black, and mirrored or not; uint8 `[n, 32, 32, 3]` as before."""
    n, height, width, _ = pixels.shape
    rows = random.integers(0, 9, (n, 1)) + np.arange(height)
    columns = random.integers(0, 9, (n, 1)) + np.arange(width)
    columns = np.where(random.random((n, 1)) < 0.5, columns[:, ::-1], columns)
    padded = np.pad(pixels, ((0, 0), (4, 4), (4, 4), (0, 0)))
    return padded[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]


def _prepare(pixels: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
    """uint8 [n, 32, 32, 3] -> float32 [n, 3, 32, 32], normalized; labels -> int64."""
    return scale_images(pixels.transpose(0, 3, 1, 2), MEAN, STD), torch.from_numpy(labels.astype(np.int64))
