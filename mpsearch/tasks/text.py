"""Language modelling on the user's own text, with the tokenizer of a Hugging Face folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mpsearch.errors import InputError
from mpsearch.tasks.language import Language
from mpsearch.tasks.records import TABLES, decoded, load_tokenizer, read_columns
from mpsearch.tasks.sources import named_files, read_once

SUFFIXES = (".txt", ".md", *TABLES)
PARAGRAPH, LINE = re.compile(r"\n[ \t]*\n"), re.compile(r"\n")
SHARES = 10  # a text with more than one of so many equal shares of all characters is cut: each split gets a part of it


class Text(Language):
    """Next-token prediction on windows of the user's text: perplexity, and the KL divergence from the float model.

    The texts are dealt out to the splits whole, in an order drawn with `seed`. A text is a record of a table (`records.TABLES`),
    or a `.txt` or `.md` file. One with more than a tenth of all characters, such as a single file, is cut: into runs of
    paragraphs of at least a window, or of lines where a paragraph is longer than that, or of tokens where a line is.

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
            longest = sum(map(len, texts)) / SHARES
            parts = (_runs(text, encode, window) if len(text) > longest else [encode(text)["input_ids"]] for text in texts)
            return [np.array(ids, dtype=np.int64) for part in parts for ids in part if ids]

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


def _pieces(text: str, end: re.Pattern[str]) -> list[str]:
    """`text` cut behind each match of `end`, without blank pieces."""
    ends = [match.end() for match in end.finditer(text)]
    pieces = [text[start:stop] for start, stop in zip([0, *ends], [*ends, len(text)], strict=True)]
    return [piece for piece in pieces if piece.strip()]


def _runs(text: str, encode: Callable[..., Any], window: int) -> list[list[int]]:
    """The tokens of adjacent paragraphs, joined until each run has a window and the token after it; the last may be shorter."""
    runs: list[list[int]] = [[]]
    for paragraph in _pieces(text, PARAGRAPH):
        ids = encode(paragraph, add_special_tokens=False)["input_ids"]
        lines = [ids]
        if len(ids) > window:
            lines = [encode(line, add_special_tokens=False)["input_ids"] for line in _pieces(paragraph, LINE)]
        for part in (line[start : start + window] for line in lines for start in range(0, len(line), window)):
            if len(runs[-1]) > window:
                runs.append([])
            runs[-1].extend(part)
    return runs
