"""Errors that the user can correct: the command line prints them as a sentence and ends with exit code 2."""

from __future__ import annotations

import difflib
import errno
import re
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """A value, file or model that the user gave is wrong; the message says what it got, what it expected, and what to do."""


class InfeasibleBudget(InputError):  # noqa: N818 (it is caught, and reads so)
    """No allocation is within the budgets."""


# The messages of PyTorch's allocators, on a CPU and on a GPU, in a RuntimeError.
_NO_MEMORY = re.compile(r"not enough memory|(can't|cannot|failed to) allocate|out of memory", re.IGNORECASE)


def check_memory(error: BaseException) -> None:
    """Raise `InputError` where this error says that memory ran out, so that no handler takes it for another mistake."""
    is_os = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if isinstance(error, MemoryError) or is_os or (isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error))):
        said = " ".join(str(error).split())[:200]
        raise InputError(
            f"Memory ran out{said and f' ({said})'}. Lower the task's batch size, memory.max_bytes or the executor's "
            "workers; what was measured is kept."
        ) from error


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn an error that says that memory ran out into an `InputError`."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        check_memory(error)
        raise


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ " Did you mean 'w4'?" for a near match among `known`, else what there is to choose from."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if near:
        return " Did you mean " + " or ".join(f"'{name}'" for name in near) + "?"
    return " There is: " + ", ".join(known) + "."


def run_option(folder: Path) -> str:
    """`run=FOLDER` as a shell takes it, relative where it lies below the working directory."""
    text = str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder)
    return shlex.quote(f"run=./{text}" if text.startswith("~") or text == "null" else f"run={text}")


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Raise `InputError` where the argument `name` is none of `choices`."""
    if value not in list(choices):
        raise InputError(f"{name} must be one of {', '.join(map(str, choices))}; got {value!r}.")


def check_integer(name: str, value: object, low: int = 1, high: int | None = None, hint: str = "") -> None:
    """Raise `InputError`, which ends with `hint`, where `name` is not an integer from `low` to `high` (`None`: no limit)."""
    if type(value) is not int or value < low or (high is not None and value > high):
        expected = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise InputError(f"{name} must be an integer {expected}; got {value!r}.{hint}")


def check_flag(name: str, value: object) -> None:
    """Raise `InputError` where the argument `name` is neither true nor false."""
    if type(value) is not bool:
        raise InputError(f"{name} must be true or false; got {value!r}.")


def one_line(error: object) -> str:
    """The text of an error without line breaks, or its class where it has no text."""
    return " ".join(str(error).split()) or type(error).__name__
