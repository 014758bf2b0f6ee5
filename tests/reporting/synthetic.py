"""Runs made of formulas: as large as a test needs, without a network."""

from dataclasses import replace

import numpy as np

from mpsearch.allocation import Allocation, SearchSpace
from mpsearch.evaluation import Evaluation, SensitivityTable
from mpsearch.layer import LayerSpec
from mpsearch.registry import resolve
from mpsearch.runs.run import Run

PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")


def transformer(n_blocks):
    """Names of a transformer's layers."""
    return [*(f"model.layers.{i}.{name}" for i in range(n_blocks) for name in (*PROJECTIONS, "mlp.down_proj")), "lm_head"]


def resnet():
    """Names of a ResNet's layers."""
    stages = [f"layer{s}.{b}.conv{c}" for s in (1, 2, 3) for b in (0, 1, 2) for c in (1, 2)]
    return ["conv1", *stages, "layer2.0.downsample.0", "layer3.0.downsample.0", "linear"]


def run_of(
    names,
    *,
    schemes=("w2", "w3", "w4", "w6", "w8"),
    n=120,
    n_samples=400,
    quality="accuracy",
    kind="share",
    floats=(0.92, 0.915),
    budgets=None,
    timed=False,
    objectives=("size_bytes",),
    confirmed=12,
    effects=False,
    identity=None,
    seed=0,
):
    """A run of `n` allocations with a front; on the confirm split, with `confirmed` points, losses are 1.4 times as high."""
    rng = np.random.default_rng(seed)
    layers = [LayerSpec(name, "linear", (64, 64), 64 * 64 * 8, name, (name,)) for name in names]
    space = SearchSpace.build(layers, {name: resolve("scheme", name) for name in schemes}, other_bits=len(names) * 2048)
    groups = np.arange(len(names))
    bits = space.storage_bits / space.storage_bits[0].max()
    values = rng.lognormal(-5 - np.log(len(names)) / 2, 1.0, len(names))[:, None] * np.exp(-9 * (bits - bits.min()))
    cost = rng.uniform(1, 2, values.shape) * space.storage_bits / 1e4

    def evaluation(allocation, split, origin, trial=None):
        choice = space.choice(allocation) if allocation else None
        loss = 0.0 if choice is None else float(values[groups, choice].sum()) * float(np.exp(rng.normal() * 0.05))
        loss *= 1.4 if split == "confirm" else 1.0
        best = floats[split == "confirm"]
        score = best - 0.2 * min(loss, 2) + rng.normal() * 0.001 if kind == "share" else best * float(np.exp(min(loss, 2)))
        half = 0.01 * abs(best)
        size = space.size_bits(choice)
        ms = {"measured_ms": 1 + size / 1e6, "measured_ms_low": 0.99 + size / 1e6, "measured_ms_high": 1.01 + size / 1e6}
        times = {**ms, "measured_on": "a test"} if timed and split == "confirm" else {}
        other = {} if choice is None else {c: float(cost[groups, choice].sum()) for c in objectives if c != "size_bytes"}
        sizes = {"size_bytes": (size + 7) // 8, "average_bits": (size - space.other_bits) / space.numel}
        scores = {
            "quality": score,
            "quality_low": score - half,
            "quality_high": score + half,
            "fraction": size / space.size_bits(),
        }
        rest = {"feasible": True, "n_samples": n_samples, "seconds": 0.25, "costs": other, **times}
        return Evaluation(trial, origin, allocation, split, loss, loss, **sizes, **scores, **rest)

    tried = [space.uniform(name) for name in schemes]
    penalties = np.logspace(-9, -3, max(n // 3, 1)) * 100 / len(names) ** 0.5
    tried += [space.allocation((values + p * space.storage_bits).argmin(1)) for p in penalties]
    while len(tried) < n:
        noisy = values * rng.lognormal(0, 0.6, values.shape)
        tried.append(space.allocation((noisy + rng.choice(penalties) * space.storage_bits).argmin(1)))
    tried = list(dict.fromkeys(tried))
    rows = [evaluation(Allocation(), split, "float") for split in ("search", "confirm")[: 1 + bool(confirmed)]]
    rows += [evaluation(a, "search", "uniform" if i < len(schemes) else "knapsack", i) for i, a in enumerate(tried)]
    features = None
    if effects:
        features = np.sqrt(2 * values)[None] * np.array([0.8, 0.6])[:, None, None] * rng.choice([-1.0, 1.0], (2, len(names), 1))
    table = SensitivityTable(
        "gauss_newton", "nats", values, space, effects=None if features is None else features.astype(np.float32)
    )
    about = {"quality_name": quality, "quality_kind": kind, "model_name": "Net", "task_name": "noise", **(identity or {})}
    about.setdefault("data", {"calibration": "500 samples", "search": "400 samples", "confirm": "400 other samples"})
    costs = tuple(c for c in objectives if c != "size_bytes")
    run = Run(space, quality, rows, table, budgets or {}, about, objectives, costs)
    chosen = {e.allocation for e in run.front[:: max(1, len(run.front) // max(confirmed, 1))]} if confirmed else set()
    chosen |= {space.uniform(name) for name in schemes} if confirmed else set()
    return replace(run, evaluations=[*rows, *(evaluation(a, "confirm", "knapsack") for a in tried if a in chosen)])
