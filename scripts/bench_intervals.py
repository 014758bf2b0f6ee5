"""How often the 95 % intervals of `mpsearch.intervals` contain the true difference."""

from collections.abc import Iterator

import numpy as np
import torch
from harness import Row, benchmark
from networks import load
from scipy.stats import binom, bootstrap

from mpsearch.intervals import cluster_values, paired_interval, proportion_interval

MOST_DISCORDANT = 75  # pairs; more have no probability at the expected numbers below
GAINED = (0.0, 0.1, 0.25, 0.5)
SPLITS = {"stories260k": {"n_calibration": 1, "n_search": 1, "n_confirm": 320}, "smollm2": {"n_confirm": None, "window": 160}}


@benchmark(
    "coverage_shares",
    samples=(100, 200, 400, 1000, 5000),
    discordant=(0.05, 0.2, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 15.0, 20.0, 30.0, 40.0),
    quick={"samples": (100,), "discordant": (5.0,)},
    chart={"x": "discordant", "y": "value", "line": "samples", "log": "x"},
)
def coverage_shares(samples: int, discordant: float) -> Iterator[Row]:
    """Intervals of differences of shares (accuracies), paired: their coverage, exactly, from the probabilities of all counts.

    Of `samples` pairs of hits and misses `discordant` differ on average; the value is the lowest over shares of them that are
    for the better.
    """
    pairs = np.array([(b, c) for b in range(MOST_DISCORDANT + 1) for c in range(MOST_DISCORDANT + 1 - b) if b + c <= samples])
    low, high = np.array([proportion_interval(int(b), int(c), samples) for b, c in pairs]).T
    total, coverages = pairs.sum(1), []
    for share in GAINED:
        chance = binom.pmf(total, samples, discordant / samples) * binom.pmf(pairs[:, 0], total, share)
        truth = discordant * (2 * share - 1) / samples
        coverages.append(float(chance[(low <= truth) & (truth <= high)].sum()))
    yield {"value": min(coverages), "unit": "coverage", "rival": "95 %", "rival_value": 0.95, "ratio": min(coverages) / 0.95}


@benchmark(
    "coverage_texts",
    network=("stories260k", "smollm2"),
    scheme=("w3", "w4", "w6"),
    texts=(16, 32, 64, 128),
    draws=(2000,),
    quick={"network": ("stories260k",), "scheme": ("w4",), "texts": (16,), "draws": (3,)},
)
def coverage_texts(network: str, scheme: str, texts: int, draws: int) -> Iterator[Row]:
    """Intervals of differences of perplexities, clustered by text, against BCa bootstrap intervals.

    Texts are drawn with replacement from those whose losses were measured on each network, rounded to nearest; the true
    difference is that over all of them.
    """
    engine = load(network, ("w3", "w4", "w6"), "round_to_nearest", **SPLITS[network])
    targets = torch.cat([y for _, y in engine.batches("confirm")])
    base = engine.task.cross_entropy(engine.float_logits("confirm"), targets).double()
    with torch.no_grad(), engine.applied(engine.space.uniform(scheme)) as model:
        logits = torch.cat([engine.task.forward(model, x) for x, _ in engine.batches("confirm")])
    difference = (engine.task.cross_entropy(logits, targets).double() - base).numpy()
    text = engine.task.clusters("confirm").numpy()
    parts = [difference[text == i] for i in np.unique(text)]
    if texts > len(parts):
        return
    truth, rng = difference.mean(), np.random.default_rng(0)
    values, hits = np.empty((draws, texts)), 0
    for i, drawn in enumerate(rng.integers(0, len(parts), (draws, texts))):
        chosen = [parts[j] for j in drawn]
        values[i] = cluster_values(np.concatenate(chosen), np.repeat(np.arange(texts), [len(part) for part in chosen]))
        low, high = paired_interval(values[i], np.zeros(texts))
        hits += low <= truth <= high
    bca = bootstrap((values,), np.mean, axis=1, n_resamples=999, method="BCa", batch=20, rng=rng).confidence_interval
    rival = float(((bca.low <= truth) & (truth <= bca.high)).mean())
    yield {
        "value": hits / draws,
        "unit": "coverage",
        "rival": "BCa",
        "rival_value": rival,
        "ratio": hits / draws / max(rival, 1e-9),
    }
