"""The problems of `bench_search.py`: networks small enough to be scored many thousand times, and made-up ones of any size.

Every problem has what the search asks of an engine (`space`, `score`), and keeps what was scored in a file that all samplers
share, also those that run beside each other: `<cache>/<name>.csv`, one row an allocation, appended before the next is scored. A
score is paid once, whoever asks for it. Seconds are processor seconds of one thread, whatever else the machine does.
"""

from __future__ import annotations

import itertools
import os
import time
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpsearch.allocation import Allocation, SearchSpace
from mpsearch.engine.calibrate import calibrate
from mpsearch.engine.engine import QuantEngine
from mpsearch.engine.scoring import load_batches
from mpsearch.evaluation import Score
from mpsearch.graph.fold import fold_batch_norms
from mpsearch.graph.sharing import share
from mpsearch.graph.trace import trace_layers
from mpsearch.graph.unsearched import other_bits
from mpsearch.layer import LayerGroup, LayerSpec
from mpsearch.models.bert import minilm
from mpsearch.models.digits import digits
from mpsearch.models.efficientnet import efficientnet_lite0
from mpsearch.models.llama import stories260k
from mpsearch.models.resnet import resnet
from mpsearch.quantizers.kronecker_descent import KroneckerDescent
from mpsearch.schemes.integer import Integer
from mpsearch.tasks.base import Task
from mpsearch.tasks.cifar10 import Cifar10
from mpsearch.tasks.classification import Classification
from mpsearch.tasks.digits import Digits
from mpsearch.tasks.imagenet import ImageNetSample
from mpsearch.tasks.language import Stories
from mpsearch.tasks.stsb import STSBenchmark

DATA = Path(os.environ.get("MPSEARCH_DATA", "../shared/data"))
COLUMNS = "allocation,loss,quality,seconds"


class Problem:
    """A space and what every allocation in it scores, looked up in the file `<cache>/<name>.csv` where it is known."""

    def __init__(self, name: str, space: SearchSpace, cache: Path) -> None:
        self.name, self.space, self.file = name, space, cache / f"{name}.csv"
        cache.mkdir(parents=True, exist_ok=True)
        self.known: dict[str, tuple[float, float, float]] = {}
        self._read = 0  # bytes of the file
        if not self.file.exists():
            self.file.write_text(COLUMNS + "\n")
        self.look_up()
        self.seconds = 0.0  # what all that was asked for so far took when it was measured
        self.spent = 0.0  # what was measured just now

    def look_up(self) -> None:
        """Read what has come to the file since, from whichever process; a row that a kill cut short is scored again."""
        with open(self.file, "rb") as stream:
            stream.seek(self._read)
            new = stream.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._read += len(whole)
        for row in whole.decode().splitlines():
            code, *values = row.split(",")
            if row != COLUMNS and len(values) == 3:
                self.known[code] = tuple(map(float, values))  # type: ignore[assignment]

    def measure(self, allocation: Allocation) -> tuple[float, float, float]:
        """(loss, quality, processor seconds), really measured."""
        raise NotImplementedError

    def score(self, allocation: Allocation, split: str = "search") -> Score:
        """As `QuantEngine.score`, on the search split; of the score the loss and the quality are filled in."""
        code = self.encode(allocation)
        if code not in self.known:
            self.look_up()
        if code not in self.known:
            start = time.process_time()
            self.remember(allocation, *self.measure(allocation))
            self.spent += time.process_time() - start
        loss, quality, seconds = self.known[code]
        self.seconds += seconds
        return Score(loss, float("nan"), quality, quality, quality, float("nan"), 0, np.empty(0))

    def remember(self, allocation: Allocation, loss: float, quality: float, seconds: float) -> None:
        """Keep a score, on disk too."""
        code = self.encode(allocation)
        self.known[code] = loss, quality, seconds
        with open(self.file, "a") as stream:
            stream.write(",".join([code, *(f"{value:.9g}" for value in self.known[code])]) + "\n")

    def encode(self, allocation: Allocation) -> str:
        """One character a group, "-" where it stays float."""
        index = {name: i for i, name in enumerate(self.space.scheme_names)}
        return "".join(np.base_repr(index[allocation[g]], 36) if g in allocation else "-" for g in self.space.names)


