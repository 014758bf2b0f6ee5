"""The story of each command, one room a command: what the front door composed comes in as `settings` and `build`."""

from mpsearch.commands.export import export
from mpsearch.commands.finetune import finetune
from mpsearch.commands.hardware import hardware
from mpsearch.commands.report import report
from mpsearch.commands.search import search
from mpsearch.commands.sensitivity import sensitivity
from mpsearch.commands.solve import solve

__all__ = ["export", "finetune", "hardware", "report", "search", "sensitivity", "solve"]
