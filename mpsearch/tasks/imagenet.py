"""A sample of ImageNet: JPEG files end to end in one `.npz`, decoded by Pillow.

Small (one picture a class), for trying a network out and measuring it, not for accuracy claims: those need the validation set.
"""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.tasks.arrays import read_arrays
from mpsearch.tasks.base import SPLITS
from mpsearch.tasks.classification import Classification
from mpsearch.tasks.sources import draw_by_source, named_files, read_once

FILE = "images_even.npz"
N_CLASSES = 1000


class ImageNetSample(Classification):
    """Images float32 [n, 3, 224, 224], `(x - mean) / std` of pixels 0..255, and class numbers 0..999.

    `data_dir` holds `images_even.npz`: `jpeg` uint8, all files end to end; `offsets` [n + 1], where each begins; `label` [n]. The
    three splits are drawn from them with `seed`; confirm takes all that are left where `n_confirm` is `None`. `calibration_data`,
    `search_data` and `confirm_data` name other such files for these splits; a file may serve several. Raises `InputError` for
    sizes and files that are not so, and without Pillow.
    """

    def __init__(
        self,
        data_dir: str | Path,
        n_calibration: int = 100,
        n_search: int = 100,
        n_confirm: int | None = None,
        seed: int = 0,
        batch_size: int = 25,
        mean: float = 127.0,
        std: float = 128.0,
        calibration_data: str | Path | None = None,
        search_data: str | Path | None = None,
        confirm_data: str | Path | None = None,
    ) -> None:
        files = named_files((calibration_data, search_data, confirm_data), Path(data_dir).expanduser() / FILE)
        data = read_once(files, _read)
        sizes = dict(zip(SPLITS, (n_calibration, n_search, n_confirm), strict=True))
        drawn = draw_by_source(files, {file: len(labels) for file, (_, labels) in data.items()}, sizes, seed, rest="confirm")
        decode = _decoder()
        parts = []
        for split, file in files.items():
            jpegs, labels = data[file]
            pictures = [(decode(jpegs[i], f"picture {i} of {file}") - mean) / std for i in drawn[split]]
            parts.append((torch.stack(pictures), torch.from_numpy(labels[drawn[split]].astype(np.int64))))
        origins = dict.fromkeys(SPLITS, "ImageNet, one picture a class")
        calibration, search, confirm = parts
        super().__init__(calibration, search, confirm, n_classes=N_CLASSES, batch_size=batch_size, origins=origins)


def _read(path: Path) -> tuple[list[np.ndarray], np.ndarray]:
    """The JPEG files, each uint8 [size], and their labels."""
    jpeg, offsets, labels = read_arrays(path, "jpeg", "offsets", "label")
    if jpeg.dtype != np.uint8 or len(offsets) != len(labels) + 1 or (np.diff(offsets) <= 0).any() or offsets[-1] > len(jpeg):
        raise InputError(f"{path} holds no JPEG files end to end: jpeg uint8, offsets rising [n + 1] and label [n] are needed.")
    return [jpeg[start:end] for start, end in itertools.pairwise(offsets)], labels


def _decoder() -> Any:
    """A function from a JPEG file's bytes uint8 [size] and its name to pixels float32 [3, height, width] from 0 to 255."""
    try:
        from PIL import Image
    except ImportError:
        raise InputError("Pictures are decoded by Pillow, which is not installed here. Run: pip install pillow") from None

    def decode(data: np.ndarray, name: str) -> Tensor:
        try:
            pixels = np.asarray(Image.open(io.BytesIO(data.tobytes()), formats=["JPEG"]).convert("RGB"), np.float32)
        except Exception as error:  # a damaged file can raise anything
            raise InputError(f"{name} is no whole JPEG file ({error}). Copy the data again.") from error
        return torch.from_numpy(pixels).permute(2, 0, 1)

    return decode
