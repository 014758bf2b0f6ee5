"""What prefix reuse saves: each allocation is scored with and without it, in turns, on one thread.

    python scripts/bench_prefix.py

On ResNet-20 (1,000 search images, w2 to w8) and the digits network: the sensitivity sweep, one layer at a time in one scheme; the
trials of a search with our own sampler after its 30 first; and random allocations, where there is little to reuse. Scores must be
the same. The data are found in `$MPSEARCH_DATA/cifar10` (default `../shared/data/cifar10`). Writes `reports/bench_prefix/`;
`--json FILE` writes the rows there too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from bench_resnet20 import build_engine
from pages import Row, machine, write

from mpsearch.allocation import Allocation, SearchSpace
from mpsearch.costs.size import Bytes
from mpsearch.engine.calibrate import calibrate
from mpsearch.engine.engine import FLOAT, QuantEngine, load_batches
from mpsearch.engine.prefix_cache import PrefixCache
from mpsearch.graph.fold import fold_batch_norms
from mpsearch.graph.trace import trace_layers
from mpsearch.graph.unsearched import other_bits
from mpsearch.metrics.kl import KL
from mpsearch.models.digits import digits
from mpsearch.pipeline.search import Evaluator, search
from mpsearch.pipeline.sensitivity import measure_sensitivity
from mpsearch.quantizers.clip_search import ClipSearch
from mpsearch.samplers.front import Front
from mpsearch.schemes.integer import Integer
from mpsearch.tasks.digits import Digits

MAX_BYTES = 10**9
N_PROPOSALS = 100


def build_digits() -> QuantEngine:
    """The network that comes with the package, in the schemes of `mpsearch search`."""
    task, model = Digits(), digits()
    inputs = task.batches("calibration")[0][0]
    fold_batch_norms(model, task.forward, inputs)
    layers = trace_layers(model, task.forward, inputs)
    space = SearchSpace.build(layers, {f"w{b}": Integer(b) for b in (2, 3, 4, 6, 8)}, other_bits=other_bits(model, layers))
    moments = calibrate(model, task, layers, load_batches(task, "calibration", "cpu"))
    return QuantEngine(model, task, space, dict.fromkeys(space.schemes, ClipSearch()), moments)


class Pair:
    """One engine, with and without reuse."""

    def __init__(self, engine: QuantEngine) -> None:
        self.engine = engine
        for layer in engine.space.layers:  # quantizing is no part of what is measured
            for scheme in engine.space.schemes:
                engine.swaps(layer.name, scheme)

    def seconds(self, allocations: Sequence[Allocation]) -> tuple[np.ndarray, np.ndarray, float]:
        """(wall, processor) seconds `[n, 2]` of each allocation with reuse and without, what was set up included; most bytes."""
        engine = self.engine
        prefixes = [PrefixCache(engine.model, engine.task, engine.space, size) for size in (MAX_BYTES, 0)]
        engine._float_logits.clear()
        reference = engine.float_logits("search")
        wall, processor, most = np.zeros((len(allocations), 2)), np.zeros((len(allocations), 2)), 0
        for i, allocation in enumerate(allocations):
            found = {}
            for which in ((0, 1), (1, 0))[i % 2]:
                engine._prefix = prefixes[which]
                engine._scores.clear()
                engine._float_logits = {"search": reference} if allocation else {}  # the float pass is one to start from
                start = time.perf_counter(), time.process_time()
                found[which] = engine.score(allocation)
                wall[i, which], processor[i, which] = time.perf_counter() - start[0], time.process_time() - start[1]
            if found[0] != found[1]:
                raise AssertionError(f"{allocation}: {found[0]} with reuse, {found[1]} without")
            most = max(most, prefixes[0].n_bytes)
        return wall, processor, most


def measure(name: str, build: Callable[[], QuantEngine], repeats: int) -> list[Row]:
    engine = build()
    pair, space = Pair(engine), engine.space
    sensitivity = measure_sensitivity(engine, KL())
    evaluate = Evaluator(engine, [])
    sampler = Front(space, sensitivity, [Bytes().table(space)], [], 0)
    search(evaluate, sensitivity, sampler, n_trials=N_PROPOSALS + 30)
    trials = [e for e in evaluate.evaluations if e.trial is not None]
    n_before = len(trials) - N_PROPOSALS
    rng = np.random.default_rng(0)
    ones = [Allocation({group: scheme}) for group in space.names for scheme in space.schemes]
    drawn = [space.allocation(rng.integers(0, len(space.schemes), len(space.names))) for _ in range(20)]
    rows: list[Row] = []
    for case, allocations, skip, n_runs in (
        ("sensitivity sweep", [FLOAT, *ones], 0, repeats),
        (f"{N_PROPOSALS} trials of a search", [FLOAT, *(e.allocation for e in trials)], 1 + n_before, max(1, repeats // 3)),
        ("random allocations", drawn, 0, max(1, repeats // 3)),
    ):
        found = [pair.seconds(allocations) for _ in range(n_runs)]
        for unit, column in (("s", 0), ("processor s", 1)):
            totals = np.array([run[column][skip:].sum(0) for run in found])
            ratios = totals[:, 0] / totals[:, 1]
            n = len(allocations) - skip
            rows.append(
                {
                    "what": f"{name}, {n} scores",
                    "case": case,
                    "value": float(np.median(totals[:, 0])),
                    "unit": unit,
                    "rival": "whole passes",
                    "rival_value": float(np.median(totals[:, 1])),
                    "ratio": float(1 / np.median(ratios)),
                    "share": float(np.median(ratios)),
                    "shares": ratios.tolist(),
                }
            )
        most = max(run[2] for run in found) / 1e6
        rows.append({"what": f"{name}, {len(allocations)} scores", "case": f"{case}: most kept", "value": most, "unit": "MB"})
    return rows


def main() -> None:
    """Measure, print the table, and write it to the report folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure("digits", build_digits, 3 * arguments.repeats) + measure("ResNet-20", build_engine, arguments.repeats)
    rows.append(machine())
    lines = [
        "| what | case | with reuse | unit | whole passes | share | each repeat |",
        "| --- | --- | ---: | --- | ---: | ---: | --- |",
    ]
    for row in rows:
        value = f"{row['value']:.4g}" if isinstance(row["value"], float) else row["value"]
        rival, share, each = ("", "", "")
        if "rival" in row:
            rival, share = f"{row['rival_value']:.4g}", f"{row['share']:.3f}"
            each = ", ".join(f"{x:.3f}" for x in row["shares"])  # type: ignore[attr-defined]
        lines.append(f"| {row['what']} | {row['case']} | {value} | {row['unit']} | {rival} | {share} | {each} |")
    notes = [
        "One thread. Each allocation is scored with reuse and without in turns; scores were equal bit for bit. Finding and",
        "checking the places to start from is counted in. Seconds are medians of the repeats, share is with reuse over without.",
    ]
    write("bench_prefix", ["# bench_prefix", "", *lines, "", *notes], rows, arguments.json)


if __name__ == "__main__":
    main()
