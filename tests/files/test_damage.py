"""Thousands of seeded mutations of a run folder's files: each is one sentence that names the file, or changes nothing.

A table that grows row by row may also be read as what an interruption would have left: its first rows.
"""

import collections
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from mpsearch.allocation import Allocation, SearchSpace
from mpsearch.costs.latency import REST, Latency, read_latency, write_latency
from mpsearch.errors import InputError
from mpsearch.evaluation import Evaluation
from mpsearch.files.csv_rows import write_rows
from mpsearch.graph.channel_scaling import Equalization, load_equalization
from mpsearch.layer import LayerSpec
from mpsearch.reporting.tables import confirm_columns, evaluations_table, read_confirm
from mpsearch.runs.evaluation_rows import evaluation_row
from mpsearch.runs.run import SENSITIVITY_COLUMNS, Run, RunFolder
from mpsearch.schemes.integer import Integer

MUTATIONS = {
    "evaluations.csv": 700,
    "sensitivity.csv": 500,
    "confirm.csv": 400,
    "latency.csv": 300,
    "space.json": 400,
    "effects.npy": 150,
    "equalization.safetensors": 150,
}
SPACE = SearchSpace.build(
    [LayerSpec(name, "linear", (4, 6), 24, name, (name,)) for name in ("a", 'b, "c"', "ü")],
    {"w2": Integer(2), "w4": Integer(4), "w8": Integer(8)},
    other_bits=96,
)
IDENTITY = {
    "space": SPACE.to_dict(),
    "quality_name": "accuracy",
    "quality_kind": "share",
    "metric": {"name": "kl", "unit": "nats", "exact": True},
    "model_sha256": "ab" * 32,
    "budgets": {"bits": 3.5},
    "objectives": ["size_bytes"],
    "costs": ["latency_ms"],
    "trials": {"in_flight": 2},
}
TIMING = {"measured_ms": 0.3, "measured_ms_low": 0.2, "measured_ms_high": 0.4, "measured_on": "a CPU, 1 thread"}
HOSTILE = ("", " ", "nan", "inf", "-1", "1e400", "True", "false", " False", "1_0", "+1", "0x1", "٣", "0.5 ", "1,5", '"', '""')
HOSTILE += ("\0", "\r", "search", "w2", "sampler", "accuracy", "0", "1", "3.5", "9" * 400)
JSON_VALUES = (None, True, 0, -1, 2.5, float("nan"), 10**40, "", "w2", "\ud800", [], [1], {}, {"a": []})


