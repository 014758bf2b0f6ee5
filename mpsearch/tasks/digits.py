"""Handwritten digits, 8x8 pixels, from the installed scikit-learn: the task that needs no download.

The images are read from scikit-learn's data file, so scikit-learn itself (a second or more of imports) stays unloaded. Which
images belong to which split is stored with the weights of `models/digits.py`, which never saw the search and confirm images.
"""

from __future__ import annotations

import importlib.util
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from mpsearch.errors import InputError
from mpsearch.tasks.base import SPLITS
from mpsearch.tasks.classification import Classification, draw_splits

N_IMAGES = 1797
LARGEST_PIXEL = 16.0  # gray values are counts 0..16 of dark cells in 4x4 blocks of the scanned digit


class Digits(Classification):
    """1,797 images float32 [n, 1, 8, 8] in 0..1, ten classes.

    400 images to search on, 400 to confirm on; `n_calibration` (at most 997) are drawn with `seed` from those that the
    digits model was trained on.
    """

    def __init__(self, n_calibration: int = 500, seed: int = 0, batch_size: int = 200, max_drop: float | None = 0.02) -> None:
        self.max_drop = max_drop
        pixels, labels = read_digits()
        indices = read_split()
        trained_on = indices["train"]
        drawn = draw_splits(len(trained_on), {"calibration": n_calibration}, seed, "The training part of the digits")
        parts = (trained_on[drawn["calibration"]], indices["search"], indices["confirm"])
        x, y = torch.from_numpy(pixels), torch.from_numpy(labels)
        calibration, search, confirm = ((x[part], y[part]) for part in parts)
        origins = dict(zip(SPLITS, ("digits (training part)", "digits (search part)", "digits (confirm part)"), strict=True))
        super().__init__(calibration, search, confirm, n_classes=10, batch_size=batch_size, origins=origins)


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """All images, float32 [1797, 1, 8, 8] in 0..1, and labels, int64 [1797], in the order of scikit-learn's file."""
    package = importlib.util.find_spec("sklearn")
    folders = (package.submodule_search_locations or []) if package else []
    paths = [Path(folder) / "datasets" / "data" / "digits.csv.gz" for folder in folders]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise InputError("The digits come with scikit-learn, which is not installed. Run: pip install scikit-learn")
    table = np.loadtxt(path, delimiter=",", dtype=np.float32)
    if table.shape != (N_IMAGES, 65):
        raise InputError(f"{path} has shape {list(table.shape)} instead of [{N_IMAGES}, 65]. Install scikit-learn again.")
    return table[:, :64].reshape(-1, 1, 8, 8) / np.float32(LARGEST_PIXEL), table[:, 64].astype(np.int64)


def read_split() -> dict[str, torch.Tensor]:
    """Indices int64 into the images: `train` [997], `search` [400], `confirm` [400]."""
    source = resources.files("mpsearch.models") / "digits.safetensors"
    with resources.as_file(source) as path, safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(f"split.{name}").long() for name in ("train", "search", "confirm")}
