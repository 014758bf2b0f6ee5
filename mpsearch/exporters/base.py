"""The contract of the exporters: write the picked allocation as a file that a runtime reads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mpsearch.engine import QuantEngine
from mpsearch.equalization import Equalization
from mpsearch.evaluation import Evaluation


@dataclass(frozen=True)
class Picked:
    """What an exporter is given: the picked point, its scores (split -> evaluation), and what the model was before.

    `model_sha256` is the checksum of the float model as it was built, `folds` the (layer, batch norm) pairs folded since,
    `equalization` how its channels were scaled then, if they were.
    """

    evaluation: Evaluation
    scores: Mapping[str, Evaluation]
    baselines: Mapping[str, Evaluation]
    quality_name: str
    model_sha256: str
    folds: Sequence[tuple[str, str]]
    equalization: Equalization | None = None


class Exporter(ABC):
    """Writes files into a folder; what they weigh is what the budget counted."""

    @abstractmethod
    def export(self, picked: Picked, engine: QuantEngine, folder: Path) -> Path:
        """Write the files and return the path of the one that names all others."""
