"""Finished trials, written into an Optuna storage that optuna-dashboard opens: a mirror, from which nothing is ever read back.

One write for each parameter of each trial would take a database longer than the trial did, so that an allocation is one user
attribute, a letter a group, as in `evaluations.csv`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import optuna

from mpsearch.allocation import SearchSpace
from mpsearch.errors import InputError
from mpsearch.evaluation import Evaluation


class Mirror:
    """The study `name` in the storage at `url` ("sqlite:///trials.db", "postgresql://..."); `InputError` where none answers.

    It is called with each trial that is told, in their order; those that a former process wrote are left as they are.
    """

    def __init__(self, url: str, name: str, space: SearchSpace, columns: Sequence[str]) -> None:
        self.space = space
        try:
            self._study = optuna.create_study(
                storage=url, study_name=name, directions=["minimize"] * (1 + len(columns)), load_if_exists=True
            )
            self._study.set_metric_names(["log10 loss", *columns])
            self._written = len(self._study.get_trials(deepcopy=False))
        except Exception as error:  # of whichever database it is
            what = " ".join(str(error).split())[:200]
            raise InputError(
                f"study.mirror={url} cannot be opened ({type(error).__name__}: {what}). Give the address of a database, as "
                "sqlite:///trials.db, or null."
            ) from error
        self._seen = 0
        self._write: Callable[[optuna.trial.FrozenTrial], None] = self._study.add_trial

    def __call__(self, trial: optuna.trial.FrozenTrial, evaluation: Evaluation) -> None:
        """Write it; a storage that fails on the way is named once, and the search goes on without it."""
        self._seen += 1
        if self._seen <= self._written:
            return
        attributes = {
            "allocation": self.space.encode(evaluation.allocation),
            "origin": evaluation.origin,
            "quality": evaluation.quality,
            "average_bits": evaluation.average_bits,
            "n_samples": evaluation.n_samples,
        }
        values = None if evaluation.stopped else trial.values
        try:
            self._write(optuna.create_trial(state=trial.state, values=values, user_attrs=attributes))
        except Exception as error:
            self._write = lambda trial: None
            what = " ".join(str(error).split())[:200]
            warnings.warn(f"The mirror failed and is left behind at trial {evaluation.trial}: {what}", stacklevel=2)
