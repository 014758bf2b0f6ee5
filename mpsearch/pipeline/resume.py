"""Checks that a resumed run measures what the interrupted one measured: the float model's score, and one trial's.

Weights and data are compared by digests. A changed forward method, task or library shows in the scores.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from mpsearch import __version__
from mpsearch.divergence import LOSS_FLOOR
from mpsearch.engine.engine import FLOAT, QuantEngine
from mpsearch.errors import InputError
from mpsearch.evaluation import LATER, Evaluation
from mpsearch.files import read_regular, write_atomically
from mpsearch.files.strict_json import JsonObject, parse
from mpsearch.packed.agreement import ERROR_ROUNDING, OUTPUT_ROUNDING, losses_agree
from mpsearch.runs.run import RunFolder

FILE, REMEDY = "environment.json", "Delete it, and one recorded trial is scored again."
# Of the float model's measures: float32 arithmetic in another order changes outputs by 1e-6 of their size, and means over samples
# by less. A share may change by one sample on the edge.
FLOAT_ROUNDING = 1e-5


def environment(device: str) -> dict[str, str]:
    """What the last digits of a score depend on, apart from model, task and data."""
    versions = {name: version(name) for name in ("torch", "numpy", "optuna")}
    return {
        "mpsearch": __version__,
        **versions,
        "threads": str(torch.get_num_threads()),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else torch.backends.cpu.get_cpu_capability(),
    }


def _read(file: Path) -> dict[str, str]:
    recorded = JsonObject(parse(read_regular(file), file, REMEDY), file, REMEDY)
    return {key: recorded.text(key) for key in recorded.data}


def check_resumed(engine: QuantEngine, run: RunFolder, known: Sequence[Evaluation]) -> None:
    """Record the environment of a new run in `environment.json`; score again what a resumed one (`known`) must reproduce.

    Another environment is one warning. Raises `InputError` where the float model, or in another environment a recorded trial,
    has a score that differs by more than rounding.
    """
    file, current = run.path / FILE, environment(engine.device)
    recorded = _read(file) if file.exists() else {}
    baseline = next((e for e in known if e.origin == "float" and e.split == "search"), None)
    if not recorded:
        write_atomically(file, json.dumps(current, indent=1) + "\n")
    if baseline is None:
        return
    names = [key for key in current if recorded.get(key) != current[key]]
    changes = ", ".join(f"{key} {recorded.get(key, 'unknown')} -> {current[key]}" for key in names)
    score = engine.score(FLOAT)
    of_one = 1.0 / score.n_samples if engine.quality.kind == "share" else 0.0
    measures = [
        ("cross-entropy", baseline.cross_entropy, score.cross_entropy, 0.0),
        (engine.quality.name, baseline.quality, score.quality, 1.5 * of_one),
    ]
    for name, before, now, slack in measures:
        if not abs(now - before) <= FLOAT_ROUNDING * max(1.0, abs(before)) + slack:
            raise InputError(
                f"The float model is not the one that this run measured, although its weights and data are: its {name} on the "
                f"search split is {now:.8g}, recorded is {before:.8g}. Was the code of the model or the task changed"
                f"{f', or is it this ({changes})' if changes else ''}? Restore it, or start a new run."
            )
    if names:
        warnings.warn(f"This run is resumed in another environment ({changes}); one trial is scored again.", stacklevel=2)
        _check_trial(engine, known, changes)


def _check_trial(engine: QuantEngine, known: Sequence[Evaluation], changes: str) -> None:
    """Score the first recorded allocation that has a finite loss again."""
    finite = [
        e for e in known if e.split == "search" and e.allocation and e.origin not in LATER and LOSS_FLOOR < e.loss < math.inf
    ]
    if not finite:
        return
    before, now = finite[0].loss, engine.score(finite[0].allocation).loss
    if not losses_agree(now, before, distance=OUTPUT_ROUNDING, share=ERROR_ROUNDING):
        raise InputError(
            f"The run cannot be resumed here: the loss of a recorded point ({finite[0].average_bits:.2f} bits) is {now:.6g}, "
            f"recorded is {before:.6g}, which is more than rounding. What differs: {changes}. Resume where the run was begun, or "
            "start a new run."
        )