class Network(Problem):
    """A trained network, scored by the real engine; the engine is built when the first score is asked for that is not known."""

    def __init__(
        self, name: str, model: nn.Module, task: Task, bits: tuple[int, ...], cache: Path, shared: tuple[str, ...] = ()
    ) -> None:
        inputs = task.batches("calibration")[0][0]
        fold_batch_norms(model, task.forward, inputs)
        self.model, self.task = model, task
        self.layers = share(trace_layers(model, task.forward, inputs), shared)
        space = SearchSpace.build(self.layers, {f"w{b}": Integer(b) for b in bits}, (), other_bits(model, self.layers))
        super().__init__(name, space, cache)

    @cached_property
    def engine(self) -> QuantEngine:
        """The real one, everything quantized (and kept in a file): that is no part of what an evaluation costs."""
        bank = self.file.with_suffix(".bank")
        quantizers = dict.fromkeys(self.space.schemes, KroneckerDescent())
        if bank.exists():
            weights, biases = torch.load(bank, weights_only=False)
            engine = QuantEngine(self.model, self.task, self.space, quantizers, {}).with_weights(weights, biases)
        else:
            moments = calibrate(self.model, self.task, self.layers, load_batches(self.task, "calibration", "cpu"))
            engine = QuantEngine(self.model, self.task, self.space, quantizers, moments)
        pairs = list(itertools.product((layer.name for layer in self.space.layers), self.space.schemes))
        for pair in pairs:
            engine.swaps(*pair)
        if not bank.exists():
            torch.save(({pair: engine.quantized(*pair) for pair in pairs}, {pair: engine.biases(*pair) for pair in pairs}), bank)
        engine.float_logits("search")
        return engine

    def measure(self, allocation: Allocation) -> tuple[float, float, float]:
        """By the engine."""
        engine = self.engine
        start = time.process_time()
        score = engine.score(allocation)
        return score.loss, score.quality, time.process_time() - start


def digits_problem(cache: Path) -> Network:
    """The digits network, its 10 layers at 2, 3 or 4 bits: 59,049 allocations, 400 search images."""
    return Network("digits", digits(), Digits(), (2, 3, 4), cache)


@torch.no_grad()
def enumerate_digits(problem: Network) -> None:
    """Score all 59,049 allocations of the digits network, block by block: what stands before a block is run once."""
    engine, model = problem.engine, problem.model
    names = problem.space.names
    parts = [
        [i for i, name in enumerate(names) if name.startswith(part)] for part in ("stem", "block1", "block2", "block3", "linear")
    ]
    runs = [
        lambda x: F.relu(model.stem_bn(model.stem(x))),
        model.block1,
        model.block2,
        model.block3,
        lambda x: model.linear(x.mean((2, 3))),
    ]
    reference = engine.float_logits("search")
    targets = torch.cat([target for _, target in engine.batches("search")])
    start = time.process_time()
    for scheme in problem.space.scheme_names:
        engine.score(problem.space.uniform(scheme))
    seconds = (time.process_time() - start) / len(problem.space.schemes)  # what a whole pass takes

    def descend(depth: int, outputs: list[Tensor], chosen: Allocation) -> None:
        if depth == len(parts):
            logits = torch.cat(outputs)
            quality = problem.task.quality(logits, targets).double().mean().item()
            problem.remember(chosen, engine.divergence.mean(logits, reference), quality, seconds)
            return
        for schemes in itertools.product(problem.space.scheme_names, repeat=len(parts[depth])):
            here = Allocation({names[i]: scheme for i, scheme in zip(parts[depth], schemes, strict=True)})
            with engine.applied(here):
                after = [runs[depth](x) for x in outputs]
            descend(depth + 1, after, Allocation({**chosen, **here}))

    descend(0, [x for x, _ in engine.batches("search")], Allocation())


def resnet20_problem(cache: Path, n_search: int = 250, unseen: bool = False) -> Network:
    """ResNet-20 on CIFAR-10, 20 layers at 2, 3, 4, 5, 6 or 8 bits; `n_search` search images from the training set.

    `unseen`: from the end of the test set, which the network was not trained on; the others of it confirm.
    """
    folder = DATA / "cifar10"
    task: Classification = Cifar10(str(folder), n_calibration=1000, n_search=n_search, batch_size=50)
    name = "resnet20" if n_search == 250 else f"resnet20_{n_search}"
    if unseen:
        name += "_unseen"
        seen, (x, y) = (tuple(map(torch.cat, zip(*task.batches(s), strict=True))) for s in ("calibration", "confirm"))
        search, confirm = (x[-n_search:], y[-n_search:]), (x[:-n_search], y[:-n_search])
        task = Classification(seen, search, confirm, n_classes=10, batch_size=50)
    return Network(name, resnet(20, folder / "resnet20.safetensors"), task, (2, 3, 4, 5, 6, 8), cache)


