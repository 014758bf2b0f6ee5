"""How well sensitivity metrics predict the loss that is measured."""

import functools
import importlib.util
import time
from collections.abc import Iterator

import numpy as np
import torch
from harness import Row, UnavailableError, benchmark
from networks import choice, load, quantize_all
from scipy.stats import kendalltau
from torch import Tensor, nn

from mpsearch.engine.calibrate import calibrate
from mpsearch.engine.engine import QuantEngine
from mpsearch.pipeline.prepare import prepare
from mpsearch.pipeline.sensitivity import measure_sensitivity
from mpsearch.tasks.base import Task
from mpsearch.tasks.makers import classification

SMALLEST, LARGEST = 1e-5, 0.05  # of the measured losses that count: below is rounding, above the loss is not quadratic
WITHIN = (0.8, 1.25)
SCHEMES = {"minilm": ("w3", "w4")}
SPLITS = {
    "resnet20": {"n_calibration": 500, "n_search": 1000},
    "stories260k": {"n_calibration": 32, "n_search": 32, "n_confirm": 8, "window": 64},
    "minilm": {"n_calibration": 100, "n_search": 50, "n_confirm": 50, "batch_size": 10},
}


class SequenceFirst(nn.Module):
    """Token ids `[n, tokens]` -> logits `[n, 10]`, the most frequent residue; the encoder takes `[tokens, n, width]`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=False)
        self.embed, self.head = nn.Embedding(100, 32), nn.Linear(32, 10)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Of the mean over the tokens."""
        return self.head(self.encoder(self.embed(ids).transpose(0, 1)).mean(0))


def trained_sequence_first() -> tuple[nn.Module, Task]:
    """The network after 300 steps, and its task on other sequences."""
    generator = torch.Generator().manual_seed(0)

    def drawn(n: int) -> tuple[Tensor, Tensor]:
        ids = torch.randint(100, (n, 16), generator=generator)
        return ids, nn.functional.one_hot(ids % 10, 10).sum(1).argmax(1)

    model = SequenceFirst()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(300):
        ids, targets = drawn(128)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(ids), targets).backward()
        optimizer.step()
    return model.eval(), classification(calibration=drawn(200), search=drawn(200), confirm=drawn(200), batch_size=50)


@functools.lru_cache(maxsize=1)
def engine_of(network: str) -> QuantEngine:
    """Its weights rounded to nearest: the quantizer does not matter here."""
    schemes = SCHEMES.get(network, ("w2", "w3", "w4", "w6", "w8"))
    if network != "sequence_first":
        return load(network, schemes, "round_to_nearest", **SPLITS.get(network, {}))
    model, task = trained_sequence_first()
    prepared = prepare(model, task, schemes=schemes, quantizer="round_to_nearest")
    moments = calibrate(prepared.model, task, prepared.space.layers, prepared.calibration)
    return QuantEngine(prepared.model, task, prepared.space, prepared.plan.quantizers, moments)


@functools.lru_cache(maxsize=1)
def losses(network: str) -> tuple[np.ndarray, float]:
    """Measured, with processor seconds."""
    return _timed(engine_of(network), "kl")


@benchmark(
    "metric_accuracy",
    network=("digits", "resnet20", "stories260k", "minilm", "sequence_first"),
    metric=("gauss_newton", "fisher"),
    code=("today", "before"),
    quick={"network": ("digits",), "metric": ("gauss_newton",), "code": ("today",)},
)
def accuracy(network: str, metric: str, code: str) -> Iterator[Row]:
    """Predicted over measured loss (KL divergence on the search data) of each layer and scheme.

    The median ratio, and the share of the ratios within 0.8 to 1.25, are of the pairs whose measured loss is between 1e-5 and
    0.05; Kendall's tau is of all pairs, and the mean over schemes of the layers' within a scheme. The cost is in processor
    seconds, against measuring the losses. "before" is the package of ac21e31, where features were squared position by position;
    it is measured where that commit's `mpsearch` is the one that is imported.
    """
    if (code == "today") == (importlib.util.find_spec("mpsearch.metrics.samples") is None):
        raise UnavailableError(f"the package is not that of {code}")
    engine = engine_of(network)
    quantize_all(engine)
    measured, seconds = losses(network)
    predicted, cost = _timed(engine, metric)
    counted = (measured >= SMALLEST) & (measured <= LARGEST)
    ratios = predicted[counted] / measured[counted]
    low, high = np.quantile(ratios, (0.05, 0.95))
    yield {"what": "predicted / measured, median", "value": float(np.median(ratios)), "unit": "1", "pairs": len(ratios)}
    yield {"what": "predicted / measured, 5 % quantile", "value": float(low), "unit": "1", "pairs": len(ratios)}
    yield {"what": "predicted / measured, 95 % quantile", "value": float(high), "unit": "1", "pairs": len(ratios)}
    share = float(np.mean((ratios > WITHIN[0]) & (ratios < WITHIN[1])))
    yield {"what": "within 0.8 to 1.25", "value": 100 * share, "unit": "%", "pairs": len(ratios)}
    within = [kendalltau(measured[:, j], predicted[:, j]).statistic for j in range(measured.shape[1])]
    yield {"what": "tau of all values", "value": float(kendalltau(measured, predicted).statistic), "unit": "tau"}
    yield {"what": "tau of layers within a scheme", "value": float(np.mean(within)), "unit": "tau"}
    times = {"rival": "measured losses", "rival_value": seconds, "ratio": seconds / cost}
    yield {"what": "cost", "value": cost, "unit": "s", **times}


def _timed(engine: QuantEngine, metric: str) -> tuple[np.ndarray, float]:
    """A metric's values `[n_groups, n_schemes]`, and processor seconds."""
    start = time.process_time()
    values = measure_sensitivity(engine, choice("metric", metric)).values
    return values, time.process_time() - start
