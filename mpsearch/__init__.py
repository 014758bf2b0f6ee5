"""mpsearch: how many bits each layer of a network should get.

Names are loaded when they are first used, because importing torch takes seconds. The steps are functions in `mpsearch.pipeline`.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Allocation": "allocation",
    "SearchSpace": "allocation",
    **dict.fromkeys(("classification", "fidelity_task"), "tasks.makers"),
    "Budget": "budget",
    "Evaluation": "evaluation",
    "SensitivityTable": "evaluation",
    "LayerSpec": "layer",
    "QuantEngine": "engine.engine",
    "Run": "runs.run",
    "Task": "tasks.base",
    "InputError": "errors",
    "measure_sensitivity": "pipeline.sensitivity",
    "load_allocation": "exporters.allocation_file",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"mpsearch.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'mpsearch' has no attribute '{name}'")
