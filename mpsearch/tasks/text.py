"""Language modelling on the user's own text, with the tokenizer of a Hugging Face folder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from mpsearch.errors import InputError
from mpsearch.tasks.language import Language
from mpsearch.tasks.records import TABLES, decoded, load_tokenizer, read_columns
from mpsearch.tasks.sources import named_files, read_once

SUFFIXES = (".txt", ".md", *TABLES)
PARAGRAPH = re.compile(r"\n[ \t]*\n")


class Text(Language):
    """Next-token prediction on windows of the user's text: perplexity, and the KL divergence from the float model.

    The texts are dealt out to the splits whole, in an order drawn with `seed`. A text is a record of a table (`records.TABLES`),
    or a `.txt` or `.md` file of a folder; of a single `.txt` or `.md` file it is a run of paragraphs of at least a window.

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
        Windows that run at a time; `None`: as many as have 512 tokens.
    field
        The field of a record that holds its text.
    calibration_data, search_data, confirm_data
        Another file or folder for this split; it may serve several.

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
        batch_size: int | None = None,
        field: str = "text",
        calibration_data: str | Path | None = None,
        search_data: str | Path | None = None,
        confirm_data: str | Path | None = None,
    ) -> None:
        source = Path(path).expanduser()
        encode = partial(load_tokenizer(tokenizer, "task=text"), verbose=False)

        def read(path: Path) -> list[np.ndarray]:
            texts = list(read_texts(path, field))
            if len(texts) == 1:
                return _joined([encode(part, add_special_tokens=False)["input_ids"] for part in _paragraphs(texts[0])], window)
            return [ids for ids in (np.array(encode(text)["input_ids"], dtype=np.int64) for text in texts) if len(ids)]

        files = named_files((calibration_data, search_data, confirm_data), source)
        texts = read_once(files, read)
        super().__init__(
            [],
            n_calibration,
            n_search,
            n_confirm,
            window=window,
            seed=seed,
            batch_size=batch_size,
            source=" and ".join(file.name for file in texts),
            named={split: texts[file] for split, file in files.items()},
        )


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
        if file.suffix in TABLES:
            yield from read_columns(file, {field: "task.field"})[field]
        else:
            yield decoded(file)


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