def stories_problem(cache: Path) -> Network:
    """A Llama of 5 blocks on TinyStories; q/k/v and gate/up share a scheme: 21 groups at 2, 3, 4, 5, 6 or 8 bits."""
    folder = DATA / "stories260k"
    task = Stories(folder, n_calibration=32, n_search=8, n_confirm=128, window=128, batch_size=32)
    shared = ("*.q_proj|*.k_proj|*.v_proj", "*.gate_proj|*.up_proj")
    return Network("stories260k", stories260k(folder / "model.safetensors"), task, (2, 3, 4, 5, 6, 8), cache, shared)


def minilm_problem(cache: Path) -> Network:
    """MiniLM-L6, a BERT that embeds sentences; q/k/v share a scheme: 27 groups at 2, 3, 4, 5, 6 or 8 bits, 100 search pairs."""
    task = STSBenchmark(DATA / "stsb", n_calibration=200, n_search=100)
    return Network("minilm", minilm(), task, (2, 3, 4, 5, 6, 8), cache, ("*.query|*.key|*.value",))


def efficientnet_problem(cache: Path) -> Network:
    """EfficientNet-Lite0, half of its layers depthwise: 50 layers at 2, 3, 4, 5, 6 or 8 bits, 72 search pictures."""
    task = ImageNetSample(DATA / "imagenet_sample", n_calibration=128, n_search=72, batch_size=24)
    model = efficientnet_lite0().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # three times as fast
    return Network("efficientnet_lite0", model, task, (2, 3, 4, 5, 6, 8), cache)


class Synthetic(Problem):
    """`n` groups that interact in a known way, 2 to 8 bits, sizes spread over two decades.

    Every group's error is a vector: its amplitude halves with every bit, its direction is fixed. Errors add up as vectors in 32
    features that neighbours share, so that they reinforce or cancel one another; the loss is half their squared length, amplified
    where early and late errors meet, and saturates at log(1000):  loss = C (1 - exp(-q (1 + 0.3 q) / C)),  q = |sum_g e_g|^2 / 2.
    """

    def __init__(self, n: int, seed: int = 0, bits: tuple[int, ...] = (2, 3, 4, 5, 6, 8)) -> None:
        rng = np.random.default_rng(seed)
        numel = np.maximum(64, 10 ** rng.uniform(2.5, 4.5, n)).astype(int)
        layers = [LayerSpec(f"g{i}", "linear", (64, int(k) // 64 + 1), int(k), f"g{i}", (f"g{i}",)) for i, k in enumerate(numel)]
        groups = tuple(LayerGroup(layer.name, (layer,)) for layer in layers)
        schemes = {f"w{b}": Integer(b) for b in bits}
        space = SearchSpace(groups, schemes, tuple(tuple(schemes) for _ in groups), 0)
        self.name, self.space, self.seconds, self.spent = f"synthetic{n}", space, 0.0, 0.0
        self._rows = {name: i for i, name in enumerate(space.names)}
        walk = np.cumsum(rng.normal(size=(n, 32)), axis=0) * 0.3 + rng.normal(size=(n, 32))
        self.directions = walk / np.linalg.norm(walk, axis=1)[:, None] * rng.choice([1, -1], size=(n, 1))
        scale = np.exp(rng.normal(0, 1, n)) * (numel / numel.mean()) ** 0.25 * 3 / np.sqrt(n)
        self.amplitudes = scale[:, None] * 2.0 ** -(np.array(bits) - 2) * np.exp(rng.normal(0, 0.15, (n, len(bits))))

    def score(self, allocation: Allocation, split: str = "search") -> Score:
        """By the formula; the quality is exp(-loss). Nothing is kept: it is quicker than a file."""
        index = {name: i for i, name in enumerate(self.space.scheme_names)}
        rows = [self._rows[group] for group in allocation]
        chosen = self.amplitudes[rows, [index[scheme] for scheme in allocation.values()]]
        error = chosen @ self.directions[rows] if rows else np.zeros(32)
        q, top = 0.5 * float(error @ error), np.log(1000)
        loss = float(top * -np.expm1(-q * (1 + 0.3 * q) / top))
        return Score(loss, float("nan"), np.exp(-loss), np.exp(-loss), np.exp(-loss), float("nan"), 0, np.empty(0))
