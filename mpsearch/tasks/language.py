"""Language modelling: next-token prediction, measured as perplexity over windows of tokens.

Texts are dealt out to the splits whole, so that no text is in two of them; the texts of a split are joined and cut into windows.
The tokens of a text depend on one another, adjacent windows too: the independent samples of an interval are the texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpsearch.batches import chunk_rows
from mpsearch.errors import InputError
from mpsearch.intervals import FEWEST
from mpsearch.tasks.arrays import read_arrays
from mpsearch.tasks.base import SPLITS, Batch, StoredTask, in_batches
from mpsearch.tasks.sources import named_files, read_once

# Of a token's cross-entropy; a broken model's is infinite or NaN, and this is what a float64's exp still holds.
MOST_NATS = 700.0
BATCH_TOKENS = 512
# A split of one text has no independent samples. Blocks of adjacent tokens stand in for them: few, so that they are long, and
# fewer than the texts that an interval needs not to be marked approximate.
N_BLOCKS = FEWEST - 1


class Language(StoredTask):
    """Windows of token ids int64 [n, window] and the ids that follow each, int64 [n * window].

    `texts` are token ids, one array a text, shuffled with `seed` and dealt out until each split has its windows; the confirm
    split takes all that are left where `n_confirm` is `None`. `named` are the texts of splits that have their own; splits with
    the same object share it. `batch_size` windows run at a time; `None`: as many as have `BATCH_TOKENS`, for a large vocabulary
    makes a logit of each token and word. Raises `InputError` where the texts are too few.
    """

    quality_name = "perplexity"
    quality_kind = "perplexity"
    quality_by_sample = True

    def __init__(
        self,
        texts: Sequence[np.ndarray],
        n_calibration: int,
        n_search: int,
        n_confirm: int | None,
        window: int,
        seed: int = 0,
        batch_size: int | None = 16,
        source: str = "the texts",
        named: Mapping[str, Sequence[np.ndarray]] | None = None,
    ) -> None:
        if window < 2:
            raise InputError(f"window is {window}; it must be at least 2 tokens.")
        batch_size = max(1, BATCH_TOKENS // window) if batch_size is None else batch_size
        self.window, self._source = window, source
        self._n_texts: dict[str, int] = {}
        self._clusters: dict[str, Tensor] = {}
        batches: dict[str, list[Batch]] = {}
        left_texts: dict[int, list[np.ndarray]] = {}  # of each list of texts, shuffled
        for split, n in zip(SPLITS, (n_calibration, n_search, n_confirm), strict=True):
            if n is not None and n < 1:
                raise InputError(f"n_{split} is {n}; every split needs at least 1 window.")
            own = (named or {}).get(split, texts)
            if id(own) not in left_texts:
                left_texts[id(own)] = [own[i] for i in np.random.default_rng(seed).permutation(len(own))]
            remaining = left_texts[id(own)]
            lengths = np.array([len(text) for text in remaining], dtype=np.int64)
            ends = lengths.cumsum()
            left = max(int(ends[-1]) - 1, 0) // window if len(ends) else 0
            n = left if n is None else n
            if n > left or left == 0:
                raise InputError(
                    f"{source} have {left:,} windows of {window:,} tokens left for the {split} split, n_{split}={n:,} were asked "
                    "for. Ask for fewer or shorter ones."
                )
            taken = int(np.searchsorted(ends, n * window + 1)) + 1
            ids = np.concatenate(remaining[:taken])[: n * window + 1].astype(np.int64)
            x, y = (torch.from_numpy(part).view(n, window) for part in (ids[:-1], ids[1:]))
            batches[split] = [(inputs, targets.flatten()) for inputs, targets in in_batches(batch_size, x, y)]
            self._n_texts[split] = taken
            texts_of_tokens = np.repeat(np.arange(taken), lengths[:taken])[1 : n * window + 1]
            blocks = np.arange(n * window) * min(N_BLOCKS, n * window) // (n * window)
            self._clusters[split] = torch.from_numpy(texts_of_tokens if len(np.unique(texts_of_tokens)) > 1 else blocks)
            del remaining[:taken]
        super().__init__(batches)

    def training(self, epoch: int, batch_size: int, seed: int) -> Iterator[Batch]:
        """The calibration split's texts, cut into windows at another place each epoch (one holds the end and the beginning)."""
        random = np.random.default_rng([seed, epoch])
        shift = int(random.integers(self.window))
        pairs = [torch.cat([batch[i].flatten() for batch in self.batches("calibration")]) for i in (0, 1)]
        x, y = (part.roll(shift).view(-1, self.window) for part in pairs)
        for index in torch.from_numpy(random.permutation(len(x))).split(batch_size):
            yield x[index], y[index].flatten()

    def forward(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Logits [windows * window, vocabulary]."""
        return super().forward(model, inputs).flatten(0, 1)

    def quality(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of each token in nats, float32 [windows * window]; NaN and what is larger count `MOST_NATS`."""
        nats = self.cross_entropy(logits, targets)
        return nats.nan_to_num(nan=MOST_NATS).clamp(max=MOST_NATS)

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Of each token in nats, float32 [windows * window]."""
        step = chunk_rows(logits)
        parts = zip(logits.split(step), targets.split(step), strict=True)
        return torch.cat([F.cross_entropy(y.float(), of_part, reduction="none") for y, of_part in parts])

    def clusters(self, split: str) -> Tensor:
        """The text of each predicted token, int64 [windows * window]; in a split of one text, `N_BLOCKS` blocks of it."""
        return self._clusters[split]

    def describe(self, split: str) -> str:
        """As in "64 windows of 256 tokens from 37 stories"."""
        n = sum(len(x) for x, _ in self.batches(split))
        return f"{n:,} windows of {self.window} tokens from {self._n_texts[split]} of {self._source}"


class Stories(Language):
    """TinyStories, as tokens of the `stories260k` model: `tokens_dev.npz` (`tokens` integers [n]) in `data_dir`.

    `calibration_data`, `search_data` and `confirm_data` name other such files for these splits; a file may serve several.
    """

    BEGIN = 1  # the token that begins each text

    def __init__(
        self,
        data_dir: str | Path,
        n_calibration: int = 64,
        n_search: int = 64,
        n_confirm: int | None = None,
        window: int = 256,
        seed: int = 0,
        batch_size: int = 16,
        calibration_data: str | Path | None = None,
        search_data: str | Path | None = None,
        confirm_data: str | Path | None = None,
    ) -> None:
        path = Path(data_dir).expanduser() / "tokens_dev.npz"
        files = named_files((calibration_data, search_data, confirm_data), path)
        stories = read_once(files, self._stories)
        super().__init__(
            [],
            n_calibration,
            n_search,
            n_confirm,
            window=window,
            seed=seed,
            batch_size=batch_size,
            source=f"the stories in {' and '.join(file.name for file in stories)}",
            named={split: stories[file] for split, file in files.items()},
        )

    @classmethod
    def _stories(cls, path: Path) -> list[np.ndarray]:
        tokens = read_tokens(path)
        return np.split(tokens, np.flatnonzero(tokens == cls.BEGIN)[1:])


def read_tokens(path: Path) -> np.ndarray:
    """The array `tokens` (integers [n], none below 0) of an `.npz` file, or an `InputError`."""
    (tokens,) = read_arrays(path, "tokens")
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer) or not len(tokens) or tokens.min() < 0:
        raise InputError(f"tokens in {path} is {tokens.dtype} {list(tokens.shape)}; it must be integers [n], from 0 up.")
    return tokens
