"""The story of each command, one room a command: what the front door composed comes in as `settings` and `build`."""

from mpsearch.cli.commands.export import export
from mpsearch.cli.commands.finetune import finetune
from mpsearch.cli.commands.hardware import hardware
from mpsearch.cli.commands.report import report
from mpsearch.cli.commands.search import search
from mpsearch.cli.commands.sensitivity import sensitivity
from mpsearch.cli.commands.solve import solve

__all__ = ["export", "finetune", "hardware", "report", "search", "sensitivity", "solve"]
