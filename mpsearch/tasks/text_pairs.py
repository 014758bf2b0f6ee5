"""Pairs of texts with a score of their similarity, compared by their embeddings: Spearman's rank correlation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpsearch.errors import InputError
from mpsearch.tasks.base import SPLITS, StoredTask, check_batch_size
from mpsearch.tasks.classification import draw_splits
from mpsearch.tasks.records import encoded_batches, load_tokenizer, read_columns
from mpsearch.tasks.stsb import LARGEST_SCORE, TEMPERATURE, STSBenchmark

POOLINGS = ("mean", "cls")


class TextPairs(STSBenchmark):
    """Rows of a table with two texts and a score, dealt out to the splits in an order drawn with `seed`; see `STSBenchmark`.

    Parameters
    ----------
    path
        A table (`records.TABLES`).
    tokenizer
        A folder of Hugging Face transformers.
    first, second, score
        Columns.
    n_calibration, n_search, n_confirm
        Pairs of each split, multiples of `batch_size`; `None`: a third.
    max_length
        Tokens to which a text is cut.
    pooling
        The embedding of a text: "mean" of the last hidden states of its tokens, or that of its first token, "cls".

    Raises
    ------
    InputError
        The file, a column or the tokenizer is absent, a score is no number, or there are too few rows.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: str | Path,
        first: str = "sentence1",
        second: str = "sentence2",
        score: str = "score",
        n_calibration: int | None = None,
        n_search: int | None = None,
        n_confirm: int | None = None,
        seed: int = 0,
        batch_size: int = 32,
        max_length: int = 256,
        pooling: str = "mean",
    ) -> None:
        if pooling not in POOLINGS:
            raise InputError(f"task.pooling must be one of {', '.join(POOLINGS)}; got '{pooling}'.")
        check_batch_size(batch_size)
        source, self.pooling = Path(path).expanduser(), pooling
        table = read_columns(source, {first: "task.first", second: "task.second", score: "task.score"})
        gold = _scores(table[score].to_numpy(), source, score)
        asked = dict(zip(SPLITS, (n_calibration, n_search, n_confirm), strict=True))
        third = len(table) // len(SPLITS) // batch_size * batch_size
        sizes = {split: third if size is None else size for split, size in asked.items()}
        if bad := next((split for split, size in sizes.items() if size % batch_size or not size), None):
            raise InputError(
                f"n_{bad} is {sizes[bad]:,} of {len(table):,} pairs; it must be a multiple of batch_size, {batch_size}, above 0."
            )
        encode = load_tokenizer(tokenizer, "task=text_pairs")
        columns = {name: [str(value) for value in table[name]] for name in (first, second)}
        batches = {}
        for split, index in draw_splits(len(table), sizes, seed, source.name).items():
            texts = {str(i): [column[row] for row in index] for i, column in enumerate(columns.values())}
            encoded = encoded_batches(encode, texts, gold[torch.from_numpy(index)], batch_size, max_length)
            batches[split] = [((inputs["0"], inputs["1"]), targets) for inputs, targets in encoded]
        StoredTask.__init__(self, batches, dict.fromkeys(SPLITS, source.name))

    def forward(self, model: nn.Module, inputs: Any) -> Tensor:
        """Cosine similarities of each first text with all second ones over the temperature, `[n, n]`."""
        first, second = (F.normalize(self._embeddings(model(**texts), texts["attention_mask"]), dim=-1) for texts in inputs)
        return first @ second.T / TEMPERATURE

    def _embeddings(self, output: Any, mask: Tensor) -> Tensor:
        """`[n, features]`, from the last hidden states `[n, tokens, features]`."""
        hidden = getattr(output, "last_hidden_state", None)
        if hidden is None:
            raise InputError(
                f"task=text_pairs needs a model that returns last_hidden_state; got a {type(output).__name__}. Give "
                "model.head=none."
            )
        if self.pooling == "cls":
            return hidden[:, 0]
        weights = mask[..., None].to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)


def _scores(values: np.ndarray, source: Path, column: str) -> Tensor:
    """float32 `[n]`, scaled to 0…`LARGEST_SCORE`, which leaves their ranks as they are."""
    try:
        scores = values.astype(np.float64)
    except (TypeError, ValueError):
        scores = np.array([np.nan])
    if not np.isfinite(scores).all() or np.ptp(scores) == 0:
        raise InputError(f"The column '{column}' of {source} must hold numbers that differ. Set task.score.")
    return torch.from_numpy(LARGEST_SCORE * (scores - scores.min()) / np.ptp(scores)).float()
