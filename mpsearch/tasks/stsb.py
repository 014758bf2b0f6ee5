"""The STS benchmark (Cer et al. 2017): how alike in meaning two sentences are, by people (0 to 5) and by their embeddings.

The quality is Spearman's rank correlation of the two. The logits, on which a quantized model is compared with the float one, are
what the encoder was trained on: each first sentence's similarities with all second sentences of its batch over a temperature of
0.05 (all-MiniLM-L6-v2's training scales cosines by 20), from which a softmax tells whose partner is whose.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor, nn

from mpsearch.errors import InputError
from mpsearch.tasks.arrays import read_arrays
from mpsearch.tasks.base import SPLITS, Batch, StoredTask, check_batch_size, in_batches
from mpsearch.tasks.sources import draw_by_source, named_file, read_once

TEMPERATURE = 0.05
LARGEST_SCORE = 5.0


class STSBenchmark(StoredTask):
    """Pairs of sentences as token ids int64 [n, length], filled up with 0, and the people's scores float32 [n].

    `data_dir` holds `sts_train.npz` and `sts_dev.npz` (`a`, `b` integers [n, length]; `gold` float [n]). Calibration and
    search pairs are drawn with `seed` from the former, the confirm split is the latter's first `n_confirm`, all where it is
    `None`. Within a split pairs are ordered by length, so that little is filled up. Every batch is full, for a row of logits has
    one for each of its batch: sizes are multiples of `batch_size`. `calibration_data`, `search_data` and `confirm_data` name
    other such files for these splits; a file may serve several. Raises `InputError` for sizes and files that are not so.
    """

    quality_name = "spearman"
    quality_kind = "number"
    divergence = "softmax_kl"

    def __init__(
        self,
        data_dir: str | Path,
        n_calibration: int = 200,
        n_search: int = 300,
        n_confirm: int | None = None,
        seed: int = 0,
        batch_size: int = 50,
        calibration_data: str | Path | None = None,
        search_data: str | Path | None = None,
        confirm_data: str | Path | None = None,
    ) -> None:
        check_batch_size(batch_size)
        folder = Path(data_dir).expanduser()
        given = zip(SPLITS, (calibration_data, search_data, confirm_data), ("train", "train", "dev"), strict=True)
        files = {split: named_file(split, name, folder) or (folder / f"sts_{part}.npz").resolve() for split, name, part in given}
        data = read_once(files, _read)
        lengths = {file: len(gold) for file, (_, _, gold) in data.items()}
        sizes = {"calibration": n_calibration, "search": n_search, "confirm": n_confirm}
        if n_confirm is None:
            left = lengths[files["confirm"]] - sum(size or 0 for split, size in sizes.items() if files[split] == files["confirm"])
            sizes["confirm"] = left // batch_size * batch_size
        drawn = draw_by_source(files, lengths, sizes, seed, first="confirm")
        parts = [[array[drawn[split]] for array in data[files[split]]] for split in SPLITS]
        batches: dict[str, list[Batch]] = {}
        for split, (a, b, gold) in zip(SPLITS, parts, strict=True):
            if len(gold) % batch_size:
                raise InputError(f"n_{split} is {len(gold):,}; it must be a multiple of batch_size, {batch_size}.")
            order = np.argsort((a != 0).sum(1) + (b != 0).sum(1), kind="stable")
            x, y, scores = (torch.from_numpy(array[order]) for array in (a.astype(np.int64), b.astype(np.int64), gold))
            batches[split] = in_batches(batch_size, (x, y), scores)
        super().__init__(batches, {split: file.stem.replace("sts_", "STS-B ") for split, file in files.items()})

    def forward(self, model: nn.Module, inputs: tuple[Tensor, Tensor]) -> Tensor:
        """Similarities of each first sentence with all second ones over the temperature, [n, n]."""
        first, second = (model(ids[:, : int((ids != 0).sum(1).max())]) for ids in inputs)
        return first @ second.T / TEMPERATURE

    def quality(self, logits: Tensor, targets: Tensor) -> Tensor:
        """What each pair adds to Spearman's rho: see `rho_parts`."""
        parts = rho_parts(_similarities(logits).cpu().numpy(), targets.cpu().numpy())
        return torch.from_numpy(parts).to(logits.device, torch.float32)

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Of the people's score as a share of 5 and each pair's cosine, both read as a chance of meaning the same."""
        chance = _similarities(logits).clamp(0.01, 0.99)
        return F.binary_cross_entropy(chance, targets / LARGEST_SCORE, reduction="none")


def rho_parts(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """float64 [n] whose mean is Spearman's rho of x and y [n], ties shared; of values that are all alike, 0.

    A part is rho plus the pair's influence on it, 12 (u v + E[V; X > x] + E[U; Y > y]) less the mean of that (Croux and Dehon
    2010, section 2), u and v the centred ranks from 0 to 1. To first order, resampling the parts is resampling the pairs, ranking
    and correlating them anew; resampling products of ranks would not be.
    """
    n = len(x)
    x = np.nan_to_num(x.astype(np.float64))
    u, v = ((rankdata(values) - 0.5) / n - 0.5 for values in (x, y))
    deviations = u.std() * v.std()
    if deviations == 0:
        return np.zeros(n)
    influence = u * v + _mean_above(x, v) + _mean_above(y, u)
    return (u * v).mean() / deviations + (influence - influence.mean()) / deviations


def _mean_above(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """For each i the mean over all j of weights[j] where x[j] > x[i], and of half of it where they are equal."""
    order = np.argsort(x)
    below = np.concatenate(([0.0], np.cumsum(weights[order])))
    left, right = (below[np.searchsorted(x[order], x, side)] for side in ("left", "right"))
    return (below[-1] - (left + right) / 2) / len(x)


def _similarities(logits: Tensor) -> Tensor:
    """The cosine of each pair [n] from logits [n, batch size] of whole batches, end to end."""
    rows = torch.arange(len(logits), device=logits.device)
    return logits[rows, rows % logits.shape[1]] * TEMPERATURE


def _read(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    a, b, gold = read_arrays(path, "a", "b", "gold")
    whole = all(ids.ndim == 2 and np.issubdtype(ids.dtype, np.integer) and (ids != 0).any(1).all() for ids in (a, b))
    if not whole or not len(a) == len(b) == len(gold) or gold.ndim != 1:
        raise InputError(
            f"{path} holds a {a.dtype} {list(a.shape)}, b {b.dtype} {list(b.shape)} and gold {list(gold.shape)}; they must be "
            "token ids [n, length], none of them empty, and n scores."
        )
    return a, b, gold.astype(np.float32)
