"""What the search benchmarks search: small trained networks, synthetic problems of any size, and the truth about one network."""

import functools
import gzip
import itertools
from pathlib import Path
from typing import Any

import numpy as np
from harness import PARTIAL, REPORTS, search_code
from networks import choice, load, quantize_all

from mpsearch.allocation import Allocation, SearchSpace
from mpsearch.engine.engine import QuantEngine
from mpsearch.evaluation import Score, SensitivityTable
from mpsearch.layer import LayerGroup, LayerSpec
from mpsearch.pipeline.sensitivity import measured_sensitivity
from mpsearch.runs.run import RunFolder
from mpsearch.schemes.integer import Integer

SPLITS: dict[str, dict[str, Any]] = {"stories260k": {"n_confirm": 96}}  # where a task's default takes long
TRUTH = REPORTS / "bench_search" / "digits.csv.gz"
WIDTHS = (2, 3, 4, 6, 8)  # the default schemes


class Synthetic:
    """`n` groups that interact in a known way, sizes spread over two decades; scored by a formula.

    The error of a group is a vector: its amplitude halves with every bit, its direction is fixed. Errors add up as vectors in 32
    features that neighbours share, so that they reinforce or cancel one another. The loss is half their squared length, amplified
    where early and late errors meet, and saturates at log(1000): loss = C (1 - exp(-q (1 + 0.3 q) / C)), q = |sum_g e_g|^2 / 2.
    """

    def __init__(self, n: int, bits: tuple[int, ...] = WIDTHS, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        numel = np.maximum(64, 10 ** rng.uniform(2.5, 4.5, n)).astype(int)
        layers = [LayerSpec(f"g{i}", "linear", (64, int(k) // 64 + 1), int(k), f"g{i}", (f"g{i}",)) for i, k in enumerate(numel)]
        groups = tuple(LayerGroup(layer.name, (layer,)) for layer in layers)
        schemes = {f"w{b}": Integer(b) for b in bits}
        self.space = SearchSpace(groups, schemes, tuple(tuple(schemes) for _ in groups), 0)
        walk = np.cumsum(rng.normal(size=(n, 32)), axis=0) * 0.3 + rng.normal(size=(n, 32))
        self.directions = walk / np.linalg.norm(walk, axis=1)[:, None] * rng.choice([1, -1], size=(n, 1))
        scale = np.exp(rng.normal(0, 1, n)) * (numel / numel.mean()) ** 0.25 * 3 / np.sqrt(n)
        self.amplitudes = scale[:, None] * 2.0 ** -(np.array(bits) - 2) * np.exp(rng.normal(0, 0.15, (n, len(bits))))

    def score(self, allocation: Allocation, split: str = "search") -> Score:
        """By the formula; the quality is exp(-loss)."""
        error = np.zeros(32)
        if allocation:
            chosen = self.space.choice(allocation)
            error = self.amplitudes[np.arange(len(chosen)), chosen] @ self.directions
        q, top = 0.5 * float(error @ error), np.log(1000)
        loss = float(top * -np.expm1(-q * (1 + 0.3 * q) / top))
        quality = float(np.exp(-loss))
        return Score(loss, float("nan"), quality, quality, quality, float("nan"), 0, np.empty(0))

    def sensitivity(self) -> SensitivityTable:
        """Of each group alone, where q is small: half the squared amplitude."""
        return SensitivityTable("kl", "nats", np.square(self.amplitudes) / 2, self.space, exact=True)


@functools.lru_cache(maxsize=2)
def problem(name: str) -> QuantEngine | Synthetic:
    """A network in the default schemes on its task's default splits, everything quantized; or "synthetic1000".

    "digits_truth" has three schemes, so that all allocations can be measured (`truth`).
    """
    if name.startswith("synthetic"):
        return Synthetic(int(name.removeprefix("synthetic")))
    widths, name = ((2, 3, 4), "digits") if name == "digits_truth" else (WIDTHS, name)
    engine = load(name, tuple(f"w{bits}" for bits in widths), "kronecker_descent", **SPLITS.get(name, {}))
    quantize_all(engine)
    for split in ("search", "confirm"):
        engine.float_logits(split)
    return engine


@functools.lru_cache(maxsize=16)
def sensitivity(name: str, metric: str) -> SensitivityTable:
    """Of a problem, by a metric of the registry; of a synthetic one always its own."""
    engine = problem(name)
    if isinstance(engine, Synthetic):
        return engine.sensitivity()
    run, made = RunFolder(folder(f"{name}-{metric}")), choice("metric", metric)
    return measured_sensitivity(engine, made, run, run.read_sensitivity(engine.space, made.name))


def folder(name: str) -> Path:
    """Where what an interrupted benchmark of searches has measured with the code as it is now is kept."""
    path = PARTIAL / f"search-{search_code()}" / name
    path.mkdir(parents=True, exist_ok=True)
    return path


def truth() -> tuple[np.ndarray, np.ndarray]:
    """All choices intp `[n, n_groups]` of the digits network, and their losses float64 `[n]` on the search split; from a file."""
    engine = problem("digits_truth")
    if not TRUTH.exists():
        space = engine.space
        every = (space.allocation(choice) for choice in itertools.product(range(len(space.schemes)), repeat=len(space.names)))
        rows = [f"{space.encode(allocation)},{engine.score(allocation).loss:.6g}\n" for allocation in every]
        TRUTH.write_bytes(gzip.compress(("allocation,kl\n" + "".join(rows)).encode(), mtime=0))
    with gzip.open(TRUTH, "rt") as stream:
        pairs = [line.strip().split(",") for line in stream][1:]
    return np.array([list(code) for code, _ in pairs]).astype(np.intp), np.array([float(loss) for _, loss in pairs])
