"""mpsearch: how many bits each layer of a network should get.

The words, loaded when first used (importing torch takes seconds). The steps are functions of the modules of the same name:
`from mpsearch.search import search`. `load_allocation(path).apply(model)` makes of the float model the one that was scored.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Allocation": "allocation",
    "SearchSpace": "allocation",
    "Budget": "budget",
    "Evaluation": "evaluation",
    "SensitivityTable": "evaluation",
    "LayerSpec": "layer",
    "QuantEngine": "engine",
    "SearchResult": "result",
    "Task": "tasks.base",
    "InputError": "errors",
    "measure_sensitivity": "sensitivity",
    "load_allocation": "exported",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"mpsearch.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'mpsearch' has no attribute '{name}'")
