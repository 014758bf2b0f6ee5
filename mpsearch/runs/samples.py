"""`confirmed/`: what each sample of the confirm split scored at each confirmed point, so that runs are compared in pairs.

A file holds two arrays as `numpy.save` writes them, float32 `[n]` each, the samples' qualities and their losses, and the SHA-256
of these bytes. A point without a readable file has no paired intervals; nothing else depends on it.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpsearch.allocation import Allocation
from mpsearch.evaluation import LATER, Evaluation, Score
from mpsearch.files import file_errors, read_regular, write_atomically
from mpsearch.quality import Quality

FOLDER = "confirmed"
MOST_SAMPLES = 2**18  # of a file, 2 MiB; of larger splits none is written
DIGEST_BYTES = 32
ROUNDING = 1e-5  # of the mean of float32 values

Samples = tuple[NDArray[np.float32], NDArray[np.float32]]  # qualities, losses


class SampleFiles:
    """The files of the run in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / FOLDER

    def path(self, allocation: Allocation, origin: str) -> Path:
        """Where the samples of an evaluation lie; refined and trained weights have a file of their own."""
        return self.folder / f"{allocation.id}{f'_{origin}' if origin in LATER else ''}.npy"

    def write(self, allocation: Allocation, origin: str, score: Score) -> None:
        """Write the samples of a score on the confirm split, unless there are more than `MOST_SAMPLES`."""
        if max(len(score.qualities), len(score.losses)) > MOST_SAMPLES:
            return
        with file_errors(self.folder):
            self.folder.mkdir(exist_ok=True)
        content = io.BytesIO()
        for values in (score.qualities, score.losses):
            np.save(content, values.astype(np.float32), allow_pickle=False)
        digest = hashlib.sha256(content.getvalue()).digest()
        write_atomically(self.path(allocation, origin), content.getvalue() + digest)

    def read(self, evaluation: Evaluation, quality: Quality) -> Samples | None:
        """The samples of an evaluation on the confirm split.

        `None` where the file is missing or damaged, or holds other values than those that the evaluation is the mean of.
        """
        file = self.path(evaluation.allocation, evaluation.origin)
        if not file.is_file() or file.stat().st_size > 2 * 4 * MOST_SAMPLES + 2**10:
            return None
        content = read_regular(file)
        if hashlib.sha256(content[:-DIGEST_BYTES]).digest() != content[-DIGEST_BYTES:]:
            return None
        stream = io.BytesIO(content[:-DIGEST_BYTES])
        try:
            qualities, losses = (np.load(stream, allow_pickle=False) for _ in range(2))
        except (ValueError, EOFError, MemoryError):
            return None
        if any(x.dtype != np.float32 or x.ndim != 1 or not len(x) or not np.isfinite(x).all() for x in (qualities, losses)):
            return None
        means = quality.score(float(qualities.mean(dtype=np.float64))), float(losses.mean(dtype=np.float64))
        is_of_it = np.allclose(means, (evaluation.quality, evaluation.loss), rtol=ROUNDING, atol=1e-9)
        return (qualities, losses) if is_of_it else None
