"""What a search returns: the tables of the run, its chart, a picked point, and the files that a runtime opens."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from mpsearch.allocation import Allocation
from mpsearch.costs.base import Cost
from mpsearch.costs.latency import LatencyMs
from mpsearch.errors import InputError
from mpsearch.evaluation import Confirmed, Evaluation
from mpsearch.exporters.base import Exporter
from mpsearch.pipeline.engine_options import EngineOptions
from mpsearch.pipeline.export import export_point, exported_weights
from mpsearch.pipeline.finetune import TrainingSummary
from mpsearch.pipeline.pick import pick
from mpsearch.pipeline.prepare import Choice, Model
from mpsearch.pipeline.verify import verify_file
from mpsearch.pipeline.workspace import Source, Workspace, recorded_costs
from mpsearch.quantizers.base import Quantizer
from mpsearch.refiners.base import Refiner
from mpsearch.registry import resolve
from mpsearch.reporting import report, summary, tables
from mpsearch.reporting.charts import pareto, style
from mpsearch.runs.run import Run, RunFolder
from mpsearch.runs.verified import Verified, append_verified, read_verified
from mpsearch.schemes.base import QuantScheme
from mpsearch.tasks.base import Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NO_MODEL = (
    "This result was loaded without its model and task, so nothing can be measured or exported. Give them: "
    "mpsearch.load_result(folder, model, task)."
)


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """A run of `mpsearch.search`: immutable; `solve`, `confirm` and `finetune` return new ones.

    Attributes
    ----------
    run
        The record of the run: its search space, evaluations, sensitivities and budgets.
    folder
        Where the run lies; a temporary folder where the search was given none.
    """

    run: Run
    folder: Path
    source: Source | Workspace | None = None
    costs: Mapping[str, Cost] = field(default_factory=dict)
    confirmed: Sequence[Confirmed] | None = None
    keep: object = None  # a temporary folder lives as long as the results that use it

    def __repr__(self) -> str:
        name = self.run.identity.get("model_name", "")
        sizes = f"{len(self.run.front)} points on the front, {len(self.run.evaluations)} evaluations"
        return f"Result({name}: {sizes}, in {self.folder})"

    @property
    def front(self) -> pd.DataFrame:
        """The Pareto front, a row for each point, cheapest first: sizes, bits, loss, quality and costs on the search split."""
        return tables.front_table(self.run)

    @property
    def evaluations(self) -> pd.DataFrame:
        """Everything that was measured, a row for each evaluation, with its split."""
        return tables.evaluations_table(self.run)

    @property
    def sensitivity(self) -> pd.DataFrame:
        """Columns group, scheme, value (in `unit`) and size_bits, a row for each group and each scheme that it may take."""
        return tables.sensitivity_table(self.run.sensitivity)

    def pick(self, **limits: Any) -> Point:
        """A point of the front: by default the smallest that is not inferior to the float model.

        Parameters
        ----------
        **limits
            `max_bytes`, `bits`, `max_ms`: limits on size, average bits and measured milliseconds. `max_drop`: the smallest point
            whose drop in quality is at most this. `min_quality`, `max_quality`: the smallest point that reaches it. `point`: an
            id, as `Point.id` gives it.

        Raises
        ------
        InputError
            No point fits.
        """
        return Point(self, pick(self.run, **limits))

    def plot(self) -> Figure:
        """The chart of the front: loss and quality against cost, on the search and the confirm split."""
        return pareto.pareto_figure(self.run, pick(self.run))

    def report(self, **limits: Any) -> Path:
        """Write tables, figures, `index.html` and `report.md` to the run's folder; `limits` pick the point that they show."""
        return report.write_report(self.run, self.folder, pick(self.run, **limits), self.confirmed)

    def export(
        self, exporter: Choice = "native", folder: Path | str | None = None, *, finetuned: bool = False, **limits: Any
    ) -> Path:
        """Write a point to files that a runtime opens; see `pick` for `limits`.

        Parameters
        ----------
        exporter : str or Exporter
            "native" (allocation.json and the packed tensors), "packed" (the packed model in one file), or an object.
        folder
            Where to; the run's folder by default. An earlier export there is replaced once the new one has been checked.
        finetuned
            Export the weights that `finetune` trained.

        Returns
        -------
        Path
            The main file.

        Raises
        ------
        InputError
            No point fits, the files exceed the budget, or what was written does not score as it was recorded.
        """
        return written(self, pick(self.run, **limits), exporter, folder, finetuned, limits)[0]

    @property
    def verified(self) -> tuple[Verified, ...]:
        """What `mpsearch.verify` has measured of exported files, in their order."""
        return read_verified(self.folder, self.run.quality)

    @cached_property
    def workspace(self) -> Workspace:
        """The model and the data of the run; `InputError` where the result was loaded without them."""
        if isinstance(self.source, Workspace):
            return self.source
        if self.source is None or self.source.task is None:
            raise InputError(NO_MODEL)
        return self.source.open(self.run, self.folder)

    def _repr_html_(self) -> str:
        """The chart and a short table, in a notebook."""
        about = summary.summary(self.run, pick(self.run))
        image = base64.b64encode(style.png(self.plot())).decode()
        table = pd.DataFrame(about.rows, columns=list(about.header)).to_html(index=False, border=0)
        lines = "".join(f"<p>{html.escape(line)}</p>" for line in about.lines)
        chart = f'<img style="max-width:100%" src="data:image/png;base64,{image}">'
        return f"<h3>{html.escape(about.title)}</h3>{chart}{table}{lines}"


