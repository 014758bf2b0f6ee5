"""Pairs of texts with a score of their similarity, compared by their embeddings: Spearman's rank correlation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpsearch.errors import InputError
from mpsearch.tasks.base import StoredTask, check_batch_size
from mpsearch.tasks.records import encoded_batches, load_tokenizer, read_columns
from mpsearch.tasks.sources import default_sizes, draw_by_source, named_files, read_once
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
        Pairs of each split, multiples of `batch_size`; `None`: see `sources.default_sizes`.
    max_length
        Tokens to which a text is cut.
    pooling
        The embedding of a text: "mean" of the last hidden states of its tokens, or that of its first token, "cls".
    calibration_data, search_data, confirm_data
        Another table for this split; it may serve several.

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
        calibration_data: str | Path | None = None,
        search_data: str | Path | None = None,
        confirm_data: str | Path | None = None,
    ) -> None:
        if pooling not in POOLINGS:
            raise InputError(f"task.pooling must be one of {', '.join(POOLINGS)}; got '{pooling}'.")
        check_batch_size(batch_size)
        self.pooling = pooling
        files = named_files((calibration_data, search_data, confirm_data), Path(path).expanduser())
        options = {first: "task.first", second: "task.second", score: "task.score"}
        tables = read_once(files, lambda file: read_columns(file, options))
        gold = {file: _scores(table[score].to_numpy(), file, score) for file, table in tables.items()}
        lengths = {file: len(table) for file, table in tables.items()}
        sizes = default_sizes(files, lengths, (n_calibration, n_search, n_confirm), batch_size)
        if bad := next((split for split, size in sizes.items() if not size or size % batch_size), None):
            raise InputError(
                f"n_{bad} is {sizes[bad]:,} of {lengths[files[bad]]:,} pairs; it must be a multiple of batch_size, {batch_size}, "
                "above 0."
            )
        encode = load_tokenizer(tokenizer, "task=text_pairs")
        batches = {}
        for split, index in draw_by_source(files, lengths, sizes, seed).items():
            columns = [tables[files[split]][name].to_numpy() for name in (first, second)]
            texts = {str(i): [str(column[row]) for row in index] for i, column in enumerate(columns)}
            targets = gold[files[split]][torch.from_numpy(index)]
            encoded = encoded_batches(encode, texts, targets, batch_size, max_length)
            batches[split] = [((inputs["0"], inputs["1"]), scores) for inputs, scores in encoded]
        StoredTask.__init__(self, batches, {split: file.name for split, file in files.items()})

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
