"""A run: its folder, with append-only tables, and the record that is read from it.

`space.json` says what was searched, on which model and data; a run whose identity differs is not resumed. `sensitivity.csv` and
`evaluations.csv` grow by complete rows that are on disk before the next measurement begins. A row that a kill cut short (no line
end) is dropped; any other change is an error: every file that is read back has a checksum.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpsearch.allocation import Allocation, SearchSpace
from mpsearch.divergence import SoftmaxKL
from mpsearch.errors import InputError, run_option
from mpsearch.evaluation import FINETUNED, LATER, REFINED, Evaluation, SensitivityTable
from mpsearch.files import locked, read_regular, write_atomically
from mpsearch.files.csv_rows import Row, append_row, drop_incomplete_row, read_rows
from mpsearch.optimize.pareto import non_dominated
from mpsearch.quality import Quality
from mpsearch.runs.evaluation_rows import SCORED, EvaluationReader, evaluation_columns, evaluation_row
from mpsearch.runs.space_json import read_identity, read_space, write_identity
from mpsearch.schemes.base import QuantScheme

SENSITIVITY_COLUMNS = ("group", "scheme", "metric", "value", "size_bits")


class RunFolder:
    """The files of a run at `path`; one process at a time may write."""

    def __init__(self, path: Path | str, *, is_held: bool = False) -> None:
        self.path, self.is_held = Path(path), is_held

    @contextmanager
    def locked(self) -> Iterator[None]:
        """The folder is this process's while the block runs; `InputError` where another one writes to it.

        Where the caller holds the lock already (`is_held`), nothing happens.
        """
        with nullcontext() if self.is_held else locked(self.path):
            yield

    def identify(self, identity: Mapping[str, Any]) -> None:
        """Write `space.json`, or raise `InputError` where the one of the folder differs."""
        file = self.path / "space.json"
        if not file.exists():
            write_identity(file, identity)
            return
        recorded = self.read_identity()
        for key, value in json.loads(json.dumps(identity)).items():
            if recorded.get(key) != value:
                raise InputError(
                    f"The run folder {self.path} belongs to another run: it has another {key.replace('_', ' ')}"
                    f"{_difference(recorded.get(key), value)}. Start a new run, or give back what it was started with."
                )

    def read_identity(self) -> dict[str, Any]:
        """The contents of `space.json`."""
        file = self.path / "space.json"
        if not file.exists():
            raise InputError(f"{self.path} is not a run folder: it has no space.json. Give the folder that a search printed.")
        return read_identity(file)

    def recorder(self, space: SearchSpace, quality_name: str, costs: Sequence[str]) -> Callable[[Evaluation], None]:
        """A function that adds an evaluation to `evaluations.csv`."""
        return lambda evaluation: self.append("evaluations", evaluation_row(evaluation, space, quality_name, costs))

    def append(self, table: str, row: Mapping[str, Any]) -> None:
        """Add one row to `<table>.csv`; it is on disk when this returns."""
        append_row(self.path / f"{table}.csv", row)

    def drop_incomplete_row(self, table: str) -> None:
        """Cut off a last row that was not written to its end."""
        drop_incomplete_row(self.path / f"{table}.csv")

    def read_sensitivity(self, space: SearchSpace, metric: str) -> dict[tuple[str, str], float]:
        """(group, scheme) -> value, as far as measured."""
        known: dict[tuple[str, str], float] = {}
        bits = dict(zip(space.names, space.storage_bits.tolist(), strict=True))

        def parse(row: Row) -> None:
            pair = row.one_of("group", space.names), row.one_of("scheme", space.scheme_names)
            if pair in known:
                raise row.damage("scheme", "a group and scheme that no earlier row has")
            row.one_of("metric", [metric])
            row.one_of("size_bits", [str(bits[pair[0]][space.scheme_names.index(pair[1])])])
            known[pair] = row.number("value", -np.inf, infinite=True, nan=True)

        if (file := self.path / "sensitivity.csv").exists():
            read_rows(file, SENSITIVITY_COLUMNS, parse)
        return known

    def write_effects(self, effects: NDArray[np.float32]) -> None:
        """Write `effects.npy`: `SensitivityTable.effects`, followed by the SHA-256 of these bytes."""
        content = io.BytesIO()
        np.save(content, effects, allow_pickle=False)
        write_atomically(self.path / "effects.npy", content.getvalue() + hashlib.sha256(content.getvalue()).digest())

    def read_effects(self, space: SearchSpace) -> NDArray[np.float32] | None:
        """`SensitivityTable.effects`, float32 `[n, n_groups, n_schemes]`; `None` where the run has none."""
        file = self.path / "effects.npy"
        if not file.exists():
            return None
        content = read_regular(file)
        try:
            if hashlib.sha256(content[:-32]).digest() != content[-32:]:
                raise ValueError("it does not end with its SHA-256")
            effects: NDArray[np.float32] = np.load(io.BytesIO(content[:-32]), allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise InputError(f"{file} is damaged: {error}. Delete it, and it is measured again.") from None
        if effects.dtype != np.float32 or effects.shape[1:] != space.allowed.shape or not np.isfinite(effects).all():
            raise InputError(
                f"{file} is of another run: got {effects.dtype} {list(effects.shape)} for {len(space.names)} groups and "
                f"{len(space.scheme_names)} schemes. Delete it, and it is measured again."
            )
        return effects

    def read_evaluations(self, space: SearchSpace, quality: Quality, costs: Sequence[str] = ()) -> list[Evaluation]:
        """All evaluations so far, in the order in which they were made; `costs` are the columns in addition to the size."""
        file = self.path / "evaluations.csv"
        if not file.exists():
            return []
        return read_rows(file, evaluation_columns(quality.name, costs), EvaluationReader(space, quality, costs))


@dataclass(frozen=True)
class Run:
    """The record of a run; immutable.

    `evaluations` holds every split in the order measured; `budgets` are the limits by cost. `objectives` are the columns of the
    one or two costs that the front weighs against the loss, `costs` those in addition to the size. `identity` is what
    `space.json` says.
    """

    space: SearchSpace
    quality_name: str
    evaluations: Sequence[Evaluation]
    sensitivity: SensitivityTable
    budgets: Mapping[str, float] = field(default_factory=dict)
    identity: Mapping[str, Any] = field(default_factory=dict)
    objectives: Sequence[str] = ("size_bytes",)
    costs: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("evaluations", "objectives", "costs"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @classmethod
    def load(cls, folder: Path | str, schemes: Mapping[str, QuantScheme] | None = None) -> Run:
        """From a run's folder; `schemes` are needed only where some are not our own classes."""
        run = RunFolder(folder)
        identity = run.read_identity()
        space = read_space(identity["space"], schemes, run.path / "space.json")
        quality = Quality(identity["quality_name"], identity.get("quality_kind", "share"))
        metric, costs = identity["metric"], identity.get("costs", [])
        known = run.read_sensitivity(space, metric["name"])
        if len(known) < space.allowed.sum():
            raise InputError(
                f"{run.path / 'sensitivity.csv'} holds {len(known)} of {space.allowed.sum()} rows: the run was interrupted, or "
                f"the file cut. Resume it: mpsearch search {run_option(run.path)}."
            )
        values = np.array([[known.get((g, s), np.inf) for s in space.scheme_names] for g in space.names])
        effects = run.read_effects(space)
        return cls(
            space,
            quality.name,
            run.read_evaluations(space, quality, costs),
            SensitivityTable(metric["name"], metric["unit"], values, space, metric.get("exact", False), effects),
            identity.get("budgets", {}),
            identity,
            identity.get("objectives", ["size_bytes"]),
            costs,
        )

    @property
    def quality(self) -> Quality:
        """The quality and how it is read."""
        return Quality(self.quality_name, self.identity.get("quality_kind", "share"))

    @property
    def loss_label(self) -> str:
        """The loss and its unit, as in "softmax KL (nats)"."""
        divergence = self.identity.get("divergence", {"label": SoftmaxKL.label, "unit": SoftmaxKL.unit})
        return f"{divergence['label']} ({divergence['unit']})"

    @property
    def max_drop(self) -> float:
        """The largest drop of the quality that counts as none."""
        return self.identity.get("max_drop", self.quality.max_drop)

    @property
    def exporter(self) -> str:
        """The exporter whose files the run's runtime opens."""
        return str(self.identity.get("exporter", "native"))

    def baseline(self, split: str = "search") -> Evaluation | None:
        """The float model's evaluation."""
        return next((e for e in self.evaluations if e.origin == "float" and e.split == split), None)

    def confirmed(self, point: Evaluation) -> Evaluation | None:
        """The evaluation of a point on the confirm split, with the trained weights where the point has these."""
        return (self.finetuned("confirm") if point.origin == FINETUNED else self.on("confirm")).get(point.allocation)

    @property
    def baselines(self) -> dict[str, Evaluation]:
        """Split -> the float model's evaluation, where there is one."""
        return {split: baseline for split in SCORED if (baseline := self.baseline(split)) is not None}

    def on(self, split: str) -> dict[Allocation, Evaluation]:
        """Allocation -> its evaluation on the split with the weights that an export has: refined where they are kept.

        Otherwise it is the first one. The float model's and the finetuned ones are left out.
        """
        first: dict[Allocation, Evaluation] = {}
        for evaluation in self.evaluations:
            if evaluation.split == split and evaluation.origin not in ("float", *LATER):
                first.setdefault(evaluation.allocation, evaluation)
        kept = self.refined("search").keys() if split != "search" else ()
        refined = self.refined(split)
        # Where refined weights are kept, no evaluation of others stands for them.
        return {a: e for a, e in first.items() if a not in kept or a in refined} | refined

    def refined(self, split: str) -> dict[Allocation, Evaluation]:
        """Allocation -> its evaluation on the split with refined weights, where these are kept.

        They are kept where their loss on the search split is lower than that of the quantizer's weights.
        """
        measured = [e for e in self.evaluations if e.origin == REFINED]
        before: dict[Allocation, float] = {}
        if measured:
            for e in self.evaluations:
                if e.split == "search" and e.origin not in LATER:
                    before.setdefault(e.allocation, e.loss)
        kept = {e.allocation for e in measured if e.split == "search" and e.loss < before.get(e.allocation, np.inf)}
        return {e.allocation: e for e in measured if e.split == split and e.allocation in kept}

    @cached_property
    def unrefined(self) -> Run:
        """The run as it was before anything was refined."""
        return replace(self, evaluations=tuple(e for e in self.evaluations if e.origin != REFINED))

    def finetuned(self, split: str) -> dict[Allocation, Evaluation]:
        """Allocation -> its latest evaluation on the split after training."""
        return {e.allocation: e for e in self.evaluations if e.origin == FINETUNED and e.split == split}

    @cached_property
    def front(self) -> tuple[Evaluation, ...]:
        """Of the accepted feasible evaluations on the search split the non-dominated ones (costs, loss), cheapest first.

        Accepted are the uniform allocations, additive solutions, and the proposals that have been shown to be better than the
        additive solution of their costs (`mpsearch.pipeline.accept`).
        """
        accepted = {e.allocation for e in self.evaluations if e.split == "search" and e.accepted and e.origin not in LATER}
        measured = [e for a, e in self.on("search").items() if a in accepted and e.feasible and np.isfinite(e.loss)]
        points = [[*(e.cost(column) for column in self.objectives), e.loss] for e in measured]
        keep = non_dominated(np.array(points).reshape(-1, 1 + len(self.objectives)))
        front = (e for e, kept in zip(measured, keep, strict=True) if kept)
        return tuple(sorted(front, key=lambda e: [e.cost(column) for column in self.objectives]))

    @property
    def uniform(self) -> list[tuple[str, Evaluation]]:
        """(scheme, evaluation on the search split) of the uniform allocations, smallest first."""
        measured = self.on("search")
        uniform = [(s, measured[a]) for s in self.space.scheme_names if (a := self.space.uniform(s)) in measured]
        return sorted(uniform, key=lambda pair: pair[1].size_bytes)


def _difference(recorded: Any, given: Any) -> str:
    if isinstance(recorded, dict) and isinstance(given, dict):
        return f" in {', '.join(sorted(key for key in {*recorded, *given} if recorded.get(key) != given.get(key)))}"
    texts = (text if len(text := str(value)) <= 40 else f"{text[:12]}…" for value in (recorded, given))
    return f" ({' there, '.join(texts)} here)"
