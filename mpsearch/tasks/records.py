"""Records of the user's files: columns of tables, and the tokenizer of a Hugging Face folder that encodes them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from mpsearch.errors import InputError, did_you_mean, one_line
from mpsearch.models.huggingface import check_folder, import_transformers
from mpsearch.tasks.base import check_batch_size

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model", "*tokenizer*")  # files of one
TABLES = (".jsonl", ".csv", ".tsv", ".parquet")


def read_columns(path: Path, columns: Mapping[str, str]) -> pd.DataFrame:
    """The rows of a table; `InputError` where it is absent or damaged, is empty, or lacks a column or a value of one.

    Parameters
    ----------
    path
        A file that ends in one of `TABLES`; of JSON lines each is an object.
    columns
        Column -> the option of the task that names it, or "".
    """
    if not path.is_file() or path.suffix not in TABLES:
        what = f"{path} ends in none of {', '.join(TABLES)}" if path.is_file() else f"There is no file {path}"
        raise InputError(f"{what}. Set task.path to a table with the columns {', '.join(columns)}.")
    try:
        if path.suffix == ".jsonl":
            table = pd.DataFrame(_objects(path))
        elif path.suffix == ".parquet":
            table = pd.read_parquet(path)
        else:
            table = pd.read_csv(path, sep="," if path.suffix == ".csv" else "\t")
    except InputError:
        raise
    except ImportError:
        raise InputError(f"{path} is read by the package pyarrow, which is not installed here: pip install pyarrow") from None
    except Exception as error:  # a damaged file can raise anything
        raise InputError(f"{path} cannot be read as a table ({path.suffix}): {one_line(error)}") from error
    has = [str(column) for column in table]
    for column, option in columns.items():
        if column not in has:
            hint = f" Set {option}.{did_you_mean(column, has)}" if option else did_you_mean(column, has)
            raise InputError(f"{path} has no column '{column}'; it has {', '.join(has)}.{hint}")
    table = table[list(columns)]
    if not len(table) or table.isna().any(axis=None):
        empty = int(table.isna().any(axis=1).sum())
        what = f"{empty:,} of {len(table):,} rows of {path} have an empty cell" if empty else f"{path} has no row"
        raise InputError(f"{what} in the columns {', '.join(columns)}. Give rows with all of them.")
    return table


def decoded(file: Path) -> str:
    """The text of a file; `InputError` where it is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}.") from None


def _objects(file: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(decoded(file).splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"Line {number} of {file} is not JSON: {one_line(error)}") from None
        if not isinstance(record, dict):
            raise InputError(f"Line {number} of {file} must be a JSON object; got a {type(record).__name__}.")
        yield record


def load_tokenizer(path: str | Path, what: str) -> Any:
    """The tokenizer of a Hugging Face folder or a GGUF file; `what` needs it.

    Raises
    ------
    InputError
        The folder has none that transformers can load without running its code, or transformers is not installed.
    """
    transformers = import_transformers(what)
    folder = Path(path).expanduser()
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if folder.suffix == ".gguf":
        folder, options["gguf_file"] = folder.parent, folder.name
    else:
        check_folder(folder)
        if not any(any(folder.glob(name)) for name in TOKENIZERS):
            raise InputError(
                f"{path} has no tokenizer (tokenizer.json). Copy it next to config.json, or set task.tokenizer to the folder "
                "that has it."
            )
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # whatever a damaged or an incomplete folder raises
        raise InputError(
            f"{path} has no tokenizer that transformers can load: {one_line(error)} Copy tokenizer.json next to config.json, or "
            "set task.tokenizer to the folder that has it."
        ) from error


def encoded_batches(
    tokenizer: Any, texts: Mapping[str, list[str]], targets: Tensor, batch_size: int, max_length: int
) -> list[tuple[dict[str, dict[str, Tensor]], Tensor]]:
    """Batches of texts of similar length, each padded to its longest.

    Parameters
    ----------
    texts
        Name -> texts `[n]`; the samples are ordered by their tokens in all of them.
    max_length
        Tokens to which a text is cut.

    Returns
    -------
    list of (inputs, targets)
        Name -> what the tokenizer gives (`input_ids`, `attention_mask`, … int64 `[batch, tokens]`), and the targets `[batch]`.
    """
    check_batch_size(batch_size)
    options = {"truncation": True, "max_length": max_length, "verbose": False}
    encoded = {name: dict(tokenizer(list(part), **options)) for name, part in texts.items()}
    lengths = sum(np.array([len(ids) for ids in columns["input_ids"]]) for columns in encoded.values())
    order = np.argsort(lengths, kind="stable")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    batches = []
    for begin in range(0, len(order), batch_size):
        index = order[begin : begin + batch_size]
        inputs = {}
        for name, columns in encoded.items():
            rows = {key: [values[i] for i in index] for key, values in columns.items()}
            inputs[name] = dict(tokenizer.pad(rows, return_tensors="pt", verbose=False))
        batches.append((inputs, targets[torch.from_numpy(index)]))
    return batches


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
