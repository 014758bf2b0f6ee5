"""All of a run, in its folder: append-only tables while it goes, and what they say when it is done.

`space.json` says what was searched, on which model and data; a folder whose identity differs is not gone on with.
`sensitivity.csv` and `evaluations.csv` grow by whole rows that are on disk before the next measurement begins. A row that a kill
cut short (no line end) is dropped; anything else that cannot be read is an error, never a guess.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mpsearch.allocation import Allocation, SearchSpace
from mpsearch.errors import InputError
from mpsearch.evaluation import FINETUNED, Evaluation, SensitivityTable
from mpsearch.files import append_durably, write_atomically
from mpsearch.layer import Activations, LayerGroup, LayerSpec
from mpsearch.pareto import non_dominated
from mpsearch.quality import Quality
from mpsearch.schemes.base import QuantScheme, scheme_from_fields

SENSITIVITY_COLUMNS = ("group", "scheme", "metric", "value", "size_bits")
ORIGINS = ("float", "uniform", "knapsack", "sampler", FINETUNED)
SCORED = ("search", "confirm")


class RunFolder:
    """The files of a run at `path`; one process at a time may write."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """The folder is this process's while the block runs; `InputError` where another one writes to it."""
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / ".lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError(f"Another process is at work in {self.path}. Wait for it, or start a run of its own.") from None
            yield

    def identify(self, identity: Mapping[str, Any]) -> None:
        """Write `space.json`, or compare with the one that is there."""
        file = self.path / "space.json"
        identity = json.loads(json.dumps(identity))
        if not file.exists():
            write_atomically(file, json.dumps(identity, indent=1) + "\n")
            return
        there = self.read_identity()
        for key, value in identity.items():
            if there.get(key) != value:
                raise InputError(
                    f"The run folder {self.path} belongs to another run: it has another {key.replace('_', ' ')}"
                    f"{_difference(there.get(key), value)}. Start a new run, or give back what it was started with."
                )

    def read_identity(self) -> dict[str, Any]:
        """The contents of `space.json`."""
        file = self.path / "space.json"
        try:
            identity = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(identity, dict) or not {"space", "quality_name", "metric"} <= set(identity):
                raise ValueError("keys are missing")
            return identity
        except FileNotFoundError:
            raise InputError(
                f"{self.path} is no run folder: it holds no space.json. Give the folder that a search printed."
            ) from None
        except ValueError as error:
            raise InputError(f"{file} is damaged ({error}). Restore it, or start a new run.") from None

    def recorder(self, space: SearchSpace, quality_name: str, costs: Sequence[str]) -> Callable[[Evaluation], None]:
        """What adds an evaluation to `evaluations.csv`."""
        return lambda evaluation: self.append("evaluations", evaluation_row(evaluation, space, quality_name, costs))

    def append(self, table: str, row: Mapping[str, Any]) -> None:
        """Add one row to `<table>.csv`, in one write, and wait until it is on disk."""
        file = self.path / f"{table}.csv"
        new = not file.exists() or file.stat().st_size == 0
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if new:
            writer.writerow(row.keys())
        writer.writerow(
            ["" if value is None else repr(float(value)) if isinstance(value, float) else value for value in row.values()]
        )
        append_durably(file, text.getvalue())

    def mend(self, table: str) -> None:
        """Cut off a last row that was not written to its end."""
        file = self.path / f"{table}.csv"
        if file.exists() and not (data := file.read_bytes()).endswith(b"\n"):
            os.truncate(file, data.rfind(b"\n") + 1)

    def rows(self, table: str, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
        """(line number, row) of `<table>.csv`; empty where the file is absent; `InputError` where it is damaged."""
        file = self.path / f"{table}.csv"
        if not file.exists():
            return []
        try:
            data = file.read_bytes()
            text = data[: data.rfind(b"\n") + 1].decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{file} is damaged: {error}. Restore it, or start a new run.") from None
        lines = list(csv.reader(io.StringIO(text)))
        if not lines:
            return []
        if tuple(lines[0]) != tuple(columns):
            raise InputError(f"{file} is damaged: its first line is not {','.join(columns)}. Restore it, or start a new run.")
        for number, line in enumerate(lines[1:], start=2):
            if len(line) != len(columns):
                raise damaged(file, number, f"{len(line)} values for {len(columns)} columns")
        return [(number, dict(zip(columns, line, strict=True))) for number, line in enumerate(lines[1:], start=2)]

    def read_sensitivity(self, space: SearchSpace, metric: str) -> dict[tuple[str, str], float]:
        """(group, scheme) -> value, of what was measured so far."""
        known = {}
        for number, row in self.rows("sensitivity", SENSITIVITY_COLUMNS):
            file = self.path / "sensitivity.csv"
            if row["group"] not in space.names or row["scheme"] not in space.schemes or row["metric"] != metric:
                raise damaged(file, number, f"no {metric} of a group and scheme of this run")
            known[row["group"], row["scheme"]] = _number(file, number, row["value"])
        return known

    def write_effects(self, effects: NDArray[np.float32]) -> None:
        """`effects.npy`: `SensitivityTable.effects`."""
        content = io.BytesIO()
        np.save(content, effects, allow_pickle=False)
        write_atomically(self.path / "effects.npy", content.getvalue())

    def read_effects(self, space: SearchSpace) -> NDArray[np.float32] | None:
        """What `write_effects` wrote; `None` where there are none."""
        file = self.path / "effects.npy"
        if not file.exists():
            return None
        try:
            effects: NDArray[np.float32] = np.load(file, allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise InputError(f"{file} is damaged ({error}). Delete it, and it is measured again.") from None
        if effects.dtype != np.float32 or effects.shape[1:] != space.allowed.shape or not np.isfinite(effects).all():
            raise InputError(
                f"{file} is of another run: {effects.dtype} {list(effects.shape)} for {len(space.names)} groups and "
                f"{len(space.scheme_names)} schemes. Delete it, and it is measured again."
            )
        return effects

    def read_evaluations(self, space: SearchSpace, quality_name: str, costs: Sequence[str] = ()) -> list[Evaluation]:
        """All evaluations so far, in the order in which they were made; `costs` are the columns beside the size."""
        file = self.path / "evaluations.csv"
        found: list[Evaluation] = []
        trials: set[tuple[str, int]] = set()
        for number, row in self.rows("evaluations", evaluation_columns(quality_name, costs)):
            try:
                found.append(
                    Evaluation(
                        trial=int(row["trial"]) if row["trial"] else None,
                        origin=_one_of(row["origin"], ORIGINS),
                        allocation=space.decode(row["allocation"]) if row["allocation"] else Allocation(),
                        split=_one_of(row["split"], SCORED),
                        loss=float(row["loss"]),
                        cross_entropy=float(row["cross_entropy"]),
                        quality=float(row[quality_name]),
                        quality_low=float(row[f"{quality_name}_low"]),
                        quality_high=float(row[f"{quality_name}_high"]),
                        size_bytes=int(row["size_bytes"]),
                        average_bits=float(row["average_bits"]),
                        fraction=float(row["fraction"]),
                        feasible=_one_of(row["feasible"], ("True", "False")) == "True",
                        n_samples=int(row["n_samples"]),
                        seconds=float(row["seconds"]),
                        packed=_one_of(row["packed"], ("True", "False")) == "True",
                        measured_ms=float(row["measured_ms"]) if row["measured_ms"] else None,
                        verified=_one_of(row["verified"], ("True", "False")) == "True",
                        costs={name: float(row[name]) for name in costs if row[name]},
                    )
                )
                _check_row(found[-1], space, trials)
            except ValueError as error:
                raise damaged(file, number, str(error)) from None
        return found


def evaluation_columns(quality_name: str, costs: Sequence[str] = ()) -> tuple[str, ...]:
    """The columns of `evaluations.csv`: the fields of `Evaluation`, the quality under its own name, each cost on its own."""
    return (*(f.name.replace("quality", quality_name) for f in fields(Evaluation) if f.name != "costs"), *costs)


def evaluation_row(evaluation: Evaluation, space: SearchSpace, quality_name: str, costs: Sequence[str] = ()) -> dict[str, Any]:
    """An evaluation as a row of `evaluations.csv`; the float model's allocation is empty, and its costs but the size."""
    values = {f.name: getattr(evaluation, f.name) for f in fields(Evaluation) if f.name != "costs"}
    values["allocation"] = space.encode(evaluation.allocation) if evaluation.allocation else ""
    of_costs = (evaluation.costs.get(name) for name in costs)
    return dict(zip(evaluation_columns(quality_name, costs), (*values.values(), *of_costs), strict=True))


@dataclass(frozen=True)
class SearchResult:
    """What a run found. `evaluations` holds every split; `budgets` are the limits by cost.

    `objectives` are the columns of the one or two costs that the front weighs against the loss, `costs` those beside the size.
    """

    space: SearchSpace
    quality_name: str
    evaluations: Sequence[Evaluation]
    sensitivity: SensitivityTable
    budgets: Mapping[str, float] = field(default_factory=dict)
    identity: Mapping[str, Any] = field(default_factory=dict)
    objectives: Sequence[str] = ("size_bytes",)
    costs: Sequence[str] = ()

    @classmethod
    def load(cls, folder: Path | str, schemes: Mapping[str, QuantScheme] | None = None) -> SearchResult:
        """From a run's folder; `schemes` are needed only where some are not our own classes."""
        run = RunFolder(folder)
        identity = run.read_identity()
        space = read_space(identity["space"], schemes, run.path / "space.json")
        metric, unit = identity["metric"]["name"], identity["metric"]["unit"]
        known = run.read_sensitivity(space, metric)
        pairs = int(space.allowed.sum())
        if len(known) < pairs:
            raise InputError(
                f"{run.path / 'sensitivity.csv'} holds {len(known)} of {pairs} rows: the run was interrupted, or the file cut. "
                f"Go on with: mpsearch search run={run.path}."
            )
        values = np.array([[known.get((g, s), np.inf) for s in space.scheme_names] for g in space.names])
        costs, objectives = identity.get("costs", []), identity.get("objectives", ["size_bytes"])
        evaluations = run.read_evaluations(space, identity["quality_name"], costs)
        table = SensitivityTable(metric, unit, values, space, identity["metric"].get("exact", False), run.read_effects(space))
        budgets = identity.get("budgets", {})
        return cls(space, identity["quality_name"], evaluations, table, budgets, identity, objectives, costs)

    @property
    def quality(self) -> Quality:
        """How the quality is read."""
        return Quality(self.quality_name, self.identity.get("quality_kind", "share"))

    def baseline(self, split: str = "search") -> Evaluation | None:
        """The float model's evaluation."""
        return next((e for e in self.evaluations if e.origin == "float" and e.split == split), None)

    @property
    def baselines(self) -> dict[str, Evaluation]:
        """Split -> the float model's evaluation, where there is one."""
        return {split: found for split in SCORED if (found := self.baseline(split)) is not None}

    def on(self, split: str) -> dict[Allocation, Evaluation]:
        """Allocation -> its (first) evaluation on the split, the float model's and the finetuned ones left out."""
        found: dict[Allocation, Evaluation] = {}
        for evaluation in self.evaluations:
            if evaluation.split == split and evaluation.origin not in ("float", FINETUNED):
                found.setdefault(evaluation.allocation, evaluation)
        return found

    def finetuned(self, split: str) -> dict[Allocation, Evaluation]:
        """Allocation -> its latest evaluation on the split after training."""
        return {e.allocation: e for e in self.evaluations if e.origin == FINETUNED and e.split == split}

    @cached_property
    def front(self) -> list[Evaluation]:
        """The non-dominated feasible evaluations on the search split (costs, loss), cheapest by the first objective first."""
        measured = [e for e in self.on("search").values() if e.feasible and np.isfinite(e.loss)]
        points = [[*(e.cost(column) for column in self.objectives), e.loss] for e in measured]
        keep = non_dominated(np.array(points).reshape(-1, 1 + len(self.objectives)))
        found = (e for e, kept in zip(measured, keep, strict=True) if kept)
        return sorted(found, key=lambda e: [e.cost(column) for column in self.objectives])

    @property
    def uniform(self) -> list[tuple[str, Evaluation]]:
        """(scheme, evaluation on the search split) of the uniform allocations, smallest first."""
        measured = self.on("search")
        found = [(s, measured[a]) for s in self.space.scheme_names if (a := self.space.uniform(s)) in measured]
        return sorted(found, key=lambda pair: pair[1].size_bytes)

    def to_frame(self) -> pd.DataFrame:
        """All evaluations, tidy: one row each, columns as in `evaluations.csv`."""
        rows = [evaluation_row(e, self.space, self.quality_name, self.costs) for e in self.evaluations]
        return pd.DataFrame(rows, columns=list(evaluation_columns(self.quality_name, self.costs)))


def read_space(
    data: Mapping[str, Any], schemes: Mapping[str, QuantScheme] | None = None, file: Path | str = "space.json"
) -> SearchSpace:
    """The space that `SearchSpace.to_dict` wrote."""
    try:
        if schemes is None:
            saved = {name: {k: v for k, v in fields.items() if k != "code"} for name, fields in data["schemes"].items()}
            schemes = {name: scheme_from_fields(fields) for name, fields in saved.items()}
        schemes = {name: schemes[name] for name in data["schemes"]}  # a runtime may have left some out
        groups = tuple(
            LayerGroup(
                g["name"],
                tuple(_read_layer(layer) for layer in g["layers"]),
            )
            for g in data["groups"]
        )
        return SearchSpace(groups, schemes, tuple(tuple(g["choices"]) for g in data["groups"]), data["other_bits"])
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file} is damaged ({type(error).__name__}: {error}). Restore it, or start a new run.") from None


def _read_layer(data: dict[str, Any]) -> LayerSpec:
    activations = Activations(**data["activations"]) if "activations" in data else None
    return LayerSpec(
        **{**data, "shape": tuple(data["shape"]), "modules": tuple(data["modules"]), "activations": activations},
    )


def damaged(file: Path, line: int, what: str) -> InputError:
    """The sentence for a row that cannot be read."""
    return InputError(f"{file} is damaged: line {line}: {what}. Delete that line and what follows it, or start a new run.")


def _number(file: Path, line: int, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise damaged(file, line, f"'{text}' is no number") from None


def _check_row(evaluation: Evaluation, space: SearchSpace, trials: set[tuple[str, int]]) -> None:
    """What a row says of itself must be what its allocation weighs, and no trial stands twice."""
    choice = space.choice(evaluation.allocation) if evaluation.allocation else None
    if choice is not None and not space.allowed[np.arange(len(choice)), choice].all():
        raise ValueError("its allocation has a scheme where it is not allowed")
    size = (space.size_bits(choice) + 7) // 8
    if evaluation.size_bytes != size:
        raise ValueError(f"size_bytes is {evaluation.size_bytes}, but its allocation weighs {size}")
    if evaluation.trial is not None:
        if (evaluation.split, evaluation.trial) in trials:
            raise ValueError(f"trial {evaluation.trial} stands there twice")
        trials.add((evaluation.split, evaluation.trial))


def _one_of(text: str, allowed: Sequence[str]) -> str:
    if text not in allowed:
        raise ValueError(f"'{text}' is none of {', '.join(allowed)}")
    return text


def _difference(there: Any, here: Any) -> str:
    if isinstance(there, dict) and isinstance(here, dict):
        keys = sorted(key for key in {*there, *here} if there.get(key) != here.get(key))
        return f" in {', '.join(keys)}"
    there, here = (text if len(text := str(value)) <= 40 else f"{text[:12]}…" for value in (there, here))
    return f" ({there} there, {here} here)"