def evaluation(choice, trial, split, origin, latency):
    bits = SPACE.size_bits(np.array(choice) if choice else None)
    return Evaluation(
        trial=trial,
        origin=origin,
        allocation=SPACE.allocation(choice) if choice else Allocation(),
        split=split,
        loss=sum((2 - c) / 3 for c in choice),
        cross_entropy=0.25,
        quality=0.5,
        quality_low=0.4,
        quality_high=0.6,
        size_bytes=(bits + 7) // 8,
        average_bits=(bits - 96) / SPACE.numel,
        fraction=bits / SPACE.size_bits(),
        feasible=True,
        n_samples=400,
        seconds=0.1 + 0.2,
        packed=split == "confirm" and bool(choice),
        **(TIMING if split == "confirm" else {}),
        costs={"latency_ms": latency} if choice else {},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A whole run, written by the package's own writers, without a search."""
    run = RunFolder(tmp_path_factory.mktemp("run"))
    run.identify(IDENTITY)
    for i, group in enumerate(SPACE.names):
        for j, scheme in enumerate(SPACE.scheme_names):
            row = (group, scheme, "kl", (i + 1) / 3**j, int(SPACE.storage_bits[i, j]))
            run.append("sensitivity", dict(zip(SENSITIVITY_COLUMNS, row, strict=True)))
    choices = [(0, 0, 0), (1, 1, 1), (2, 2, 2), (0, 1, 2), (0, 0, 1)]
    evaluations = [evaluation((), None, "search", "float", 0.0)]
    evaluations += [evaluation(c, i, "search", "uniform" if i < 3 else "sampler", 1.5 + i) for i, c in enumerate(choices)]
    evaluations += [evaluation((), None, "confirm", "float", 0.0), evaluation((0, 1, 2), None, "confirm", "sampler", 4.5)]
    for e in evaluations:
        run.append("evaluations", evaluation_row(e, SPACE, "accuracy", ["latency_ms"]))
    last = evaluations[-1]
    values = {"scheme": "", "accuracy": last.quality, "drop": 0.0, "drop_low": -0.1, "drop_high": 0.1, "non_inferior": "yes"}
    values |= {"approximate": False, "dominated_by_bytes": 30, "significantly_dominated": False}
    values |= {"allocation": last.allocation.to_json()}
    columns = confirm_columns("accuracy")
    write_rows(run.path / "confirm.csv", columns, [[values[c] if c in values else getattr(last, c) for c in columns]])
    run.write_effects(np.arange(18, dtype=np.float32).reshape(2, 3, 3))
    latencies = [Latency(REST, "", "", REST, 3, 2, "avx2", 0.5), Latency("a", "linear", "3x4", "w2", 3, 2, "avx2", 1.5)]
    write_latency(run.path / "latency.csv", latencies)
    Equalization("CrossLayer", {"a.outputs": torch.ones(4), "a.inputs": torch.ones(6)}).save(
        run.path / "equalization.safetensors"
    )
    return run.path


def loaded(folder: Path, name: str) -> str:
    """All that the readers make of the file called `name`, as text."""
    if name == "latency.csv":
        return repr(read_latency(folder / name))
    if name == "equalization.safetensors":
        found = load_equalization(folder / name)
        return repr((found.equalizer, {key: tensor.tolist() for key, tensor in found.tensors.items()}))
    result = Run.load(folder)
    if name == "confirm.csv":
        return read_confirm(result, folder).to_csv()
    table = result.sensitivity
    tables = evaluations_table(result).to_csv() if name == "evaluations.csv" else (table.values.tolist(), table.effects.tolist())
    return repr((result.space, result.identity, tables))


def outcome(folder: Path, name: str) -> str | InputError:
    """What is loaded, or the error for the user."""
    try:
        return loaded(folder, name)
    except InputError as error:
        return error


def rewritten(node, rng):
    """The JSON with one value replaced, removed or added."""
    places = []

    def walk(value):
        for key in value if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            if isinstance(value[key], dict | list):
                walk(value[key])

    walk(node)
    parent, key = rng.choice(places)
    action = rng.randrange(3)
    if action == 0:
        del parent[key]
    elif action == 1 and isinstance(parent, dict):
        parent[rng.choice(["zz", "class", "name"])] = rng.choice(JSON_VALUES)
    else:
        parent[key] = rng.choice(JSON_VALUES)
    return json.dumps(node, indent=1).encode() + b"\n"


def mutated(data: bytes, name: str, rng: random.Random) -> bytes:
    """One random change."""
    kind = rng.choice(["flip", "insert", "delete", "cut", "line", "cell", "cell", "cell"])
    place = rng.randrange(len(data))
    if kind == "flip":
        return data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]
    if kind == "insert":
        return data[:place] + bytes([rng.choice([0, 10, 13, 32, 34, 44, 48, 255, rng.randrange(256)])]) + data[place:]
    if kind == "delete":
        return data[:place] + data[place + rng.choice([1, 1, 1, 7]) :]
    if kind == "cut":
        return data[:place]
    if kind == "cell" and name.endswith(".json"):
        return rewritten(json.loads(data), rng)
    lines = data.splitlines(keepends=True)
    one, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    if kind == "line" or not name.endswith(".csv"):
        action = rng.randrange(3)
        if action == 0:
            del lines[one]
        elif action == 1:
            lines.insert(other, lines[one])
        else:
            lines[one], lines[other] = lines[other], lines[one]
        return b"".join(lines)
    cells = lines[one].split(b",")
    cells[rng.randrange(len(cells))] = rng.choice(HOSTILE).encode()
    lines[one] = b",".join(cells)
    return b"".join(lines)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_found_or_changes_nothing(folder, name):
    file = folder / name
    whole, expected = file.read_bytes(), loaded(folder, name)
    counts = collections.Counter()
    try:
        for seed in range(MUTATIONS[name]):
            data = mutated(whole, name, random.Random(f"{name} {seed}"))
            file.write_bytes(data)
            found = outcome(folder, name)
            if isinstance(found, InputError):
                assert "\n" not in str(found), seed
                assert name in str(found), seed
                counts["found"] += 1
                continue
            if found == expected:
                counts["same"] += 1
                continue
            assert name == "evaluations.csv", seed
            assert whole.startswith(data[: data.rfind(b"\n") + 1]), seed
            counts["interrupted"] += 1
    finally:
        file.write_bytes(whole)
    print(name, dict(counts))
    assert counts["found"] > 0.5 * MUTATIONS[name]
