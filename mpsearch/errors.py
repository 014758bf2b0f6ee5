"""The one error that is the user's to mend: the command line prints it as a sentence and ends with exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something that came from the user is wrong: what came, what is allowed, what to do."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ " Did you mean 'w4'?" for a near match among `known`, else what there is to choose from."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if near:
        return " Did you mean " + " or ".join(f"'{name}'" for name in near) + "?"
    return " There is: " + ", ".join(known) + "."
