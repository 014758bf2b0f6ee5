"""Finished trials, written into an Optuna storage that optuna-dashboard opens: a mirror, from which nothing is ever read back.

A database takes a write for each parameter of each trial, so that this is done in a thread of its own: the search does not wait.
"""

from __future__ import annotations

import math
import queue
import threading
import time
import warnings
from collections import deque
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.trial import TrialState

from mpsearch.allocation import SearchSpace
from mpsearch.errors import InputError
from mpsearch.evaluation import Evaluation
from mpsearch.samplers.optuna_sampler import distributions

PATIENCE = 60.0  # seconds for a slow database to take what is left when the search is done


class Mirror:
    """The study `name` in the storage at `url` ("sqlite:///trials.db", "postgresql://..."); `InputError` where none answers.

    It is called with each trial that is told, in their order, in a `with` block; those that a former process wrote are left as
    they are, and must be the same: `InputError`. Groups with one choice are no parameters. What a storage refuses is tried again
    with the next trial, at the end, and when the run is resumed with the mirror.
    """

    def __init__(self, url: str, name: str, space: SearchSpace, columns: Sequence[str]) -> None:
        self.url, self.name, self.space, self.columns = url, name, space, columns
        free = {group: choices for group, choices in zip(space.names, space.choices, strict=True) if len(choices) > 1}
        self._distributions = distributions(list(free), list(free.values()))
        try:
            try:
                self._open(columns)
            except Exception:  # of two runs that make the tables at once, one is refused
                time.sleep(1)
                self._open(columns)
        except Exception as error:  # of whichever database it is
            raise InputError(
                f"study.mirror={url} cannot be opened ({_told(error)}). Give the address of a database, as "
                "sqlite:///trials.db, or null."
            ) from error
        self._seen = 0
        self._queue: queue.SimpleQueue[optuna.trial.FrozenTrial | None] = queue.SimpleQueue()
        self._error: Exception | None = None
        self._warned = False
        self._writer = threading.Thread(target=self._write, daemon=True)  # a database that hangs keeps no process alive

    def _open(self, columns: Sequence[str]) -> None:
        self._storage = optuna.storages.RDBStorage(self.url)
        self._study = optuna.create_study(
            storage=self._storage, study_name=self.name, directions=["minimize"] * (1 + len(columns)), load_if_exists=True
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study.set_metric_names(["log10 loss", *columns])
        self._known = [trial.user_attrs.get("allocation") for trial in self._study.get_trials(deepcopy=False)]

    def __enter__(self) -> Mirror:
        self._writer.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._queue.put(None)
        self._writer.join(PATIENCE)
        self._storage.engine.dispose()  # closes its connections
        if self._error or self._writer.is_alive():
            why = _told(self._error) if self._error else "it is slow"
            warnings.warn(
                f"Not all trials are in the mirror ({why}); resume with study.mirror= for the rest.",
                stacklevel=2,
            )

    def __call__(self, evaluation: Evaluation) -> None:
        """Have a trial written; a storage that fails is named once, and the search continues."""
        code = self.space.encode(evaluation.allocation)
        self._seen += 1
        if self._seen <= len(self._known):
            if code != self._known[self._seen - 1]:
                raise InputError(
                    f"The study '{self.name}' in study.mirror={self.url} is of another run. Delete it there, or go on with "
                    "run= and another database, or with study.mirror=null."
                )
            return
        attributes = {
            "allocation": code,
            "origin": evaluation.origin,
            "quality": evaluation.quality,
            "average_bits": evaluation.average_bits,
            "n_samples": evaluation.n_samples,
        }
        values = evaluation.objectives(self.columns)
        failed = math.isnan(values[0])
        self._queue.put(
            optuna.create_trial(
                state=TrialState.FAIL if failed else TrialState.COMPLETE,
                values=None if failed else values,
                params={group: evaluation.allocation[group] for group in self._distributions},
                distributions=self._distributions,
                user_attrs=attributes,
            )
        )
        if self._error and not self._warned:
            self._warned = True
            warnings.warn(f"The mirror does not take trials, the search goes on: {_told(self._error)}", stacklevel=2)

    def _write(self) -> None:
        """In the thread: all that is there, in order."""
        left: deque[optuna.trial.FrozenTrial] = deque()
        trial = self._queue.get()
        while trial is not None:
            left.append(trial)
            if self._queue.empty():
                self._error = self._write_all(left)
            trial = self._queue.get()
        self._error = self._write_all(left)

    def _write_all(self, left: deque[optuna.trial.FrozenTrial]) -> Exception | None:
        try:
            while left:
                self._study.add_trial(left[0])
                left.popleft()
        except Exception as error:
            return error
        return None


def _told(error: BaseException) -> str:
    error = error.__cause__ or error  # the database's own words, where Optuna has others round them
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
