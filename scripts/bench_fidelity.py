"""What stopping trials early saves on ResNet-20: images run through the network until a hypervolume is reached.

    python scripts/bench_fidelity.py [--seeds 3] [--trials 200] [--json FILE]

The same search four times: every trial and every sensitivity (`metric=kl`) on all search images; with rungs, and sensitivities
on a sixteenth (`metric=kl_hardest`); with `metric=gauss_newton`, every trial on all images; and with that and rungs. The images
of the sensitivities are counted (those of gauss_newton once forward, twice for each backward pass, and once for each scheme, for
which every layer runs again), and of a trial that goes on those that it had not seen.
The hypervolume is that of what was measured whole. Losses are kept in build/fidelity/, batch by batch, so that nothing runs
twice, whichever search asks for it. Written to reports/bench_fidelity/.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from bench_resnet20 import BITS, DATA, build_engine
from pages import REPORTS, Row, machine, write

from mpsearch.allocation import ALPHABET, Allocation
from mpsearch.costs.size import Bytes
from mpsearch.engine import QuantEngine
from mpsearch.evaluation import Evaluation, Score, Stop
from mpsearch.metrics.base import SensitivityMetric
from mpsearch.metrics.gauss_newton import FEWEST_FEATURES, GaussNewton
from mpsearch.metrics.kl import KL
from mpsearch.pareto import hypervolume
from mpsearch.samplers.front import Front
from mpsearch.search import Evaluator, search
from mpsearch.sensitivity import measure_sensitivity

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "build" / "fidelity" / "resnet20.csv"
RUNGS = (0.125, 0.25, 0.5)
MODES: dict[str, tuple[tuple[float, ...], SensitivityMetric]] = {
    "all on all images": ((), KL()),
    "rungs, sensitivities on a sixteenth": (RUNGS, KL(0.0625)),
    "gauss_newton": ((), GaussNewton()),
    "gauss_newton, rungs": (RUNGS, GaussNewton()),
}


class Counted:
    """The engine, with each allocation's loss after each of its first batches, in a file; `images` is what would have run."""

    def __init__(self, engine: QuantEngine, file: Path) -> None:
        self.engine, self.space, self.batches, self.file = engine, engine.space, engine.batches, file
        self.sizes = [0, *np.cumsum([len(targets) for _, targets in self.batches("search")]).tolist()]
        self.known: dict[str, tuple[float, ...]] = {}
        file.parent.mkdir(parents=True, exist_ok=True)
        for row in file.read_text().splitlines() if file.exists() else ():
            code, *losses = row.split(",")
            if len(losses) > len(self.known.get(code, ())):
                self.known[code] = tuple(map(float, losses))
        self.restart()

    def restart(self) -> None:
        """Another search begins."""
        self.images, self.seen = 0, dict[Allocation, int]()

    def losses(self, allocation: Allocation, n: int) -> tuple[float, ...]:
        """After each of the first `n` batches, at least."""
        code = "".join(
            ALPHABET[self.space.scheme_names.index(allocation[g])] if g in allocation else "-" for g in self.space.names
        )
        if len(self.known.get(code, ())) < n:
            never = [(i, np.inf) for i in range(1, n)]
            self.known[code] = self.engine.score(allocation, "search", [*never, (n, -1.0)]).rung_losses
            with open(self.file, "a") as stream:
                stream.write(",".join([code, *map(repr, self.known[code])]) + "\n")
        return self.known[code]

    def score(self, allocation: Allocation, split: str = "search", stops: Sequence[Stop] = ()) -> Score:
        """As `QuantEngine.score`; of the score the losses are filled in."""
        end, stopped = len(self.sizes) - 1, False
        for n, most in stops:
            if most < np.inf and (self.losses(allocation, n)[n - 1] if allocation else 0.0) > most:
                end, stopped = n, True
                break
        found = self.losses(allocation, end) if allocation else (0.0,) * end
        seen = self.seen.get(allocation, 0) if allocation else self.sizes[end]
        self.images += max(self.sizes[end] - seen, 0)
        self.seen[allocation] = max(self.sizes[end], seen)
        rungs = tuple(found[n - 1] for n, _ in stops if n <= end)
        nan = float("nan")
        return Score(found[end - 1], nan, nan, nan, nan, nan, self.sizes[end], np.empty(0), rungs, stopped)


