"""mpsearch: how many bits each layer of a network should get.

`search` finds allocations of number formats to layers under a budget; `Result` holds what it measured, picks a point and exports
it. Names are loaded when they are first used, because importing torch takes seconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpsearch.allocation import Allocation, SearchSpace
    from mpsearch.budget import Budget
    from mpsearch.errors import InputError
    from mpsearch.evaluation import Evaluation, SensitivityTable
    from mpsearch.exporters.allocation_file import load_allocation
    from mpsearch.layer import LayerSpec
    from mpsearch.pipeline.api import hardware, search, sensitivity
    from mpsearch.pipeline.finished import confirm, finetune, report, solve, verify
    from mpsearch.pipeline.result import Point, Result, load_result
    from mpsearch.tasks.base import Task
    from mpsearch.tasks.makers import classification, fidelity_task

__version__ = "0.1.0"

_MODULES = {
    **dict.fromkeys(("hardware", "search", "sensitivity"), "pipeline.api"),
    **dict.fromkeys(("confirm", "finetune", "report", "solve", "verify"), "pipeline.finished"),
    **dict.fromkeys(("classification", "fidelity_task"), "tasks.makers"),
    **dict.fromkeys(("Result", "Point", "load_result"), "pipeline.result"),
    **dict.fromkeys(("Allocation", "SearchSpace"), "allocation"),
    **dict.fromkeys(("Evaluation", "SensitivityTable"), "evaluation"),
    "Budget": "budget",
    "InputError": "errors",
    "LayerSpec": "layer",
    "Task": "tasks.base",
    "load_allocation": "exporters.allocation_file",
}
__all__ = [
    "Allocation",
    "Budget",
    "Evaluation",
    "InputError",
    "LayerSpec",
    "Point",
    "Result",
    "SearchSpace",
    "SensitivityTable",
    "Task",
    "classification",
    "confirm",
    "fidelity_task",
    "finetune",
    "hardware",
    "load_allocation",
    "load_result",
    "report",
    "search",
    "sensitivity",
    "solve",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"mpsearch.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'mpsearch' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
