"""Measure how much each group minds each scheme, one row on disk before the next begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from mpsearch.engine import QuantEngine
from mpsearch.evaluation import SensitivityTable
from mpsearch.executors.base import Executor
from mpsearch.executors.in_process import InProcess
from mpsearch.metrics.base import Pair, SensitivityMetric
from mpsearch.progress import phase


def measure_sensitivity(
    engine: QuantEngine,
    metric: SensitivityMetric,
    known: Mapping[Pair, float] | None = None,
    record: Callable[[str, str, float], None] = lambda group, scheme, value: None,
    executor: Executor | None = None,
) -> SensitivityTable:
    """The metric's value for every group and every scheme that it may take.

    `known` values (of an interrupted run) are not measured again; `record` is called with each new one as soon as it is there.
    `executor`, started, is where they are measured; `None`: here.
    """
    if executor is None:
        executor = InProcess()
        executor.start(engine)
    space = engine.space
    known = dict(known or {})
    pairs = [(name, scheme) for name, choices in zip(space.names, space.choices, strict=True) for scheme in choices]
    todo = [pair for pair in pairs if pair not in known]
    with phase("sensitivity", len(pairs), done=len(pairs) - len(todo)) as advance:
        for (group, scheme), value in metric.measure_on(executor, engine, todo) if todo else ():
            known[group, scheme] = value
            record(group, scheme, value)
            advance(f"{group} at {scheme}: {value:.3g} {metric.unit}")
    values = np.array([[known.get((name, scheme), np.inf) for scheme in space.scheme_names] for name in space.names])
    return SensitivityTable(metric.name, metric.unit, values, space, metric.exact)
