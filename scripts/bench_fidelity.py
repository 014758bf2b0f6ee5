"""What stopping trials early saves on ResNet-20: images run through the network until a hypervolume is reached.

    python scripts/bench_fidelity.py [--seeds 2] [--trials 200] [--json FILE]

The same search three times: every trial on all search images; with rungs after an eighth, a quarter and a half of them; and with
rungs and sensitivities on a quarter (`metric.share=0.25`). The sensitivities' images are counted. The hypervolume is that of what
was measured whole. Scores are kept between the three, so that each allocation really runs once. Written to
reports/bench_fidelity/.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from bench_resnet20 import BITS, DATA, build_engine

from mpsearch.allocation import Allocation
from mpsearch.costs.size import Bytes
from mpsearch.engine import QuantEngine
from mpsearch.evaluation import Evaluation, Score, Stop
from mpsearch.metrics.kl import KL
from mpsearch.pareto import hypervolume
from mpsearch.samplers.front import Front
from mpsearch.search import Evaluator, search
from mpsearch.sensitivity import measure_sensitivity

REPORTS = Path(__file__).parent.parent / "reports" / "bench_fidelity"
RUNGS = (0.125, 0.25, 0.5)


class Counted:
    """The engine, each allocation measured whole once, with its loss after every batch; stops are applied to what is known."""

    def __init__(self, engine: QuantEngine) -> None:
        self.engine, self.space, self.batches = engine, engine.space, engine.batches
        self.known: dict[Allocation, Score] = {}
        self.images = 0

    def score(self, allocation: Allocation, split: str = "search", stops: Sequence[Stop] = ()) -> Score:
        """As `QuantEngine.score`; adds to `images` what it would have run."""
        sizes = np.cumsum([len(targets) for _, targets in self.batches("search")])
        if allocation not in self.known:
            self.known[allocation] = self.engine.score(allocation, "search", [(n, np.inf) for n in range(1, len(sizes))])
        whole = self.known[allocation]
        rungs: list[float] = []
        for n, most in stops if allocation else ():
            rungs.append(whole.rung_losses[n - 1])
            if rungs[-1] > most:
                self.images += int(sizes[n - 1])
                return replace(whole, loss=rungs[-1], rung_losses=tuple(rungs), stopped=True, n_samples=int(sizes[n - 1]))
        self.images += int(sizes[-1]) if allocation else 0
        return replace(whole, rung_losses=tuple(rungs))


def run(engine: Counted, seed: int, rungs: Sequence[float], share: float, n_trials: int) -> tuple[list[tuple[int, float]], int]:
    """((images, hypervolume) after each trial, the number of trials that stopped early)."""
    engine.images = 0
    table = measure_sensitivity(engine, KL(share))  # type: ignore[arg-type]
    corner = [engine.known.get(a) or engine.score(a) for a in (engine.space.uniform("w8"), engine.space.uniform("w2"))]
    bits = (
        engine.space.size_bits(engine.space.choice(engine.space.uniform("w8"))) - engine.space.other_bits
    ) / engine.space.numel
    found: list[Evaluation] = []
    curve: list[tuple[int, float]] = []

    def record(evaluation: Evaluation) -> None:
        if evaluation.origin != "float" and not evaluation.stopped:
            found.append(evaluation)
        if evaluation.trial is not None:
            points = np.array([(e.average_bits, e.loss) for e in found])
            curve.append((engine.images, hypervolume(points[:, 0], points[:, 1], bits, corner[1].loss)))

    evaluate = Evaluator(engine, [], record)  # type: ignore[arg-type]
    sampler = Front(engine.space, table, [Bytes().table(engine.space)], [], seed)
    search(evaluate, table, sampler, n_trials=n_trials, rung_shares=rungs)
    return curve, sum(e.stopped for e in evaluate.evaluations)


def images_until(curve: list[tuple[int, float]], level: float) -> float:
    """The images after which the hypervolume is at least `level`; infinite where it never is."""
    return next((float(images) for images, reached in curve if reached >= level), np.inf)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    engine = Counted(build_engine(n_search=400, batch_size=25))
    modes = {"every trial whole": ((), 1.0), "rungs": (RUNGS, 1.0), "rungs, sensitivities on a quarter": (RUNGS, 0.25)}
    curves: dict[str, list[list[tuple[int, float]]]] = {mode: [] for mode in modes}
    rows: list[dict[str, object]] = []
    lines = ["| seed | search | images | stopped | hypervolume | 99.5 % of the least final one after | saved |"]
    lines += ["| ---: | --- | ---: | ---: | ---: | ---: | ---: |"]
    for seed in range(arguments.seeds):
        got = {}
        for mode, (rungs, share) in modes.items():
            curve, stopped = run(engine, seed, rungs, share, arguments.trials)
            got[mode] = curve, stopped
            curves[mode].append(curve)
        level = 0.995 * min(curve[-1][1] for curve, _ in got.values())
        whole = images_until(got["every trial whole"][0], level)
        total = got["every trial whole"][0][-1][0]
        for mode, (curve, stopped) in got.items():
            until = images_until(curve, level)
            lines.append(
                f"| {seed} | {mode} | {curve[-1][0]:,} ({total / curve[-1][0]:.2f}x fewer) | {stopped} | {curve[-1][1]:.3f} | "
                f"{until:,.0f} | {whole / until:.2f}x |"
            )
            case = f"{mode}, seed {seed}"
            rows.append({"what": "images in all", "case": case, "value": curve[-1][0], "ratio": total / curve[-1][0]})
            rows.append({"what": "hypervolume", "case": case, "value": curve[-1][1]})
            rows.append({"what": "images until 99.5 %", "case": case, "value": until, "ratio": whole / until})
        print("\n".join(lines), flush=True)
    fig, axes = plt.subplots(figsize=(7, 4.2))
    for color, (mode, those) in zip(("tab:gray", "tab:blue", "tab:orange"), curves.items(), strict=True):
        for i, curve in enumerate(those):
            axes.plot(*zip(*curve, strict=True), color=color, label=mode if i == 0 else None)
    axes.set(xlabel="images run through the network, sensitivities counted", ylabel="hypervolume", xscale="log")
    axes.legend()
    axes.grid(alpha=0.3)
    REPORTS.mkdir(parents=True, exist_ok=True)
    fig.savefig(REPORTS / "hypervolume.png", dpi=130, bbox_inches="tight")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    about = f"ResNet-20, 400 search images in batches of 25, {len(BITS)} widths, clip search; {commit}, {datetime.date.today()}."
    page = ["# bench_fidelity: trials that stop early", "", about, "", *lines, "", "![](hypervolume.png)", ""]
    (REPORTS / "table.md").write_text("\n".join(page))
    rows.append({"what": "machine", "case": f"{os.cpu_count()} cores, torch {torch.__version__}"})
    for file in (REPORTS / "rows.json", arguments.json):
        if file is not None:
            file.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    assert DATA.is_dir(), f"no data at {DATA}; set MPSEARCH_DATA"
    main()
