"""Compare finished runs: read them from their folders, name them by what differs, and write the comparison."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpsearch.errors import InputError
from mpsearch.reporting.comparison import Compared, compare
from mpsearch.runs.run import Run
from mpsearch.runs.samples import SampleFiles
from mpsearch.runs.verified import read_verified

MAX_PARTS = 3  # settings in a name
TARGET = "._target_"


def compared(folders: Sequence[Path], target: Path, settings: Sequence[Mapping[str, Any]]) -> Path:
    """Write the comparison of the runs in `folders` to `target`; returns the path of `comparison.md`.

    `settings` are those that each run was made with. Raises `InputError` where a folder holds no finished run, or the runs cannot
    be compared.
    """
    if len(folders) < 2:
        raise InputError(f"Give two runs or more to compare; got {len(folders)}.")
    runs = [opened(folder) for folder in folders]
    return compare(dict(zip(names(folders, settings), runs, strict=True)), target)


def opened(folder: Path) -> Compared:
    """A finished run, with what its files measure in runtimes and the samples of its confirmed points."""
    run = Run.load(folder)
    return Compared(run, read_verified(folder, run.quality), SampleFiles(folder))


def names(folders: Sequence[Path], settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """A name for each run: the folder's, or, of the numbered folders of a sweep, the settings in which the runs differ."""
    common = os.path.commonpath([str(folder.absolute()) for folder in folders])
    short = [os.path.relpath(folder.absolute(), common) for folder in folders]
    if not all(name.isdigit() for name in short):
        return short
    flat = [dict(_flat(each)) for each in settings]
    keys = dict.fromkeys(key for each in flat for key in each)
    differing = [key for key in keys if len({str(each.get(key)) for each in flat}) > 1]
    classes = [key.removesuffix(TARGET) for key in differing if key.endswith(TARGET)]
    told = [key for key in differing if key.endswith(TARGET) or not key.startswith(tuple(f"{name}." for name in classes))]
    named = [", ".join(_setting(key, each.get(key)) for key in told[:MAX_PARTS]) for each in flat]
    return named if len(set(named)) == len(named) else [f"#{i} {name}".strip() for i, name in zip(short, named, strict=True)]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The plain values by dotted keys."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _setting(key: str, value: Any) -> str:
    """ "seed 1", or the class of a choice: "sampler FrontSampler"."""
    return f"{key.removesuffix(TARGET)} {str(value).rpartition('.')[2] if key.endswith(TARGET) else value}"
