"""Language modelling on the user's own text, with the tokenizer of a Hugging Face folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from mpsearch.errors import InputError, one_line
from mpsearch.models.huggingface import check_folder, import_transformers
from mpsearch.tasks.base import Task
from mpsearch.tasks.language import Language

SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
PARAGRAPH = re.compile(r"\n[ \t]*\n")


class Text(Language):
    """Next-token prediction on windows of the user's text: perplexity, and the KL divergence from the float model.

    The texts are dealt out to the splits whole, in an order drawn with `seed`. A text is a record of a `.jsonl` or `.parquet`
    file, or a `.txt` or `.md` file of a folder; of a single `.txt` or `.md` file it is a run of paragraphs of at least a window.

    Parameters
    ----------
    path
        The file, or a folder that is searched for files with these endings.
    tokenizer
        A folder of Hugging Face transformers, or a GGUF file.
    n_calibration, n_search, n_confirm
        Windows of each split; `None` for `n_confirm`: all that are left.
    window
        Tokens of a window.
    batch_size
        Windows that run at a time.
    field
        The field of a record that holds its text.

    Raises
    ------
    InputError
        A file or a field is absent, a text cannot be read, or there are too few windows.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: str | Path,
        n_calibration: int = 16,
        n_search: int = 16,
        n_confirm: int | None = 32,
        window: int = 256,
        seed: int = 0,
        batch_size: int = 4,
        field: str = "text",
    ) -> None:
        source = Path(path).expanduser()
        texts = list(read_texts(source, field))
        encode = _encoder(Path(tokenizer).expanduser())
        if len(texts) == 1:
            ids = _joined([encode(part, add_special_tokens=False) for part in _paragraphs(texts[0])], window)
        else:
            ids = [np.array(encode(text), dtype=np.int64) for text in texts]
        sizes = (n_calibration, n_search, n_confirm)
        super().__init__(
            [text for text in ids if len(text)], *sizes, window=window, seed=seed, batch_size=batch_size, source=source.name
        )

    def forward(self, model: nn.Module, inputs: Tensor) -> Tensor:
        """Logits `[windows * window, vocabulary]`."""
        logits = Task.forward(self, model, inputs)
        return logits.flatten(0, 1)


def read_texts(path: Path, field: str = "text") -> Iterator[str]:
    """The texts of a file or a folder, in the order of their names; see `Text`."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        if not files:
            raise InputError(f"{path} holds no file that ends in {', '.join(SUFFIXES)}. Give a folder with texts, or a file.")
    elif path.is_file():
        files = [path]
    else:
        raise InputError(f"There is no text {path}. Set task.path to a file ({', '.join(SUFFIXES)}) or a folder of such files.")
    for file in files:
        if file.suffix == ".parquet":
            yield from _rows(file, field)
        elif file.suffix == ".jsonl":
            yield from _records(file, field)
        else:
            yield _decoded(file)


def _decoded(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}.") from None


def _records(file: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(_decoded(file).splitlines(), 1):
        if not line.strip():
            continue
        try:
            record: Any = json.loads(line)
        except ValueError as error:
            raise InputError(f"Line {number} of {file} is not JSON: {one_line(error)}") from None
        text = record.get(field) if isinstance(record, dict) else record
        if not isinstance(text, str):
            has = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise InputError(f"Line {number} of {file} has no text in the field '{field}'; it has {has}. Set task.field.")
        yield text


def _rows(file: Path, field: str) -> Iterator[str]:
    import pandas as pd

    try:
        table = pd.read_parquet(file)
    except ImportError:
        raise InputError(
            f"{file} is read by the package pyarrow, which is not installed here. Run: pip install pyarrow"
        ) from None
    except Exception as error:  # a damaged file can raise anything
        raise InputError(f"{file} cannot be read as parquet: {one_line(error)}") from error
    if field not in table:
        raise InputError(f"{file} has no column '{field}'; it has {', '.join(map(str, table))}. Set task.field.")
    yield from table[field].dropna().astype(str)


def _paragraphs(text: str) -> list[str]:
    """The paragraphs of a text, each with the blank line that follows it."""
    ends = [match.end() for match in PARAGRAPH.finditer(text)]
    parts = [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]
    return [part for part in parts if part.strip()]


def _joined(parts: list[list[int]], window: int) -> list[np.ndarray]:
    """Adjacent paragraphs joined until each run has a window and the token after it; the last run may be shorter."""
    runs: list[list[int]] = [[]]
    for part in parts:
        if len(runs[-1]) > window:
            runs.append([])
        runs[-1].extend(part)
    return [np.array(run, dtype=np.int64) for run in runs]


def _encoder(path: Path) -> Any:
    """A function from a text to its token ids, with those that the tokenizer puts around a text."""
    transformers = import_transformers("task=text")
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    folder = path
    if path.suffix == ".gguf":
        folder, options["gguf_file"] = path.parent, path.name
    else:
        check_folder(path)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # whatever a damaged or an incomplete folder raises
        raise InputError(
            f"{path} has no tokenizer that transformers can load: {one_line(error)} Copy tokenizer.json next to config.json, or "
            "set task.tokenizer to the folder that has it."
        ) from error
    return lambda text, **kwargs: tokenizer(text, verbose=False, **kwargs)["input_ids"]
