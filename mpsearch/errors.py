"""The one error that is the user's to mend: the command line prints it as a sentence and ends with exit code 2."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterable
from pathlib import Path


class InputError(ValueError):
    """Something that came from the user is wrong: what came, what is allowed, what to do."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ " Did you mean 'w4'?" for a near match among `known`, else what there is to choose from."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if near:
        return " Did you mean " + " or ".join(f"'{name}'" for name in near) + "?"
    return " There is: " + ", ".join(known) + "."


def run_option(folder: Path) -> str:
    """`run=FOLDER` as a shell takes it, relative where it lies below the working directory."""
    here = Path.cwd()
    text = str(folder.relative_to(here) if folder.is_relative_to(here) else folder)
    return shlex.quote(f"run=./{text}" if text.startswith("~") or text == "null" else f"run={text}")
