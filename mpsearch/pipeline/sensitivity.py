"""Measure the sensitivity of each group to each scheme, one row on disk before the next begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from mpsearch.engine.engine import QuantEngine
from mpsearch.evaluation import SensitivityTable
from mpsearch.executors.base import Executor
from mpsearch.executors.in_process import InProcess
from mpsearch.metrics.base import Pair, SensitivityMetric
from mpsearch.progress import phase
from mpsearch.runs.deadline import Deadline
from mpsearch.runs.run import RunFolder

Effects = NDArray[np.float32]


def measure_sensitivity(
    engine: QuantEngine,
    metric: SensitivityMetric,
    known: Mapping[Pair, float] | None = None,
    record: Callable[[str, str, float], None] = lambda group, scheme, value: None,
    executor: Executor | None = None,
    effects: Effects | None = None,
    keep: Callable[[Effects], None] = lambda effects: None,
    deadline: Deadline | None = None,
) -> SensitivityTable:
    """The metric's value for every group and every scheme that it may take.

    `known` values (of an interrupted run) are not measured again; `record` is called with each new one as soon as it is there.
    `executor`, started, is where they are measured; `None`: here. A metric that knows effects gives them with the values, all at
    once, and `keep` is called with them before any value is recorded; `effects` are those of an interrupted run. It makes fewer
    passes over the data where the `deadline` is near.
    """
    if executor is None:
        executor = InProcess()
        executor.start(engine)
    space, unit = engine.space, metric.unit_for(engine.divergence)
    known = dict(known or {})
    pairs = [(name, scheme) for name, choices in zip(space.names, space.choices, strict=True) for scheme in choices]
    todo = [pair for pair in pairs if pair not in known]
    if todo or effects is None:
        joint = metric.measure_joint(engine, pairs, deadline)
        if joint is not None:
            effects = np.zeros((len(joint[1]), len(space.names), len(space.scheme_names)), dtype=np.float32)
            groups, schemes = zip(*((space.names.index(g), space.scheme_names.index(s)) for g, s in pairs), strict=True)
            effects[:, groups, schemes] = joint[1]
            keep(effects)
            for (group, scheme), value in zip(pairs, joint[0].tolist(), strict=True):
                if (group, scheme) not in known:
                    known[group, scheme] = value
                    record(group, scheme, value)
            todo = []
    with phase("sensitivity", len(pairs), done=len(pairs) - len(todo)) as advance:
        for (group, scheme), value in metric.measure_on(executor, engine, todo) if todo else ():
            known[group, scheme] = value
            record(group, scheme, value)
            advance(f"{group} at {scheme}: {value:.3g} {unit}")
    values = np.array([[known.get((name, scheme), np.inf) for scheme in space.scheme_names] for name in space.names])
    return SensitivityTable(metric.name, unit, values, space, metric.exact, effects)


def measured_sensitivity(
    engine: QuantEngine,
    metric: SensitivityMetric,
    run: RunFolder,
    known: Mapping[Pair, float],
    executor: Executor | None = None,
    deadline: Deadline | None = None,
) -> SensitivityTable:
    """`measure_sensitivity`, with every new row in the run's folder before the next is measured."""
    space = engine.space
    bits = {(g, s): int(space.storage_bits[i, j]) for i, g in enumerate(space.names) for j, s in enumerate(space.scheme_names)}

    def record(group: str, scheme: str, value: float) -> None:
        row = {"group": group, "scheme": scheme, "metric": metric.name, "value": value, "size_bits": bits[group, scheme]}
        run.append("sensitivity", row)

    return measure_sensitivity(engine, metric, known, record, executor, run.read_effects(space), run.write_effects, deadline)
