"""Which file the samples of a split come from, and which of them: the files that the user names, and shares of one file.

A task with files takes `calibration_data`, `search_data` and `confirm_data`: a file (of texts also a folder) for that split,
`None` for the task's own. Splits from one file share it and no sample is in two of them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from mpsearch.errors import InputError
from mpsearch.progress import say_once
from mpsearch.tasks.base import SPLITS
from mpsearch.tasks.classification import draw_splits

DEFAULT_SIZES = {"calibration": 256, "search": 512, "confirm": 1024}  # at most, where a size is not given

Source = TypeVar("Source", bound=Hashable)
Data = TypeVar("Data")


def named_file(split: str, given: str | Path | None, folder: Path) -> Path | None:
    """The file that the user names for a split, also by its name in the data's `folder`; `InputError` where it is absent."""
    if given is None:
        return None
    paths = [Path(given).expanduser(), folder / given]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        looked = " and ".join(map(str, dict.fromkeys(paths)))
        raise InputError(f"There is no data file for the {split} split: looked for {looked}. Set task.{split}_data to a file.")
    return path.resolve()


def named_files(given: Sequence[str | Path | None], default: Path) -> dict[str, Path]:
    """The file of each split: the one that is `given`, also by its name in the folder of the `default`, or else the default."""
    named = {split: named_file(split, file, default.parent) for split, file in zip(SPLITS, given, strict=True)}
    return {split: (file or default).resolve() for split, file in named.items()}


def read_once(sources: Mapping[str, Source], read: Callable[[Source], Data]) -> dict[Source, Data]:
    """What `read` gives of each source of the splits."""
    return {source: read(source) for source in dict.fromkeys(sources.values())}


def default_sizes(
    sources: Mapping[str, Source], lengths: Mapping[Source, int], given: Sequence[int | None], multiple: int = 1
) -> dict[str, int | None]:
    """The `given` size of each split, or `DEFAULT_SIZES`, at most an equal share of its source; all defaults a `multiple`.

    The user is told what an interval of so many confirm samples will be like.
    """
    sizes = dict(zip(SPLITS, given, strict=True))
    for split, size in sizes.items():
        if size is None:
            share = lengths[sources[split]] // sum(sources[other] == sources[split] for other in SPLITS)
            sizes[split] = min(DEFAULT_SIZES[split], share) // multiple * multiple
    if (n := sizes["confirm"]) and given[-1] is None:
        more = "; more: task.n_confirm=…" if lengths[sources["confirm"]] > sum(size or 0 for size in sizes.values()) else ""
        say_once(
            f"{sizes['calibration']:,} samples calibrate, {sizes['search']:,} score proposals and {n:,} confirm: an accuracy "
            f"near 50 % is then known to ±{98 / n**0.5:.1f} points, a drop more exactly{more}."
        )
    return sizes


def draw_by_source(
    sources: Mapping[str, Source],
    lengths: Mapping[Source, int],
    sizes: Mapping[str, int | None],
    seed: int,
    rest: str = "",
    first: str = "",
) -> dict[str, np.ndarray]:
    """Indices int64 of each split into the samples of its source, disjoint where splits share one.

    Parameters
    ----------
    sources, lengths, sizes
        The source of each split, the number of samples of each source, and of each split, `None`: an equal share of the source.
    rest
        The split whose size of `None` is what the other splits of its source leave.
    first
        The same of a split that, where it shares its source with no other, is the first samples of it, in their order.

    Raises
    ------
    InputError
        A size is below 1, or a source has too few samples.
    """
    drawn: dict[str, np.ndarray] = {}
    for source in dict.fromkeys(sources.values()):
        asked = {split: sizes[split] for split in SPLITS if sources[split] == source}
        for split in asked.keys() & {rest, first}:
            if asked[split] is None:
                asked[split] = lengths[source] - sum(size or 0 for size in asked.values())
        indices = draw_splits(lengths[source], asked, seed, _name(source))
        drawn |= {first: np.arange(len(indices[first]))} if list(asked) == [first] else indices
    return drawn


def _name(source: Hashable) -> str:
    return " and ".join(map(str, source)) if isinstance(source, tuple) else str(source)
