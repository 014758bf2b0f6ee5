"""Classification of texts of a table, with the tokenizer of a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import torch

from mpsearch.tasks.makers import DataTask
from mpsearch.tasks.records import class_numbers, encoded_batches, load_tokenizer, read_columns
from mpsearch.tasks.sources import default_sizes, draw_by_source, named_files, read_once


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
        Texts of each split; `None`: see `sources.default_sizes`.
    max_length
        Tokens to which a text is cut.
    calibration_data, search_data, confirm_data
        Another table for this split; it may serve several.

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
        calibration_data: str | Path | None = None,
        search_data: str | Path | None = None,
        confirm_data: str | Path | None = None,
    ) -> None:
        files = named_files((calibration_data, search_data, confirm_data), Path(path).expanduser())
        tables = read_once(files, lambda file: read_columns(file, {text: "task.text", label: "task.label"}))
        encode = load_tokenizer(tokenizer, "task=text_classification")
        folder = Path(tokenizer).expanduser()
        classes = {file: class_numbers(table[label].to_numpy(), folder, file) for file, table in tables.items()}
        lengths = {file: len(table) for file, table in tables.items()}
        sizes = default_sizes(files, lengths, (n_calibration, n_search, n_confirm))
        splits = {}
        for split, index in draw_by_source(files, lengths, sizes, seed).items():
            column, targets = tables[files[split]][text].to_numpy(), classes[files[split]][torch.from_numpy(index)]
            encoded = encoded_batches(encode, {"text": [str(column[i]) for i in index]}, targets, batch_size, max_length)
            splits[split] = [(inputs["text"], numbers) for inputs, numbers in encoded]
        super().__init__(splits, labelled=True, divergence="softmax_kl")
