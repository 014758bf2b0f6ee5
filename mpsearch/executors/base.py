"""The contract of the executors: where allocations are scored on the search split, in this process or in many.

Each worker builds the model once and keeps its weight bank; what travels is an allocation, and the score that comes
back. Scores do not depend on where they are measured as long as the threads of an evaluation are the same (`threads`), and the
search tells its trials in the order in which it proposed them, so that every executor finds the same front.
"""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Protocol

import torch

from mpsearch.allocation import Allocation
from mpsearch.errors import check_integer
from mpsearch.evaluation import Score
from mpsearch.progress import quiet


class Scorer(Protocol):
    """What a worker holds: a `QuantEngine`, or anything that scores allocations."""

    def score(self, allocation: Allocation, split: str = "search") -> Score:
        """The allocation's score; see `QuantEngine.score`."""


Make = Callable[[], Scorer]


class Executor(ABC):
    """Used in a `with` block after `start`; `workers` is how many evaluations it runs at a time.

    Args:
        threads: of PyTorch for each evaluation; `None` leaves what PyTorch takes. The last bits of a score depend on it.
    """

    workers: int

    def __init__(self, threads: int | None = 1) -> None:
        if threads is not None:
            check_integer("executor.threads", threads)
        self.threads = threads

    @abstractmethod
    def start(self, engine: Scorer, make: Make) -> None:
        """Be ready to submit. `engine` is this process's own, `make` (picklable) builds another one like it elsewhere."""

    @abstractmethod
    def submit(self, allocation: Allocation) -> Future[Score]:
        """Its score on the search split, where it stands when it is done. A worker that dies is replaced, its work done again."""

    @abstractmethod
    def close(self) -> None:
        """Let the workers go, if there are any; what they still do is dropped. Also where it was never started."""

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def made_in_worker(make: Make, threads: int | None) -> Scorer:
    """A worker's own engine; what building it says is not its user's to read."""
    set_threads(threads)
    with quiet(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        return make()


def set_threads(threads: int | None) -> None:
    """PyTorch's threads in this process."""
    if threads is not None:
        torch.set_num_threads(threads)
