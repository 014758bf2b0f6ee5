"""Language modelling: next-token prediction, measured as perplexity over windows of tokens.

Texts are dealt out to the splits whole, so that no text is in two of them; the texts of a split are joined and cut into windows.
The tokens of a text depend on one another, adjacent windows too: the independent samples of an interval are the texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpsearch.errors import InputError
from mpsearch.intervals import FEWEST
from mpsearch.tasks.arrays import read_arrays
from mpsearch.tasks.base import SPLITS, Batch, StoredTask, in_batches

# Of a token's cross-entropy; a broken model's is infinite or NaN, and this is what a float64's exp still holds.
MOST_NATS = 700.0
# A split of one text has no independent samples. Blocks of adjacent tokens stand in for them: few, so that they are long, and
# fewer than the texts that an interval needs not to be marked approximate.
N_BLOCKS = FEWEST - 1


class Language(StoredTask):
    """Windows of token ids int64 [n, window] and the ids that follow each, int64 [n * window].

    `texts` are token ids, one array a text, shuffled with `seed` and dealt out until each split has its windows; the confirm
    split takes all that are left where `n_confirm` is `None`. Raises `InputError` where the texts are too few.
    """

    quality_name = "perplexity"
    quality_kind = "perplexity"

    def __init__(
        self,
        texts: Sequence[np.ndarray],
        n_calibration: int,
        n_search: int,
        n_confirm: int | None,
        window: int,
        seed: int = 0,
        batch_size: int = 16,
        source: str = "the texts",
    ) -> None:
        if window < 2:
            raise InputError(f"window is {window}; it must be at least 2 tokens.")
        order = np.random.default_rng(seed).permutation(len(texts))
        lengths = np.array([len(texts[i]) for i in order])
        self.window, self._source = window, source
        self._n_texts: dict[str, int] = {}
        self._clusters: dict[str, Tensor] = {}
        batches: dict[str, list[Batch]] = {}
        start = 0
        for split, n in zip(SPLITS, (n_calibration, n_search, n_confirm), strict=True):
            if n is not None and n < 1:
                raise InputError(f"n_{split} is {n}; every split needs at least 1 window.")
            ends = lengths[start:].cumsum()
            left = max(int(ends[-1]) - 1, 0) // window if len(ends) else 0
            n = left if n is None else n
            if n > left or left == 0:
                raise InputError(
                    f"{source} have {left:,} windows of {window:,} tokens left for the {split} split, n_{split}={n:,} were asked "
                    "for. Ask for fewer or shorter ones."
                )
            taken = int(np.searchsorted(ends, n * window + 1)) + 1
            ids = np.concatenate([texts[i] for i in order[start : start + taken]])[: n * window + 1].astype(np.int64)
            x, y = (torch.from_numpy(part).view(n, window) for part in (ids[:-1], ids[1:]))
            batches[split] = [(inputs, targets.flatten()) for inputs, targets in in_batches(batch_size, x, y)]
            self._n_texts[split] = taken
            texts_of_tokens = np.repeat(np.arange(taken), lengths[start : start + taken])[1 : n * window + 1]
            blocks = np.arange(n * window) * min(N_BLOCKS, n * window) // (n * window)
            self._clusters[split] = torch.from_numpy(texts_of_tokens if len(np.unique(texts_of_tokens)) > 1 else blocks)
            start += taken
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
        return model(inputs).flatten(0, 1)

    def quality(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of each token in nats, float32 [windows * window]; NaN and what is larger count `MOST_NATS`."""
        nats = F.cross_entropy(logits.float(), targets, reduction="none")
        return nats.nan_to_num(nan=MOST_NATS).clamp(max=MOST_NATS)

    def clusters(self, split: str) -> Tensor:
        """The text of each predicted token, int64 [windows * window]; in a split of one text, `N_BLOCKS` blocks of it."""
        return self._clusters[split]

    def describe(self, split: str) -> str:
        """As in "64 windows of 256 tokens from 37 stories"."""
        n = sum(len(x) for x, _ in self.batches(split))
        return f"{n:,} windows of {self.window} tokens from {self._n_texts[split]} of {self._source}"


class Stories(Language):
    """TinyStories, as tokens of the `stories260k` model: `tokens_dev.npz` (`tokens` integers [n]) in `data_dir`."""

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
    ) -> None:
        path = Path(data_dir).expanduser() / "tokens_dev.npz"
        tokens = read_tokens(path)
        stories = np.split(tokens, np.flatnonzero(tokens == self.BEGIN)[1:])
        sizes = (n_calibration, n_search, n_confirm)
        super().__init__(stories, *sizes, window=window, seed=seed, batch_size=batch_size, source=f"the stories in {path.name}")


def read_tokens(path: Path) -> np.ndarray:
    """The array `tokens` (integers [n], none below 0) of an `.npz` file, or an `InputError`."""
    (tokens,) = read_arrays(path, "tokens")
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer) or not len(tokens) or tokens.min() < 0:
        raise InputError(f"tokens in {path} is {tokens.dtype} {list(tokens.shape)}; it must be integers [n], from 0 up.")
    return tokens
