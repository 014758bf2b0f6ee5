"""What a run left out to end in time: a sentence in its folder."""

from __future__ import annotations

from pathlib import Path

from mpsearch.files import read_regular, write_atomically

FILE = "left_out.txt"


def write_left_out(folder: Path, sentence: str) -> None:
    """Keep the sentence; an empty one replaces that of an interrupted run."""
    if sentence or (folder / FILE).exists():
        write_atomically(folder / FILE, sentence)


def read_left_out(folder: Path) -> list[str]:
    """The sentence; none where nothing was left out."""
    file = folder / FILE
    return [text] if file.exists() and (text := read_regular(file).decode("utf-8", "replace").strip()) else []
