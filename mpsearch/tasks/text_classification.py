"""Classification of texts of a table, with the tokenizer of a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mpsearch.errors import InputError, did_you_mean
from mpsearch.tasks.base import SPLITS
from mpsearch.tasks.classification import draw_splits
from mpsearch.tasks.makers import DataTask
from mpsearch.tasks.records import encoded_batches, load_tokenizer, read_columns


class TextClassification(DataTask):
    """Rows of a table with a text and its class, dealt out to the splits in an order drawn with `seed`: accuracy.

    Parameters
    ----------
    path
        A table (`records.TABLES`).
    tokenizer
        A folder of Hugging Face transformers; its `config.json` numbers the classes that have names (`label2id`).
    text, label
        Columns. Labels are integers from 0 or names.
    n_calibration, n_search, n_confirm
        Texts of each split; `None`: a third.
    max_length
        Tokens to which a text is cut.

    Raises
    ------
    InputError
        The file, a column, a class or the tokenizer is absent, or there are too few rows.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: str | Path,
        text: str = "text",
        label: str = "label",
        n_calibration: int | None = None,
        n_search: int | None = None,
        n_confirm: int | None = None,
        seed: int = 0,
        batch_size: int = 32,
        max_length: int = 256,
    ) -> None:
        source = Path(path).expanduser()
        table = read_columns(source, {text: "task.text", label: "task.label"})
        encode = load_tokenizer(tokenizer, "task=text_classification")
        classes = class_numbers(table[label].to_numpy(), Path(tokenizer).expanduser(), source)
        sizes = dict(zip(SPLITS, (n_calibration, n_search, n_confirm), strict=True))
        texts = [str(value) for value in table[text]]
        splits = {
            split: [
                (inputs["text"], targets)
                for inputs, targets in encoded_batches(
                    encode, {"text": [texts[i] for i in index]}, classes[torch.from_numpy(index)], batch_size, max_length
                )
            ]
            for split, index in draw_splits(len(table), sizes, seed, source.name).items()
        }
        super().__init__(splits, labelled=True, divergence="softmax_kl")


def class_numbers(labels: np.ndarray, folder: Path, source: Path) -> Tensor:
    """int64 `[n]`: integers as they are, names by `label2id` of the folder's `config.json`."""
    if np.issubdtype(labels.dtype, np.integer):
        return torch.from_numpy(labels.astype(np.int64))
    file = folder / "config.json"
    numbers = json.loads(file.read_text(encoding="utf-8")).get("label2id") if file.is_file() else None
    known = {str(name): int(number) for name, number in (numbers or {}).items()}
    for name in map(str, labels):
        if name not in known:
            listed = ", ".join(list(known)[:8]) or "none"
            near = did_you_mean(name, list(known))
            raise InputError(
                f"{source} has the label '{name}', which label2id of {file} lacks; it has {listed}.{near} Give those names, "
                "or integers from 0."
            )
    return torch.tensor([known[str(name)] for name in labels])
