"""What an export must pass before it takes its place in the run's folder: it is loaded and scored again, and fits the budget."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mpsearch.costs.size import Bytes, parse_bytes
from mpsearch.engine.engine import QuantEngine
from mpsearch.errors import InputError
from mpsearch.evaluation import Evaluation
from mpsearch.exporters.base import Exporter
from mpsearch.graph.shared_copy import shared_copy
from mpsearch.packed.agreement import CODE_SHARE, LOGIT_DISTANCE, losses_agree
from mpsearch.pipeline.prepare import Prepared
from mpsearch.runs.run import Run, RunFolder


def check_loss(prepared: Prepared, engine: QuantEngine, exporter: Exporter, path: Path, recorded: Evaluation) -> None:
    """Load what was written at `path` into the float model and score it on the search split.

    Raises
    ------
    InputError
        Its loss is not the recorded one.
    """
    model = exporter.load(path, shared_copy(prepared.original).to(engine.device))
    loss = engine.score_of(model, "search").loss
    quantizes_inputs = any(engine.space.schemes[name].input_format for name in recorded.allocation.values())
    share = CODE_SHARE if quantizes_inputs else 0.0
    if loss != recorded.loss and not losses_agree(loss, recorded.loss, distance=LOGIT_DISTANCE, share=share):
        raise InputError(
            f"What was written has a loss of {loss:.6g} on the search split, but the run recorded {recorded.loss:.6g} for this "
            "point, so nothing was exported. Delete the run's folder bank/ and export again; if that does not help, the model, "
            "its data or this version of mpsearch differ from those of the search."
        )


class TooLarge(InputError):  # noqa: N818  (a limit that was asked for, not a fault)
    """The written files exceed a limit in bytes."""


def check_size(path: Path, point: Evaluation, limits: Mapping[str, Any], result: Run) -> None:
    """`TooLarge` where the files with tensors next to `path` together exceed pick.max_bytes, or else budget.bytes.

    Their headers count; JSON and XML files do not, which describe them.
    """
    written = tensor_bytes(file for file in path.parent.iterdir() if file.is_file() and not file.name.startswith("."))
    name, limit = "pick.max_bytes", limits.get("max_bytes")
    if limit is None:
        name, limit = f"budget.{Bytes.name}", result.budgets.get(Bytes.name)
    if limit is not None and written > parse_bytes(limit):
        raise TooLarge(
            f"The point of {point.size_bytes:,} bytes takes {written:,} in files, headers included: above "
            f"{name}={parse_bytes(limit):.0f}."
        )


def tensor_bytes(files: Iterable[Path]) -> int:
    """Bytes of the files with tensors, headers included: those that are neither JSON nor XML."""
    return sum(file.stat().st_size for file in files if file.suffix not in (".json", ".xml"))


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A folder inside `folder` for files that are not to be seen yet; removed afterwards, with all in it."""
    inside = folder / ".export"
    with RunFolder(inside).locked():
        try:
            yield inside
        finally:
            shutil.rmtree(inside, ignore_errors=True)
