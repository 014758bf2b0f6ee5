"""A sample of ImageNet: JPEG files end to end in one `.npz`, decoded by Pillow.

Small (one picture a class), for trying a network out and measuring it, not for accuracy claims: those need the validation set.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpsearch.errors import InputError
from mpsearch.tasks.arrays import read_arrays
from mpsearch.tasks.base import SPLITS
from mpsearch.tasks.classification import Classification, draw_splits

FILE = "images_even.npz"
N_CLASSES = 1000


class ImageNetSample(Classification):
    """Images float32 [n, 3, 224, 224], `(x - mean) / std` of pixels 0..255, and class numbers 0..999.

    `data_dir` holds `images_even.npz`: `jpeg` uint8, all files end to end; `offsets` [n + 1], where each begins; `label` [n]. The
    three splits are drawn from them with `seed`; confirm takes all that are left where `n_confirm` is `None`. Raises `InputError`
    for sizes and files that are not so, and without Pillow.
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
    ) -> None:
        path = Path(data_dir).expanduser() / FILE
        jpeg, offsets, labels = read_arrays(path, "jpeg", "offsets", "label")
        if jpeg.dtype != np.uint8 or len(offsets) != len(labels) + 1 or (np.diff(offsets) <= 0).any() or offsets[-1] > len(jpeg):
            raise InputError(
                f"{path} holds no JPEG files end to end: jpeg uint8, offsets rising [n + 1] and label [n] are needed."
            )
        n = len(labels)
        n_confirm = n - n_calibration - n_search if n_confirm is None else n_confirm
        drawn = draw_splits(n, dict(zip(SPLITS, (n_calibration, n_search, n_confirm), strict=True)), seed, FILE)
        decode = _decoder()
        parts = [
            (
                torch.stack([(decode(jpeg[offsets[i] : offsets[i + 1]], f"picture {i} of {path}") - mean) / std for i in index]),
                torch.from_numpy(labels[index].astype(np.int64)),
            )
            for index in drawn.values()
        ]
        origins = dict.fromkeys(SPLITS, "ImageNet, one picture a class")
        calibration, search, confirm = parts
        super().__init__(calibration, search, confirm, n_classes=N_CLASSES, batch_size=batch_size, origins=origins)


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