@dataclass(frozen=True, eq=False, repr=False)
class Point:
    """A picked point: an allocation of the run with its evaluation on the search split."""

    result: Result
    evaluation: Evaluation
    training: TrainingSummary | None = None  # of `mpsearch.finetune`

    def __repr__(self) -> str:
        e = self.evaluation
        return f"Point({self.id}: {e.size_bytes:,} bytes, {e.average_bits:.2f} bits, loss {e.loss:.4g}, quality {e.quality:.4g})"

    @property
    def allocation(self) -> Allocation:
        """Group -> scheme name."""
        return self.evaluation.allocation

    @property
    def id(self) -> str:
        """12 hex digits that identify the allocation within the run."""
        return self.allocation.id

    def export(self, exporter: Choice = "native", folder: Path | str | None = None) -> Path:
        """Write this point; see `Result.export`."""
        return written(self.result, self.evaluation, exporter, folder, self.training is not None)[0]

    def verify(self, exporter: Choice | None = None) -> Verified:
        """Export this point, open it in its runtime, and measure it there; see `mpsearch.verify`."""
        return verified(self.result, self.evaluation, exporter, self.training is not None)


def written(
    result: Result,
    picked: Evaluation,
    exporter: Choice,
    folder: Path | str | None = None,
    finetuned: bool = False,
    limits: Mapping[str, Any] | None = None,
) -> tuple[Path, Evaluation]:
    """Write a point; the main file's path and the evaluation of what was written. See `Result.export`."""
    if result.source is None:
        raise InputError(NO_MODEL)

    def opened() -> Workspace:
        return result.workspace  # once for all exports

    source = result.source if isinstance(result.source, Source) and result.source.task is None else opened
    writer: Exporter = resolve("exporter", exporter)
    target = result.folder if folder is None else Path(folder)
    return export_point(result.run, picked, writer, source, result.folder, target, finetuned=finetuned, limits=limits or {})


def verified(
    result: Result,
    picked: Evaluation,
    exporter: Choice | None = None,
    finetuned: bool = False,
    limits: Mapping[str, Any] | None = None,
    is_held: bool = False,
) -> Verified:
    """Write a point, open it in its runtime, and record what it scores there; `is_held`: the caller has the folder's lock."""
    run, workspace = result.run, result.workspace
    writer: Exporter = resolve("exporter", exporter or run.exporter)
    writer.check_installed()
    path, point = written(result, picked, writer, None, finetuned, limits)
    trained = run.finetuned("search")[point.allocation] if finetuned else None
    latency = result.costs.get(LatencyMs.name)
    measured = verify_file(
        path,
        writer,
        point,
        workspace,
        exported_weights(workspace, run, result.folder, point.allocation, trained),
        trained=finetuned,
        batch_size=latency.batch_size if isinstance(latency, LatencyMs) else 1,
    )
    folder = RunFolder(result.folder, is_held=is_held)
    with folder.locked():
        append_verified(folder, measured, run.quality_name)
    return measured


def load_result(
    folder: Path | str,
    model: Model | None = None,
    task: Task | None = None,
    *,
    schemes: Mapping[str, QuantScheme] | None = None,
    quantizers: Mapping[str, Quantizer] | None = None,
    costs: Mapping[str, Cost] | None = None,
    refiner: Refiner | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Result:
    """Read a run from its folder; nothing that the folder names is imported or run.

    Parameters
    ----------
    folder
        The folder that `mpsearch.search` or the command wrote.
    model, task
        Those of the run, to measure more and to export; without a task a point is exported from the run's own weights and its
        loss is not measured again.
    schemes, quantizers, costs, refiner
        Objects (by name), where some are not mpsearch's own.
    device, seed
        Where evaluations run; the seed of a model that is given as a function.

    Raises
    ------
    InputError
        The folder holds no finished run, or is damaged.
    """
    folder = Path(folder)
    run = Run.load(folder, schemes)
    source = None if model is None else Source(model, task, quantizers, EngineOptions(device=device), seed, refiner)
    return Result(run, folder, source, recorded_costs(run, folder, costs))


def redrawn(
    folder: Path, choose: Callable[[Run], Evaluation], load: Callable[[], Result], every_figure: bool = False
) -> tuple[Result, Evaluation, Path]:
    """Load a run and write its report with the point that `choose` returns, without its lock: a search may be writing there.

    `confirm.csv` may then be newer than the evaluations that were read before it, so that they do not agree: where
    `evaluations.csv` grew meanwhile, all is read again.
    """
    file = folder / "evaluations.csv"
    while True:
        size = file.stat().st_size if file.exists() else 0
        try:
            result = load()
            picked = choose(result.run)
            return result, picked, report.write_report(result.run, folder, picked, every_figure=every_figure)
        except InputError:
            if (file.stat().st_size if file.exists() else 0) <= size:
                raise


def grown(
    result: Result, evaluations: Sequence[Evaluation], workspace: Workspace, confirmed: Sequence[Confirmed] | None
) -> Result:
    """The result with more evaluations."""
    return replace(result, run=replace(result.run, evaluations=tuple(evaluations)), source=workspace, confirmed=confirmed)