def run(
    engine: Counted, seed: int, rungs: Sequence[float], metric: SensitivityMetric, n_trials: int
) -> tuple[list[tuple[int, float]], int]:
    """((images, hypervolume) after each trial, the number of allocations that were left for good)."""
    engine.restart()
    if isinstance(metric, GaussNewton):
        table = measure_sensitivity(engine.engine, metric)
        n_images = engine.sizes[-1]
        engine.images = (1 + 2 * math.ceil(FEWEST_FEATURES / n_images) + len(BITS)) * n_images
    else:
        table = measure_sensitivity(engine, metric)  # type: ignore[arg-type]
    space, worst = engine.space, engine.losses(engine.space.uniform("w2"), len(engine.sizes) - 1)[-1]
    bits = (space.size_bits(space.choice(space.uniform("w8"))) - space.other_bits) / space.numel
    found: list[Evaluation] = []
    curve: list[tuple[int, float]] = []

    def record(evaluation: Evaluation) -> None:
        if evaluation.origin != "float" and not evaluation.stopped:
            found.append(evaluation)
        if evaluation.trial is not None:
            points = np.array([(e.average_bits, e.loss) for e in found])
            curve.append((engine.images, hypervolume(points[:, 0], points[:, 1], bits, worst)))

    evaluate = Evaluator(engine, [], record)  # type: ignore[arg-type]
    sampler = Front(space, table, [Bytes().table(space)], [], seed)
    search(evaluate, table, sampler, n_trials=n_trials, rung_shares=rungs)
    whole = {e.allocation for e in evaluate.evaluations if not e.stopped}
    return curve, len({e.allocation for e in evaluate.evaluations} - whole)


def images_until(curve: list[tuple[int, float]], level: float) -> float:
    """The images after which the hypervolume is at least `level`; infinite where it never is."""
    return next((float(images) for images, reached in curve if reached >= level), np.inf)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    engine = Counted(build_engine(n_search=400, batch_size=25), KEPT)
    curves: dict[str, list[list[tuple[int, float]]]] = {mode: [] for mode in MODES}
    rows: list[Row] = []
    lines = ["| seed | search | images | left for good | hypervolume | 99.5 % of the least final one after | saved |"]
    lines += ["| ---: | --- | ---: | ---: | ---: | ---: | ---: |"]
    for seed in range(arguments.seeds):
        got = {}
        for mode, (rungs, metric) in MODES.items():
            curve, stopped = run(engine, seed, rungs, metric, arguments.trials)
            got[mode] = curve, stopped
            curves[mode].append(curve)
        level = 0.995 * min(curve[-1][1] for curve, _ in got.values())
        whole = images_until(got["all on all images"][0], level)
        total = got["all on all images"][0][-1][0]
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
    for color, (mode, those) in zip(("tab:gray", "tab:blue", "tab:green", "tab:orange"), curves.items(), strict=True):
        for i, curve in enumerate(those):
            axes.plot(*zip(*curve, strict=True), color=color, label=mode if i == 0 else None)
    axes.set(xlabel="images run through the network, sensitivities counted", ylabel="hypervolume", xscale="log")
    most = max(reached for those in curves.values() for curve in those for _, reached in curve)
    axes.set(xlim=(8e3, None), ylim=(0.88 * most, 1.005 * most))
    axes.legend()
    axes.grid(alpha=0.3)
    rows.append(machine())
    about = f"ResNet-20, 400 search images in batches of 25, {len(BITS)} widths, clip search."
    page = [
        "# bench_fidelity: trials that stop early",
        "",
        about,
        "",
        *lines,
        "",
        "![](hypervolume.png)",
        "",
        str(rows[-1]["case"]),
    ]
    write("bench_fidelity", page, rows, arguments.json)
    fig.savefig(REPORTS / "bench_fidelity" / "hypervolume.png", dpi=130, bbox_inches="tight")


if __name__ == "__main__":
    assert DATA.is_dir(), f"no data at {DATA}; set MPSEARCH_DATA"
    main()
